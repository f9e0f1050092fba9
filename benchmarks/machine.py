"""Files of the results of the benchmarks; the description of the machine is that of `dave_fast.bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dave_fast.bench.machine import commit, device_name, environment, slug, write_json
from dave_fast.run.identity import refuse_other

__all__ = ["RESULTS", "commit", "device_name", "environment", "keep_to", "results_path", "write_json"]

RESULTS = Path(__file__).parent / "results"


def results_path(name: str) -> Path:
    """Return benchmarks/results/<device>/<name>.json."""
    return RESULTS / slug(device_name()) / f"{name}.json"


def keep_to(path: Path, settings: dict[str, Any]) -> None:
    """Store the settings that the files of a folder were made with; refuse others when work in it goes on.

    Args:
        path: of their JSON file.
        settings: all that the files depend on.

    Raises:
        InputError: the folder's files were made with others.
    """
    now = json.loads(json.dumps(settings))
    if path.exists():
        refuse_other(path.parent, json.loads(path.read_text()), now)
    else:
        write_json(path, now)
