"""The maps of a run as pictures, by themselves or with what a program needs to know of them as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    kinds = ("map", "overlay", *(["signed"] if job.raw else []))
    names = file_names(job.maps.ids, [*(f".{kind}.png" for kind in kinds), *more], [INDEX])
    for number, (name, row) in enumerate(zip(names, job.maps, strict=True)):
        crop = photographs.crop(row)
        assert row.map is not None
        made = {"map": drawing.plain_map(row.map)} | ({} if crop is None else laid_over(row, crop))
        for kind, picture in made.items():
            drawing.save_picture(picture, folder / f"{name}.{kind}.png")
        files = {kind: f"{name}.{kind}.png" if kind in made else None for kind in kinds}
        yield row, name, files
        job.progress(number + 1)


def laid_over(row: MapRecord, crop: np.ndarray) -> dict[str, Image.Image]:
    """Draw a row's map over the photograph: "overlay", and "signed", in two colours, where there are contributions.

    Args:
        row: with a map.
        crop: what the model saw, uint8 (H, W, 3).
    """
    assert row.map is not None
    made = {"overlay": drawing.overlay(crop, row.map)}
    if row.raw is not None:
        made["signed"] = drawing.overlay(crop, _signed(row.raw), signed=True)
    return made


def _signed(raw: np.ndarray) -> np.ndarray:
    """Return the signed map (H, W) of contributions (3, H, W), blended with its blur as maps are."""
    import torch

    from dave_fast.ops.smooth import signed_map

    made: np.ndarray = signed_map(torch.from_numpy(raw.sum(0))).numpy()
    return made
