"""Places of the image in every row: where the row's warp has moved a point, a mask or a box.

Each row is a warped copy of its image, so that a place in the image is another place in the row. A score of a place is
equivariant, as the average over τ needs (DAVE, arXiv 2602.06613, Eq. 6), if the place is warped as the image is.

R rows (image, sample) · B images · (H, W) pixels of the model's input · (h, w) grid of a dense output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dave_fast.ops import pull_back
from dave_fast.ops.perturb import warp
from dave_fast.sampling import Draws

# pixels that are warped at a time
_MOST_PIXELS = 1 << 22


class Place(Protocol):
    """A place of the image, as shares of the cells of a grid."""

    def shares(self, rows: Draws, grid: tuple[int, int], cell: tuple[float, float]) -> Tensor:
        """Return each cell's share of the place in each row, (R, h, w).

        Args:
            rows: the draws of the R rows.
            grid: (h, w).
            cell: (height, width) of a cell in pixels.
        """
        ...


@dataclass(frozen=True)
class Point:
    """A point, which the cells around it share bilinearly; outside of the frame it has no share.

    Attributes:
        x: in pixels of the unperturbed image, 0 at the centre of the first pixel.
        y: in pixels, as x.
        to_edge: whether the outermost cells reach to the frame, as in a bilinear interpolation of the grid to the
            image; otherwise their share falls to 0 half a cell beyond the frame, as around any other cell.
    """

    x: float
    y: float
    to_edge: bool = False

    def shares(self, rows: Draws, grid: tuple[int, int], cell: tuple[float, float]) -> Tensor:
        """See `Place`; float64."""
        moved = pull_back.inverse(rows.matrices)
        x = moved[:, 0, 0] * self.x + moved[:, 0, 1] * self.y + moved[:, 0, 2]
        y = moved[:, 1, 0] * self.x + moved[:, 1, 1] * self.y + moved[:, 1, 2]
        down = _between(y, cell[0], grid[0], to_edge=self.to_edge)
        across = _between(x, cell[1], grid[1], to_edge=self.to_edge)
        return down[:, :, None] * across[:, None]


@dataclass(frozen=True)
class Mask:
    """An area: the mean over its pixels of the grid's bilinear interpolation to the image.

    The mask is warped as the image is; pixels that leave the frame have no share, and a pixel that a scaling enlarges
    has the share that it has in the image.

    Attributes:
        values: (B, H, W), or (1, H, W) for all images, the weight of each pixel, with a sum above zero.
    """

    values: Tensor

    def shares(self, rows: Draws, grid: tuple[int, int], cell: tuple[float, float]) -> Tensor:
        """See `Place`; in the dtype of the mask."""
        masks = self.values / self.values.sum(dim=(1, 2), keepdim=True)
        height, width = masks.shape[1:]
        down, across = (
            _between(torch.arange(pixels, dtype=masks.dtype, device=masks.device), size, count, to_edge=True)
            for pixels, size, count in ((height, cell[0], grid[0]), (width, cell[1], grid[1]))
        )
        # pixels of the unperturbed image for each of the row's
        area = torch.linalg.det(rows.matrices[:, :, :2]).abs().to(masks.dtype)
        found, step = [], max(1, _MOST_PIXELS // (height * width))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            moved = warp(of_rows(masks, part)[:, None], part)[:, 0]
            found.append(down.mT @ moved @ across)
        return torch.cat(found) * area[:, None, None]


def _between(positions: Tensor, size: float, count: int, *, to_edge: bool) -> Tensor:
    """Return the bilinear shares (..., count) of cells of a size at positions (...), in pixels along one axis."""
    at = (positions + 0.5) / size - 0.5
    inside = (at >= -0.5) & (at <= count - 0.5)
    if to_edge:
        at = at.clamp(0, count - 1)
    centres = torch.arange(count, dtype=at.dtype, device=at.device)
    shares = (1 - (at[..., None] - centres).abs()).clamp_min(0)
    return shares * inside[..., None] if to_edge else shares


def of_rows(values: Tensor, rows: Draws) -> Tensor:
    """Return the values of each row's image, (R, ...), from (B, ...), or from (1, ...) for all images."""
    return values.expand(len(rows), *values.shape[1:]) if len(values) == 1 else values[rows.image_index]


def moved_boxes(boxes: Tensor, rows: Draws, size: Sequence[int]) -> Tensor:
    """Return where each row shows a box, (R, 4): the box around the ellipse that the box's own becomes, in the frame.

    A box's own ellipse is the one that touches its sides. A rotated object fills the box around the rotated ellipse
    more nearly than that around the four rotated corners, which grows however round the object is.

    Args:
        boxes: (R, 4), left, top, right and bottom edges in pixels; the first pixel's are 0 and 1.
        rows: the draws of the R rows.
        size: (H, W) of the images.

    Returns:
        (R, 4), as boxes; where right is not beyond left, or bottom beyond top, nothing of the box is in the frame.
    """
    moved = pull_back.inverse(rows.matrices).to(boxes.dtype)
    # positions of the warp are those of pixel centres
    centres, halves = (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5, (boxes[:, 2:] - boxes[:, :2]) / 2
    linear, offset = moved[:, :, :2], moved[:, :, 2]
    centres = (linear * centres[:, None]).sum(-1) + offset + 0.5
    halves = (linear * halves[:, None]).square().sum(-1).sqrt()
    edges = ((axis, (centres + side * halves)[:, axis]) for side in (-1, 1) for axis in (0, 1))
    return torch.stack([edge.clamp(0, size[1 - axis]) for axis, edge in edges], dim=1)


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Return intersection over union of boxes (..., 4) of `moved_boxes`; 0 where a box is empty."""
    first = torch.maximum(boxes[..., :2], others[..., :2])
    last = torch.minimum(boxes[..., 2:], others[..., 2:])
    both = _area(torch.cat([first, last], dim=-1))
    union = _area(boxes) + _area(others) - both
    return torch.where(both > 0, both / union, 0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)
