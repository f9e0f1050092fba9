"""Write the tables of docs/models.md of classes of transformers, torchvision and open_clip: their routes, and times.

    python scripts/library_table.py

The models are the tiny ones of tests/libraries.py. For those with a plan the error is the larger of two, over the
class's models: of the output and of the effective gradient, the engine's against the frozen route's, in float64. Times
are those of `python -m benchmarks.libraries`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dave_fast import DAVE  # noqa: E402
from dave_fast.plan.families import why_not  # noqa: E402
from tests.libraries import FROZEN, LIBRARIES  # noqa: E402
from tests.variants import Variant  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
TIMES = ROOT / "benchmarks" / "results" / "amd-epyc" / "libraries.json"
BEGIN, END = "<!-- scripts/library_table.py -->", "<!-- end of libraries -->"
BEGIN_TIMES, END_TIMES = "<!-- times of libraries -->", "<!-- end of times -->"


def class_of(model: Any) -> tuple[str, str]:
    """Return the library and the class of a model in its adapter; of open_clip's the class of the image tower."""
    inner = getattr(model, "model", model)
    library = type(inner).__module__.partition(".")[0]
    if library != "open_clip":
        return library, type(inner).__name__
    trunk = getattr(inner.visual, "trunk", None)
    return library, f"{type(inner.visual).__name__}" + ("" if trunk is None else f" of timm's {type(trunk).__name__}")


def error_of(variant: Variant) -> float:
    """Return how far the engine is from the frozen route in float64, relative to it."""
    images = variant.images(2, torch.float64)
    found = []
    for route in ("engine", "frozen"):
        made = DAVE(variant.build(torch.float64), precision="fp64", noise_alpha=0.0, route=route)
        found.append(made.effective_gradient(images, _element))
    return float((found[0] - found[1]).norm() / found[1].norm())


def _element(output: torch.Tensor) -> torch.Tensor:
    return output.flatten(1)[:, 3]


def reason_of(model: nn.Module) -> str:
    """Return why a model has no plan, in short."""
    reason = why_not(model) or ""
    return "its class has no reader" if "none of another library's" in reason else reason.rpartition(": ")[2]


def rows(*, measured: bool) -> Iterator[tuple[str, str, str, str]]:
    """Yield library, class, route, and the error (empty unless measured) or the reason, once for a class and reason."""
    worst: dict[tuple[str, str], float] = {}
    for variant in LIBRARIES.values():
        key = class_of(variant.build())
        worst[key] = max(worst.get(key, 0.0), error_of(variant) if measured else 0.0)
    yield from ((*key, "engine", f"{error:.0e}" if measured else "") for key, error in worst.items())
    for variant, _ in FROZEN.values():
        model = variant.build()
        yield *class_of(model), "frozen", reason_of(model)


def table(*, measured: bool = True) -> str:
    """Return the section of docs/models.md between its marks."""
    lines = ["", "| library | class | route | error, or why there is no plan |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(measured=measured)]
    return "\n".join(lines) + "\n"


def times() -> str:
    """Return the table of times between its marks, as the benchmark measured them."""
    found = json.loads(TIMES.read_text())
    settings = found["settings"]
    lines = [
        "",
        f"ViT {settings['shape']}, {settings['size']} pixels, S = {settings['samples']}, {settings['precision']}, two "
        f"cores of an {found['environment']['device']}, {settings['repeats']} repeats in turns: medians, smallest "
        "and largest.",
        "",
        "| class | seconds | times timm's | frozen route, times timm's | first call, seconds: engine, frozen "
        "| attribution, engine against timm's |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["results"]:
        ratio, first = row["of_timm"], row["first_call_seconds"]
        cells = (
            row["class"],
            f"{row['seconds']['library']['median']:.2f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
            f"{row['frozen_of_timm']['median']:.2f}",
            f"{first['library']:.1f}, {first['frozen']:.1f}",
            f"{row['difference']['timm']:.0e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(page: str, begin: str, content: str, end: str) -> str:
    """Return a page with other content between two marks."""
    before, _, rest = page.partition(begin)
    return before + begin + "\n" + content + end + rest.partition(end)[2]


def main() -> None:
    """Write the tables."""
    warnings.simplefilter("ignore")
    page = replaced(PAGE.read_text(), BEGIN, table(), END)
    PAGE.write_text(replaced(page, BEGIN_TIMES, times(), END_TIMES))


if __name__ == "__main__":
    main()
