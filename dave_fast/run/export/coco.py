"""The evidence of maps as COCO annotations, in the pixels of the photographs, and as heatmaps.

labels.json   images, categories and annotations, as COCO's detections and as FiftyOne reads them
heatmaps/     a grey picture of each map, 255 at 1, which covers the photograph and is 0 where the model saw nothing
data/         photographs that are no files of their own: of tars, datasets and URLs
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dave_fast.images.drawing import save_picture
from dave_fast.run.export.job import Job, Photographs, json_list, whole
from dave_fast.run.export.names import file_names
from dave_fast.run.export.regions import box_of, on_photograph, packed, run_lengths, smallest_region
from dave_fast.run.reader import MapRecord
from dave_fast.run.records import is_local, path_of, unprintable

_LABELS, _HEATMAPS, _DATA = "labels.json", "heatmaps", "data"


def write_coco(job: Job) -> int:
    """Write an annotation of each map's evidence region and its heatmap; return how many images were not found.

    A photograph that several records share is one image with several annotations. A map without evidence inside of the
    photograph has no annotation.
    """
    photographs, maps = Photographs(job), job.maps
    names = [f"{name}.png" for name in file_names(maps.ids, (".png",))]
    images: dict[str, dict[str, Any]] = {}
    annotations = 0
    with whole(job.target, folder=True) as folder:
        # FiftyOne looks for it
        (folder / _DATA).mkdir()
        tail: dict[str, Any] = {}
        with json_list(folder / _LABELS, _head(job), "annotations", tail) as add:
            for number, (name, row) in enumerate(zip(names, maps, strict=True)):
                photograph = photographs.read(row)
                if photograph is not None:
                    if row.uri not in images:
                        images[row.uri] = _image(len(images) + 1, row.uri, photograph, folder / _DATA, name)
                    found = _annotation(job, row, images[row.uri])
                    if found is not None:
                        annotations += 1
                        add({"id": annotations, **found, "heatmap": f"{_HEATMAPS}/{name}"})
                    save_picture(_heatmap(job, row, *photograph.size), folder / _HEATMAPS / name)
                job.progress(number + 1)
            photographs.check()
            tail["images"] = list(images.values())
    return photographs.missing


def _head(job: Job) -> dict[str, Any]:
    """Return what stands ahead of the annotations: what they are, and the categories."""
    what = (
        f"Evidence of {job.configuration['model']} by dave-fast: each annotation is the smallest set of pixels that "
        f"holds {job.share:g} of the sum of a map, and no object. score is the model's probability of the class."
    )
    name = job.maps.labels.name
    classes = np.unique(job.maps.column("target")).tolist()
    return {
        "info": {"description": what, "share": job.share, "dave_fast": job.maps.identity},
        "licenses": [],
        "categories": [{"id": index, "name": name(index)} for index in classes],
    }


def _image(number: int, uri: str, photograph: Image.Image, data: Path, name: str) -> dict[str, Any]:
    """Return COCO's image of a photograph; one that is no file of its own is written to the folder `data`."""
    width, height = photograph.size
    # a name that is no UTF-8 cannot stand in JSON
    own_file = is_local(uri) and unprintable(uri) == uri
    if not own_file:
        save_picture(photograph, data / name)
    file_name = os.path.abspath(path_of(uri)) if own_file else name
    return {"id": number, "file_name": file_name, "width": width, "height": height, "uri": uri}


def _annotation(job: Job, row: MapRecord, image: dict[str, Any]) -> dict[str, Any] | None:
    """Return COCO's annotation of a map's evidence region, without its number; None where there is none."""
    width, height = image["width"], image["height"]
    assert row.map is not None
    mask = on_photograph(smallest_region(row.map, job.share), job.geometry.seen(width, height), width, height)
    if not mask.any():
        return None
    facts = job.facts(row)
    return {
        "image_id": image["id"],
        "category_id": row.target,
        "bbox": box_of(mask),
        "area": int(mask.sum()),
        "segmentation": {"size": [height, width], "counts": packed(run_lengths(mask))},
        "iscrowd": 0,
        # a score that is null is none for COCO's tools
        **({} if row.probability is None else {"score": row.probability}),
        "record": row.id,
        "prediction": facts["prediction_name"],
    }


def _heatmap(job: Job, row: MapRecord, width: int, height: int) -> Image.Image:
    """Draw a map in grey on the frame of the photograph, resized as the model's preprocessing resizes it."""
    assert row.map is not None
    geometry = job.geometry
    wide, high = geometry.resized(width, height)
    left, top, _, _ = geometry.seen(width, height)
    picture = Image.new("L", (wide, high))
    values = Image.fromarray(np.rint(255 * np.clip(row.map, 0, 1)).astype(np.uint8))
    values = values.resize(geometry.size[::-1], Image.Resampling.NEAREST)
    picture.paste(values, (round(left * wide / width), round(top * high / height)))
    return picture
