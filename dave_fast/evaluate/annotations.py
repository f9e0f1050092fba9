"""Labels and objects of image files: ImageNet's XML, CSV and JSON of boxes, COCO's JSON, PNG masks, names of folders.

Boxes are (xmin, ymin, xmax, ymax) in pixels of the photograph after its EXIF rotation; xmax and ymax are excluded. An
object is the union of the image's boxes of one class, the one with the largest boxes if there are several, since a map
explains one class; or the nonzero pixels of its mask.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dave_fast.errors import InputError
from dave_fast.files import read_json, read_plain
from dave_fast.images import read_mask
from dave_fast.models.labels import Labels
from dave_fast.numbers import shown

Box = tuple[float, float, float, float]
COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax")
# Sizes and sides of boxes are below; what is scaled by them stays finite.
_BEYOND = 2**31


@dataclass(frozen=True)
class Noted:
    """The entry of an annotation file for one image.

    Attributes:
        boxes: of the object.
        label: name of its class, or None.
        size: (width, height) of the image that the boxes refer to; None where the file does not give it.

    Raises:
        TypeError: the label is no text, or a side of a box no number.
        ValueError: a side of a box is not finite or beyond ±2³¹, a box ends before it begins, or a side of the image is
            no whole number from 1 to 2³¹ − 1.
    """

    boxes: tuple[Box, ...]
    label: str | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str | None):
            raise TypeError(f"the label {self.label!r} is no text")
        for box in self.boxes:
            left, top, right, bottom = box
            if not all(abs(side) < _BEYOND for side in box):
                raise ValueError(f"the box {shown(box)} is not finite, or reaches beyond {_BEYOND - 1}")
            if right < left or bottom < top:
                raise ValueError(f"the box {shown(box)} ends before it begins: expected xmin ≤ xmax and ymin ≤ ymax")
        if self.size is not None and not all(map(_is_size, self.size)):
            given = " and ".join(map(shown, self.size))
            raise ValueError(f"width and height are {given}; expected whole numbers from 1 to {_BEYOND - 1}")


def _is_size(side: Any) -> bool:
    # some programs write whole numbers as 640.0
    number = isinstance(side, int | float) and not isinstance(side, bool)
    return number and 1 <= side < _BEYOND and side == int(side)


@dataclass(frozen=True)
class Annotations:
    """Labels and objects of image files.

    Attributes:
        labels: the class names of the model.
        noted: entries by file name without suffix.
        masks: folder of PNG masks, by the same name; None without masks.
    """

    labels: Labels
    noted: dict[str, Noted] = field(default_factory=dict)
    masks: Path | None = None

    def label(self, path: Path) -> int | None:
        """Return the class by the annotation, otherwise by the folder's name; None if the model has no such class."""
        noted = self.noted.get(path.stem)
        return class_of(noted.label if noted and noted.label else path.parent.name, self.labels)

    def has_object(self, path: Path) -> bool:
        """Return whether there are boxes or a mask of a photograph's name."""
        return path.stem in self.noted or (self.masks is not None and (self.masks / f"{path.stem}.png").exists())

    def mask(self, path: Path, size: tuple[int, int]) -> np.ndarray | None:
        """Return the object's pixels.

        Args:
            path: of the photograph.
            size: its (width, height).

        Returns:
            (H, W) bool, or None where no object is known.

        Raises:
            InputError: the mask or the boxes belong to an image of another size.
        """
        if self.masks is not None:
            return _mask_file(self.masks / f"{path.stem}.png", size)
        noted = self.noted.get(path.stem)
        if noted is None or not noted.boxes:
            return None
        width, height = noted.size or size
        factors = (size[0] / width, size[1] / height)
        if abs(factors[0] / factors[1] - 1) > 0.01:
            raise InputError(
                f"{path} has {size[0]}×{size[1]} pixels, and its boxes are for {width}×{height}: "
                "give boxes for this image."
            )
        return _fill(noted.boxes, size, factors)


def class_of(name: str, labels: Labels) -> int | None:
    """Return the class of a name, or of a WordNet id if the model's names are ImageNet's 1,000; None if unknown."""
    if name in _wordnet() and _are_imagenets(labels.names or ()):
        return _wordnet()[name]
    try:
        return labels.resolve(name)
    except InputError:
        return None


def _are_imagenets(names: Sequence[str]) -> bool:
    """Return whether names are those of ImageNet's 1,000 classes, which libraries word differently, in its order."""
    known = {0: "tench", 487: "cell", 999: "toilet"}
    return len(names) == 1000 and all(word in names[index].lower() for index, word in known.items())


