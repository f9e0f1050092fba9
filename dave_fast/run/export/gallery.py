"""A gallery of a run: a page that a browser opens from the disk, its pictures, and its data as a script.

    index.html, gallery.css, gallery.js   the page, the same for all runs
    data.js                               the rows' small columns
    pictures/NNN/NNNNNN.*.webp            of each row, by its number: the overlay, the photograph, the signed overlay
    small/NNN/NNNNNN.*.webp               the same for the grid

Names and messages stand in data.js alone, and the page shows them as text.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from dave_fast.explain.depth import PIXELS, name_of
from dave_fast.images import drawing
from dave_fast.run.export.job import Job, Photographs, whole
from dave_fast.run.export.pictures import laid_over
from dave_fast.run.reader import MapRecord

_PAGE = ("index.html", "gallery.css", "gallery.js")
# Pixels of the longer side in the grid; WebP's quality.
_SMALL, _QUALITY = 288, 82
# Pictures in one folder.
_FOLDER = 1000


def write_gallery(job: Job) -> int:
    """Write the page with the pictures of each row, and the rows with errors; return how many images were not found.

    A map whose image was not found is shown by itself.
    """
    photographs = Photographs(job)
    shown: list[int] = []
    errors: dict[int, list[str]] = {}
    with whole(job.target, folder=True) as folder:
        for number, row in enumerate(job.maps):
            if row.map is None:
                errors[number] = [row.error or "", _kind(row)]
                shown.append(0)
            else:
                shown.append(_draw(row, photographs, folder, number))
            job.progress(number + 1)
        if len(errors) < len(job.maps):
            photographs.check()
        for name in _PAGE:
            with files(__package__).joinpath(name).open("rb") as source, open(folder / name, "wb") as target:
                shutil.copyfileobj(source, target)
        # a script, since a page from the disk may not read other files
        content = json.dumps(_data(job, shown, errors), separators=(",", ":"), allow_nan=False)
        (folder / "data.js").write_text(f"window.gallery = {content};\n", encoding="ascii")
    return photographs.missing


def _draw(row: MapRecord, photographs: Photographs, folder: Path, number: int) -> int:
    """Write the pictures of a row; return 2, or 1 where there is the map alone."""
    crop = photographs.crop(row)
    assert row.map is not None
    if crop is None:
        pictures = {"overlay": drawing.plain_map(row.map)}
    else:
        pictures = {**laid_over(row, crop), "photograph": Image.fromarray(crop)}
    for kind, picture in pictures.items():
        small = picture.copy()
        small.thumbnail((_SMALL, _SMALL), Image.Resampling.LANCZOS)
        for size, made in (("pictures", picture), ("small", small)):
            path = folder / size / f"{number // _FOLDER:03d}" / f"{number:06d}.{kind}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path, quality=_QUALITY, method=2)
    return 1 if crop is None else 2


def _kind(row: MapRecord) -> str:
    """Return what kind of error a row has: its message without what differs from record to record."""
    message = (row.error or "unknown").replace(row.uri, "…").replace(row.id, "…")
    return re.sub(r"\d+", "n", message)[:200]


def _data(job: Job, shown: list[int], errors: dict[int, list[str]]) -> dict[str, Any]:
    """Return what the page knows of the run."""
    maps, settings = job.maps, job.configuration
    columns = {name: maps.column(name).tolist() for name in ("target", "prediction", "probability", "seed")}
    classes = sorted({index for name in ("target", "prediction") for index in columns[name] if index >= 0})
    ok = maps.filter(status="ok")
    wrong = int((ok.column("target") != ok.column("prediction")).sum())
    # records of a run may have labels, or be explained for their predicted class
    labelled = settings.get("target") == "label" or (settings.get("target") is None and wrong > 0)
    height, width = job.geometry.size
    depth = maps.depth
    facts = {
        "model": settings["model"],
        "samples": settings["n_samples"],
        "evidence at": PIXELS if depth == PIXELS else f"the tokens of {name_of(depth)}",
        "noise_alpha": settings.get("sampling", {}).get("noise_alpha"),
        "shrunk": "yes" if settings["shrink"] else "no",
        "precision": settings["precision"],
        "version": maps.identity.get("version"),
    }
    return {
        "facts": {name: str(value) for name, value in facts.items() if value is not None},
        "labelled": labelled,
        "views": ["overlay", "photograph", *(["signed"] if job.raw else [])],
        "aspect": round(width / height, 4),
        "names": {str(index): maps.labels.name(index) for index in classes},
        "id": maps.ids,
        "uri": maps.column("uri").tolist(),
        **columns,
        # NaN is none in JSON
        "probability": [None if value != value else round(value, 5) for value in columns["probability"]],
        "shown": shown,
        "errors": {str(number): told for number, told in errors.items()},
    }
