"""The maps of a run as pictures, by themselves or with what a program needs to know of them as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dave_fast.images import drawing
from dave_fast.run.export.job import Job, Photographs, as_json, json_list, whole
from dave_fast.run.export.names import file_names
from dave_fast.run.reader import MapRecord

INDEX = "index.json"


def write_png(job: Job) -> int:
    """Write pictures of each record, whose image is read again; return how many images were not found.

    ID.map.png, ID.overlay.png, and ID.signed.png where the run kept the signed contributions.
    """
    photographs = Photographs(job)
    with whole(job.target, folder=True) as folder:
        for _ in _drawn(job, photographs, folder):
            pass
        photographs.check()
    return photographs.missing


def write_folder(job: Job) -> int:
    """Write the pictures of `write_png`, ID.json beside them, and index.json; return how many images were not found."""
    photographs = Photographs(job)
    # the same for all records
    identity = job.maps.identity
    settings = {"depth": job.maps.depth, "model": job.configuration["model"]}
    settings |= {name: identity[name] for name in ("version", "weights")} | {"settings": job.configuration}
    with whole(job.target, folder=True) as folder, json_list(folder / INDEX, settings, "records", {}) as add:
        for row, name, files in _drawn(job, photographs, folder, ".json"):
            facts = job.facts(row)
            content = as_json({**facts, **settings, "files": files}, indent=2)
            (folder / f"{name}.json").write_text(f"{content}\n", encoding="utf-8")
            add({**facts, "files": {**files, "record": f"{name}.json"}})
        photographs.check()
    return photographs.missing


def _drawn(
    job: Job, photographs: Photographs, folder: Path, *more: str
) -> Iterator[tuple[MapRecord, str, dict[str, str | None]]]:
    """Draw the pictures of each record; yield its row, its name, and its pictures by what they are.

    Args:
        job: the job.
        photographs: counts what is missing.
        folder: of the pictures.
        more: endings of other files that are made of each name.
    """
    names = file_names(job.maps.ids, (".map.png", ".overlay.png", ".signed.png", *more), [INDEX])
    for number, (name, row) in enumerate(zip(names, job.maps, strict=True)):
        crop = photographs.crop(row)
        files: dict[str, str | None] = {}
        for kind, picture in views(row, crop).items():
            files[kind] = None
            if picture is not None:
                files[kind] = f"{name}.{kind}.png"
                drawing.save_picture(picture, folder / f"{name}.{kind}.png")
        yield row, name, files
        job.progress(number + 1)


def views(row: MapRecord, crop: np.ndarray | None) -> dict[str, Image.Image | None]:
    """Return the pictures of a row, by what they are: "map", "overlay", and "signed" where there are contributions.

    Args:
        row: with a map.
        crop: what the model saw, uint8 (H, W, 3); without it there are no pictures over the photograph, but None.
    """
    assert row.map is not None
    over: dict[str, Image.Image | None] = {"map": drawing.plain_map(row.map)}
    over["overlay"] = None if crop is None else drawing.overlay(crop, row.map)
    if row.raw is not None:
        over["signed"] = None if crop is None else drawing.overlay(crop, _signed(row.raw), signed=True)
    return over


def _signed(raw: np.ndarray) -> Any:
    """Return the signed map (H, W) of contributions (3, H, W), blended with its blur as maps are."""
    import torch

    from dave_fast.ops.smooth import signed_map

    return signed_map(torch.from_numpy(raw.sum(0))).numpy()
