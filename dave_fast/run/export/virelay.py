"""The maps of a run as ViRelAy's attribution database."""

from __future__ import annotations

import numpy as np

from dave_fast.errors import InputError
from dave_fast.models.spec import Link
from dave_fast.run.export.job import Job, package, whole
from dave_fast.run.reader import MapRecord


def write_virelay(job: Job) -> int:
    """Write ViRelAy's attribution database: index, attribution (N, C, H, W), label, prediction (N, K).

    The attribution is the signed contributions if the run kept them (--raw), else the map with C = 1. The prediction
    is the probabilities of the outputs if the run kept them (--outputs), or the outputs of a model without
    probabilities; else the explained class's probability, NaN where there is none, and zeros.
    """
    h5py, maps = package("h5py", "virelay"), job.maps
    # runs of earlier versions hold softmax probabilities
    classes, link = job.configuration["classes"], job.configuration.get("link", "softmax")
    first = maps[0]
    if first.output is not None:
        classes = len(first.output)
    if classes is None:
        raise InputError("the model does not say how many classes it has: run with --outputs to export to ViRelAy.")
    shape = first.map.shape if first.raw is None else first.raw.shape[1:]
    channels = 1 if first.raw is None else len(first.raw)
    with whole(job.target, folder=False) as path, h5py.File(path, "w") as book:
        book.attrs["dave_fast"] = repr(maps.identity)
        attribution = book.create_dataset(
            "attribution", (len(maps), channels, *shape), np.float32, chunks=(1, channels, *shape), compression="gzip"
        )
        prediction = book.create_dataset("prediction", (len(maps), classes), np.float32)
        book["index"] = np.arange(len(maps), dtype=np.uint32)
        book["label"] = maps.column("target").astype(np.uint32)
        book.create_dataset("id", data=maps.ids, dtype=h5py.string_dtype())
        for number, row in enumerate(maps):
            attribution[number] = row.map if row.raw is None else row.raw
            prediction[number] = _prediction(row, classes, link)
            job.progress(number + 1)
    return 0


def _prediction(row: MapRecord, classes: int, link: Link) -> np.ndarray:
    if row.output is None:
        found = np.zeros(classes, np.float32)
        found[row.target] = np.nan if row.probability is None else row.probability
        return found
    if link == "softmax":
        exponents = np.exp(row.output - row.output.max())
        return exponents / exponents.sum()
    return row.output if link is None else 1 / (1 + np.exp(-row.output))
