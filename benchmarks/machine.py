"""Paths of the results of the benchmarks; the description of the machine is that of `dave_fast.bench`."""

from __future__ import annotations

from pathlib import Path

from dave_fast.bench.machine import commit, device_name, environment, slug, write_json

__all__ = ["RESULTS", "commit", "device_name", "environment", "results_path", "write_json"]

RESULTS = Path(__file__).parent / "results"


def results_path(name: str) -> Path:
    """Return benchmarks/results/<device>/<name>.json."""
    return RESULTS / slug(device_name()) / f"{name}.json"
