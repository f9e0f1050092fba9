"""Write docs/performance.md and its plots from the JSON under benchmarks/results.

    python -m benchmarks.performance_page [RESULT.json ...]      by default every result there that has a setting

A result is a file of `dave-fast bench --json`, `python -m benchmarks.side_by_side` or
`python -m benchmarks.quality_for_time`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import quality_page, speed_page
from benchmarks.machine import RESULTS
from dave_fast.bench.page import write_page

DOCS = RESULTS.parents[1] / "docs"


def results_of(paths: list[Path]) -> list[dict[str, Any]]:
    """Read the results among these files, in the order of their names, without older formats and rehearsals."""
    found = [json.loads(path.read_text()) for path in sorted(paths)]
    return [r for r in found if "setting" in r and not r["setting"].get("tiny")]


def write(results: list[dict[str, Any]], folder: Path) -> Path:
    """Write `folder`/performance.md, the chart of speed first, then quality for time; return its path."""
    quality = [quality_page.section(r, folder) for r in results if "time to quality" in r]
    speed = [r for r in results if r.get("engine") or r.get("ops")]
    top = speed_page.section(speed, folder)
    return write_page(speed, folder, top=top, first=quality, again=quality_page.AGAIN if quality else "")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    print(f"wrote {write(results_of(args.results or list(RESULTS.glob('*/*.json'))), args.out)}")


if __name__ == "__main__":
    main()
