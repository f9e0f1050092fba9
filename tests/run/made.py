"""Make the folder of a run, of scenes and made-up maps, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dave_fast.models.demo import draw_scenes
from dave_fast.run import shards
from dave_fast.run.identity import save_names
from dave_fast.run.mapper import packed_map, packed_raw

SIDE = 16
NAMES = [f"digit {number}" for number in range(10)]
PREPARE = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "crop_mode": "center"}


def scenes(folder: Path, count: int, size: tuple[int, int] = (48, 32)) -> list[Path]:
    """Draw scenes of (width, height) pixels as PNG; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, paths = draw_scenes(count, 0, size=max(size)).images, []
    for number, pixels in enumerate(drawn):
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).crop((0, 0, *size)).save(paths[-1])
    return paths


def blob(side: int, x: float, y: float, width: float) -> np.ndarray:
    """Return a map (side, side) of a Gaussian, float32 with maximum 1; x, y and width are shares of the side."""
    down, across = (np.mgrid[:side, :side] + 0.5) / side
    heat = np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * width**2))
    return (heat / heat.max()).astype(np.float32)


def make_run(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = NAMES,
    raw: bool = False,
    **configuration: Any,
) -> Path:
    """Write a run of the given records to a new folder, and return it.

    Args:
        folder: of the run.
        records: columns of each row, at least "id" and "uri". One with "error" has no map. "map" (H, W) and "raw"
            (3, H, W) are drawn where they are not given.
        names: of the ten classes.
        raw: whether rows have signed contributions.
        configuration: settings that differ.
    """
    settings = {"model": "demo", "n_samples": 3, "seed": 0, "target": None, "precision": "fp32", "shrink": True}
    settings |= {"sampling": {"noise_alpha": 0.5}, "depth": "pixels", "preprocessing": PREPARE, "classes": 10}
    settings |= {"link": "softmax", "map_dtype": "float16", "raw": raw, "outputs": False} | configuration
    identity = {"format": 1, "version": "0", "weights": "0" * 32, "configuration": settings, "source": {}}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(identity))
    if names is not None:
        save_names(folder, names)
    numbers = np.random.default_rng(0)
    with shards.new_shard(folder / "maps-0.parquet", shards.schema(identity)) as writer:
        for number, given in enumerate(records):
            row = {"seed": 0, "n_samples": 3, "status": "ok", **given}
            if "error" in row:
                writer.add([row | {"status": "error"}])
                continue
            heat = row.pop("map", None)
            row = {"target": number % 10, "prediction": number % 10, "probability": numbers.random(), **row}
            row |= packed_map(blob(SIDE, *numbers.random(2), 0.15) if heat is None else heat, settings["map_dtype"])
            if raw:
                row |= packed_raw(numbers.normal(size=(3, row["height"], row["width"])))
            writer.add([row])
    return folder