@cache
def _wordnet() -> dict[str, int]:
    from timm.data.imagenet_info import ImageNetInfo

    return {synset: i for i, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def read_boxes(path: Path) -> dict[str, Noted]:
    """Read boxes from a folder of XML files (PASCAL VOC's format, as ImageNet's), a .csv, or a .json.

    A CSV has one line for each box, with the columns image, xmin, ymin, xmax, ymax, and optionally label. A JSON is
    COCO's, or a list with an object for each image: file, boxes ([xmin, ymin, xmax, ymax] each), and optionally label,
    width and height.

    Returns:
        Entries by file name without suffix.

    Raises:
        InputError: the path is none of these, or cannot be read.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.xml"))
        if not files:
            raise InputError(f"{path} holds no XML file: --boxes takes a folder of annotations, a .csv or a .json.")
        images = _Images()
        return {images.name(str(file.relative_to(path))): _read_xml(file) for file in files}
    readers = {".csv": _read_csv, ".json": _read_json}
    if not path.exists() or path.suffix.lower() not in readers:
        raise InputError(f"--boxes {path}: expected a folder of XML files, a .csv or a .json that exists.")
    try:
        return readers[path.suffix.lower()](path)
    except InputError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        forms = "COCO's images, annotations, or a list of objects with file, boxes"
        wanted = f"the columns {', '.join(COLUMNS)} in UTF-8" if path.suffix.lower() == ".csv" else forms
        raise InputError(f"cannot read {path} ({reason}): expected {wanted}.") from error


class _Images:
    """The images that an annotation file names: two folders with a file of one name would share its boxes."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, ...]] = {}

    def name(self, given: str) -> str:
        """Return an image's file name without suffix; raise InputError if it stands for two images."""
        parts = Path(given).with_suffix("").parts
        known = self._known.get(parts[-1], parts)
        both = min(len(known), len(parts))
        if known[-both:] != parts[-both:]:
            raise InputError(
                f"the boxes of {'/'.join(known)} and {'/'.join(parts)} are for two images of one name; give each its "
                "own --boxes, or rename them."
            )
        # The longest says most of where the image lies.
        self._known[parts[-1]] = max(known, parts, key=len)
        return parts[-1]


def _read_xml(path: Path) -> Noted:
    try:
        root = ElementTree.fromstring(read_plain(path))
        boxes: dict[str | None, list[Box]] = defaultdict(list)
        for one in root.iter("object"):
            boxes[one.findtext("name")] += map(_xml_box, one.iter("bndbox"))
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        return _largest(boxes.items(), (width, height) if width and height else None)
    except InputError:
        raise
    # a LookupError of an encoding that Python does not know, or that is none of text
    except (ElementTree.ParseError, LookupError, OverflowError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; expected annotations in PASCAL VOC's XML.") from error


def _largest(boxes: Iterable[tuple[str | None, Sequence[Box]]], size: tuple[int, int] | None) -> Noted:
    """Return the entry of one image: the class with the largest boxes in sum, and its boxes."""
    # All are made, so that wrong boxes of another class are told.
    each = [Noted(tuple(chosen), label, size) for label, chosen in boxes] or [Noted((), None, size)]
    return max(each, key=lambda one: sum(map(_area, one.boxes)))


def _xml_box(box: ElementTree.Element) -> Box:
    # in this format xmax and ymax are the last pixel inside
    xmin, ymin, xmax, ymax = (float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
    return xmin, ymin, xmax + 1, ymax + 1


def _read_csv(path: Path) -> dict[str, Noted]:
    found: dict[str, dict[str | None, list[Box]]] = defaultdict(lambda: defaultdict(list))
    images = _Images()
    # strict, since otherwise a quote that is never closed takes in all that follows
    rows = csv.DictReader(io.StringIO(read_plain(path).decode("utf-8-sig"), newline=""), strict=True)
    try:
        for row in rows:
            xmin, ymin, xmax, ymax = (float(row[side]) for side in COLUMNS[1:])
            noted = Noted(((xmin, ymin, xmax, ymax),), row.get("label") or None)
            found[images.name(row["image"])][noted.label] += noted.boxes
    except (csv.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # A row that cannot be parsed begins behind the last one.
        first, last = rows.line_num + 1, rows.reader.line_num
        where = f"lines {first} to {last}" if first < last else f"line {last}"
        if isinstance(error, InputError):
            raise InputError(f"{path}, {where}: {error}") from error
        wanted = f"the columns {', '.join(COLUMNS)}, and each quote closed"
        raise InputError(f"{path}, {where}: {type(error).__name__}: {error}; expected {wanted}.") from error
    return {name: _largest(boxes.items(), None) for name, boxes in found.items()}


def _read_json(path: Path) -> dict[str, Noted]:
    content = read_json(path)
    return _listed(content) if isinstance(content, list) else _of_coco(content)


def _listed(content: list[dict[str, Any]]) -> dict[str, Noted]:
    """Return the entries of a list of images with their boxes."""
    noted: dict[str, Noted] = {}
    images = _Images()
    for one in content:
        boxes = tuple(
            (float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in one["boxes"]
        )
        size = (one["width"], one["height"]) if "width" in one else None
        _add(noted, images.name(one["file"]), Noted(boxes, one.get("label"), size))
    return noted


def _of_coco(content: dict[str, Any]) -> dict[str, Noted]:
    """Return the entries of COCO's images with annotations."""
    categories = {one["id"]: one["name"] for one in content.get("categories", [])}
    found: dict[int, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        found[one["image_id"]][one["category_id"]].append((x, y, x + width, y + height))
    noted: dict[str, Noted] = {}
    images = _Images()
    for image in content["images"]:
        if by_category := found.get(image["id"]):
            size = (image["width"], image["height"]) if "width" in image else None
            # By id, since two categories may have one name, or none.
            named = [(categories.get(category), boxes) for category, boxes in by_category.items()]
            _add(noted, images.name(image["file_name"]), _largest(named, size))
    return noted


def _add(noted: dict[str, Noted], name: str, one: Noted) -> None:
    if name in noted:
        raise ValueError(f"{name} is listed twice")
    noted[name] = one


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _fill(boxes: tuple[Box, ...], size: tuple[int, int], factors: tuple[float, float]) -> np.ndarray:
    mask = np.zeros((size[1], size[0]), bool)
    for box in boxes:
        left, top, right, bottom = (max(0, round(side * factors[i % 2])) for i, side in enumerate(box))
        mask[top:bottom, left:right] = True
    return mask


def _mask_file(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    if not path.exists():
        return None
    mask = read_mask(path)
    height, width = mask.shape
    if (width, height) != size:
        raise InputError(
            f"the mask {path} has {width}×{height} pixels, its image {size[0]}×{size[1]}: give masks of the images' "
            "size."
        )
    return mask
