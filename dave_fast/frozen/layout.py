"""The layout of tokens, measured: where in the image each of them lies.

It is measured on small changes of an image: noise, and the same noise times the vertical and the horizontal position of
each pixel. Compared with the first, the other two tell the centre of the pixels that a token depends on, with the
weights of their influence. The tokens are those of a grid where each of its cells holds the centre of exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# changes of the image: how many kinds of noise, and their size; far above the rounding of casts to float32 in a model
_NOISES, _STEP = 2, 1e-3
# images of a measurement
ROWS = 3 * _NOISES + 1
# a token that changes less than this, relative to the median of all, does not depend on the image
_STILL = 1e-2
# largest distance of a token's centre from that of its cell, least distance of the means of two rows, in cells: the
# margin cuts off what convolutions see, which moves centres inwards, and strides move all of them
_FAR, _APART_MEANS = 1.5, 0.25


@dataclass(frozen=True)
class Layout:
    """The layout of a tensor of tokens.

    Attributes:
        batch: its axis of rows.
        channels: its axis of channels; the others, in their order, are tokens.
        prefix: how many tokens have no place in the image, such as a class token.
        grid: (h, w) of the others, the patch tokens; it divides the image.
        order: the places (N,) of the prefix tokens, then of the patch tokens, row by row; None where it is their order.
    """

    batch: int
    channels: int
    prefix: int
    grid: tuple[int, int]
    order: tuple[int, ...] | None


def _positions(count: int) -> Tensor:
    """Return the centres (count,) of equal parts of the interval from −1 to 1."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (2 / count) - 1


def changes(image: Tensor) -> Tensor:
    """Return an image (1, C, H, W), then its changes: noise, noise ⊙ y and noise ⊙ x for each kind of noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISES, 1, *image.shape[1:], generator=generator, dtype=torch.float64).to(image.device)
    height, width = (_positions(size).to(image.device) for size in image.shape[-2:])
    steps = torch.cat([noise, noise * height[:, None], noise * width], dim=1).flatten(0, 1)
    return torch.cat([image, image + _STEP * steps])


def layout_of(tensor: Tensor, size: Sequence[int], known: dict[int, Tensor]) -> Layout | None:
    """Return the layout of a tensor of tokens; None where they are not those of a grid that divides the image.

    Args:
        tensor: of a forward pass on `changes(image)`, float64.
        size: (H, W) of the image.
        known: by the number of tokens, which of them (N,) are prefix tokens; a new number is entered. The same number
            behind a block keeps its prefix tokens, which then depend on the image a little.
    """
    if tensor.dim() not in (3, 4):
        return None
    axes = [(batch, channels) for batch in range(tensor.dim()) for channels in (tensor.dim() - 1, 1, 0)]
    for batch, channels in dict.fromkeys(axes):
        if tensor.shape[batch] == ROWS and batch != channels:
            tokens = tensor.movedim((batch, channels), (0, -1)).cpu()
            found = _placed(tokens.flatten(1, -2), tokens.shape[1:-1], size, known)
            if found is not None:
                return Layout(batch, channels, *found)
    return None


def _placed(
    tokens: Tensor, places: Sequence[int], size: Sequence[int], known: dict[int, Tensor]
) -> tuple[int, tuple[int, int], tuple[int, ...] | None] | None:
    """Return prefix, grid and order, as of a `Layout`, of tokens (ROWS, N, D) that lie on (N,) or (h, w) places."""
    change = (tokens[1:] - tokens[:1]).unflatten(0, (_NOISES, 3))
    # (3, N): the energy of the first change, and its products with the two others, whose ratios to it are y and x
    sums = (change * change[:, :1]).sum(dim=(0, 3))
    energy, count = sums[0], tokens.shape[1]
    prefix = known.get(count, energy <= _STILL**2 * energy[energy > 0].median())
    patches = (~prefix).nonzero()[:, 0]
    centres = sums[1:, patches] / energy[patches]
    for grid in _grids(len(patches), size):
        cells = _cells(centres, grid) if len(places) == 1 or grid == tuple(places) else None
        if cells is not None:
            known[count] = prefix
            order = (*prefix.nonzero()[:, 0].tolist(), *patches[cells.argsort()].tolist())
            return count - len(patches), grid, None if order == tuple(range(count)) else order
    return None


def _grids(count: int, size: Sequence[int]) -> list[tuple[int, int]]:
    """Return the grids (h, w) of so many cells that divide images (H, W), those of the squarest cells first."""
    height, width = size
    grids = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    grids = [(h, w) for h, w in grids if height % h == 0 and width % w == 0 and h * w < height * width]

    def stretch(grid: tuple[int, int]) -> float:
        across, down = width * grid[0], height * grid[1]
        return max(across, down) / min(across, down)

    return sorted(grids, key=stretch)


def _cells(centres: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Return the cells (n,) of a grid in which the centres (2, n) in y and x lie; None unless each cell has one."""
    own = torch.arange(centres.shape[1])
    if _row_by_row(centres, grid):
        return own
    rows, columns = (_along(found, count) for found, count in zip(centres, grid, strict=True))
    cells = rows * grid[1] + columns
    parts = rows, columns
    near = all(_near(found, part, count) for found, part, count in zip(centres, parts, grid, strict=True))
    return cells if near and torch.equal(cells.sort().values, own) else None


def _row_by_row(centres: Tensor, grid: tuple[int, int]) -> bool:
    """Return whether the cells are in order: judged by means of rows and columns, since single centres are noisy."""
    for axis, count in enumerate(grid):
        found = centres[axis].unflatten(0, grid)
        means, places = found.mean(1 - axis), torch.arange(count)
        part = places[:, None].expand(grid) if axis == 0 else places.expand(grid)
        if not (_near(found, part, count) and (means.diff() >= _APART_MEANS * 2 / count).all()):
            return False
    return True


def _near(found: Tensor, parts: Tensor, count: int) -> bool:
    """Return whether all centres along an axis are close to those of their parts of the axis."""
    return bool(((found - _positions(count)[parts]).abs() <= _FAR * 2 / count).all())


def _along(found: Tensor, count: int) -> Tensor:
    """Return the parts (n,) of an axis in which centres (n,) lie, but for a common shift and scale of the centres."""
    expected = _positions(count).repeat_interleave(len(found) // count)
    shift, spread = found.mean(), expected.square().sum()
    scale = 1 if count == 1 else ((found.sort().values - shift) * expected).sum() / spread
    return (((found - shift) / scale + 1) * count / 2).nan_to_num().floor().long().clamp(0, count - 1)
