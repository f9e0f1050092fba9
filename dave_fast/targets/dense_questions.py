"""Questions about a place in the image: a patch, a point or mask of a segmentation, a box of a detector.

The place follows the image through the warp of each sample (`dave_fast.targets.places`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.given.wrappers import last_part
from dave_fast.models.labels import Labels
from dave_fast.numbers import check_integer, shown
from dave_fast.targets import cotangents
from dave_fast.targets.cotangents import Cotangent
from dave_fast.targets.forms import ModelView, Question
from dave_fast.targets.grids import Grid
from dave_fast.targets.places import Mask, Place, Point, overlap
from dave_fast.targets.questions import vectors_of
from dave_fast.transfers import to_device


@dataclass(frozen=True)
class Patch(Question):
    """A token of the output: ⟨weights, token⟩ of the patch in `row` and `column` of the grid, both from 0.

    Outputs with tokens are (B, N, D), patches in rows behind any prefix tokens, or (B, D, h, w) or (B, h, w, D); timm
    models have them when made with num_classes=0, global_pool="", or by `tokens_of(model)`. The target follows the
    patch's content through each sample's rotation, scaling, shift and flip.

    Attributes:
        row: of the patch in the grid, from 0.
        column: of the patch in the grid, from 0.
        weights: (D,), the linear probe's row for a class (`load_probe`), or (B, D), one for each image; None is the
            patch's own token in the unperturbed image, normalised.
        prefix: the number of prefix tokens; None where it follows from the model's patch size or the number of tokens.
    """

    row: int
    column: int
    weights: Tensor | None = None
    prefix: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless row, column and prefix are integers."""
        for name, number in (("row", self.row), ("column", self.column), ("prefix", self.prefix or 0)):
            check_integer(number, f"the patch's {name}")

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`.

        Raises:
            InputError: the output has no tokens, their grid is not known, the patch is outside of it, or the weights
                do not fit.
        """
        grid = Grid.of(
            output,
            size,
            view,
            self.prefix,
            "a patch needs tokens, (B, N, D) or (B, D, h, w). timm models give them when made with num_classes=0, "
            "global_pool='', or by dave_fast.targets.tokens_of(model)",
        )
        height, width = grid.shape
        if not (0 <= self.row < height and 0 <= self.column < width):
            raise InputError(
                f"patch ({self.row}, {self.column}) is not in the grid of {height} rows and {width} columns"
            )
        if self.weights is None:
            weights = torch.nn.functional.normalize(grid.tokens[:, self.row * width + self.column], dim=1)
        else:
            given = torch.as_tensor(self.weights).detach()
            weights = vectors_of(given, grid.tokens.shape[2], len(output), "the tensor of weights")
        cell = grid.cell
        return grid.cotangent(weights, Point((self.column + 0.5) * cell[1] - 0.5, (self.row + 0.5) * cell[0] - 0.5))


@dataclass(frozen=True)
class Segment(Question):
    """The logit of a class at a point of a dense output, or its mean over a mask.

    The output is (B, K, h, w) or (B, h, w, K), of a segmentation head of any resolution, or tokens (B, N, K) with the
    patches in rows. It is interpolated bilinearly to the pixels of the model's input, and point or mask follow the
    image through each sample's rotation, scaling, shift and flip; what of them leaves the frame counts nothing.

    Attributes:
        index: of the class, or its name, or a part that occurs in only one of the model's class names.
        at: (y, x) in pixels of the model's input, from 0 at the centre of the first pixel.
        mask: in place of `at`: (H, W), or (B, H, W), one for each image, bool or a weight ≥ 0 of each pixel.
        prefix: the number of tokens before the patches in (B, N, K), as for `Patch`.

    Raises:
        InputError: neither a point nor a mask is given, or both.
    """

    index: int | str
    at: tuple[float, float] | None = None
    mask: Any = None
    prefix: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless there is a point or a mask."""
        _check_class(self.index)
        if (self.at is None) == (self.mask is None):
            raise InputError("a segment's place is at=(y, x), a point, or mask=, (H, W): give one of them")
        if self.at is not None:
            _numbers(self.at, 2, "the point at=", "(y, x)")

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`.

        Raises:
            InputError: the output is not dense, has no such class, or the place is not in the image.
        """
        needs = "a class at a place needs a dense output, (B, K, h, w) of a segmentation head, or tokens (B, N, K)"
        grid = Grid.of(output, size, view, self.prefix, needs)
        classes = grid.tokens.shape[2]
        index = _index_of(self.index, classes, view)
        weights = torch.zeros(1, classes, dtype=output.dtype, device="cpu")
        weights[0, index] = 1
        return grid.cotangent(weights, self._place(size, output))

    def _place(self, size: tuple[int, int], output: Tensor) -> Place:
        if self.at is not None:
            y, x = _numbers(self.at, 2, "the point at=", "(y, x)")
            if not (-0.5 <= y < size[0] - 0.5 and -0.5 <= x < size[1] - 0.5):
                raise InputError(
                    f"the point at=({y:g}, {x:g}) is not in the image of {size[0]} rows, {size[1]} columns"
                )
            return Point(x, y, to_edge=True)
        try:
            mask = torch.as_tensor(self.mask).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            given = type(self.mask).__name__
            raise InputError(f"the mask is a {given}; expected a tensor or an array {size}") from error
        dtype = torch.promote_types(output.dtype, torch.float32)
        values = to_device((mask[None] if mask.dim() == 2 else mask).to(dtype), output.device)
        shapes = (1, *size), (len(output), *size)
        if tuple(values.shape) not in shapes or not bool((values.isfinite() & (values >= 0)).all()):
            raise InputError(
                f"the mask is {tuple(mask.shape)} of {mask.dtype}; expected {size} for all images or "
                f"{(len(output), *size)}, bool or finite weights of at least 0"
            )
        largest = values.amax(dim=(1, 2), keepdim=True)
        if not bool((largest > 0).all()):
            raise InputError("a mask is empty; expected at least one pixel in it")
        # the sum of finite weights may be infinite
        return Mask(values / largest)


@dataclass(frozen=True)
class Box(Question):
    """The logit of a class of one detection: that whose box fits a given box best, or one by its number.

    The output is (B, Q, K + 4): K logits of each of Q detections, and behind them the centre x, y, width and height of
    its box as shares of the image, as `detections_of(model)` gives them for DETR, YOLOS and models like these. The
    detection is chosen in the unperturbed image, by intersection over union. In each sample, whose detections come in
    an order of their own, it is the one whose box fits the moved box of that detection best; a sample in which none
    does counts nothing. Boxes choose the logit and have no part in the score.

    Attributes:
        index: of the class, or its name, as for `Segment`.
        box: (left, top, right, bottom) in pixels of the model's input, edges of which the first pixel's are 0 and 1;
            or a tensor (B, 4), one for each image.
        query: in place of `box`: the number of the detection in the unperturbed image, from 0.

    Raises:
        InputError: neither a box nor a number is given, or both, or the box is empty.
    """

    index: int | str
    box: Any = None
    query: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless there is a box or a number."""
        _check_class(self.index)
        if (self.box is None) == (self.query is None):
            raise InputError("a detection is given by box=(left, top, right, bottom) or by query=: give one of them")
        if self.query is not None:
            check_integer(self.query, "query", 0)
        elif not isinstance(self.box, Tensor | np.ndarray):
            self._boxes(1)

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`.

        Raises:
            InputError: the output has no boxes, no such class or detection, or no box overlaps the given one.
        """
        # tokens have the same form, and negative numbers where boxes have width and height
        if output.dim() != 3 or output.shape[2] < 5 or bool((output[..., -2:] < 0).any()):
            raise InputError(
                f"the model's output is {tuple(output.shape)}; a box needs logits and boxes of detections, "
                "(B, Q, K + 4), with widths and heights of at least 0: give dave_fast.targets.detections_of(model)"
            )
        index = _index_of(self.index, output.shape[2] - 4, view)
        found = cotangents.detected_boxes(output, size)
        if self.query is None:
            fits, query = overlap(found, to_device(self._boxes(len(output)), output.device)[:, None]).max(dim=1)
            if not bool((fits > 0).all()):
                raise InputError(
                    f"no detection of the image overlaps the box {shown(self.box)}; expected left, top, right and "
                    f"bottom edges in pixels of the model's input, {size[1]} wide and {size[0]} high"
                )
        elif self.query < output.shape[1]:
            query = torch.full((len(output),), self.query, device=output.device)
        else:
            raise InputError(f"query {self.query} is out of range: the model has {output.shape[1]} detections")
        boxes = found.gather(1, query[:, None, None].expand(-1, 1, 4))[:, 0]
        return cotangents.BoxCotangent(boxes, index, size)

    def _boxes(self, images: int) -> Tensor:
        """Return the given boxes, (1, 4) or (B, 4) float64."""
        if not isinstance(self.box, Tensor | np.ndarray):
            _numbers(self.box, 4, "the box", "(left, top, right, bottom)")
        boxes = torch.as_tensor(self.box).detach().double()
        boxes = boxes[None] if boxes.dim() == 1 else boxes
        fits = tuple(boxes.shape) in ((1, 4), (images, 4)) and bool(boxes.isfinite().all())
        if not fits or not bool((boxes[:, :2] < boxes[:, 2:]).all()):
            raise InputError(
                f"the box is {shown(self.box)}; expected finite (left, top, right, bottom), left below right and top "
                f"below bottom, for all images, or ({images}, 4)"
            )
        return boxes


def _check_class(index: Any) -> None:
    if not isinstance(index, str):
        check_integer(index, "the class", 0)


def _index_of(index: int | str, classes: int, view: ModelView) -> int:
    """Return the index of a class given by index or name among the K classes of a dense output or of detections."""
    if isinstance(index, str):
        names = (getattr(last_part(view.model), "pretrained_cfg", None) or {}).get("label_names") or ()
        # a detector's last logit may be that of no object
        if len(names) not in (classes, classes - 1):
            raise InputError(
                f"class {index!r}: the names of the output's {classes} classes are not known; give an index"
            )
        index = Labels(classes, tuple(names)).resolve(index)
    if index >= classes:
        raise InputError(f"class {index} is out of range: the output has the classes 0 to {classes - 1}")
    return index


def _numbers(given: Any, count: int, what: str, form: str) -> list[float]:
    """Return a sequence of so many finite numbers; raise InputError for anything else."""
    plain = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == count
    if not plain or not all(isinstance(each, Real) and math.isfinite(each) for each in given):
        raise InputError(f"{what} is {shown(given)}; expected {count} finite numbers, {form}")
    return [float(each) for each in given]
