"""The layout of tokens, measured: where in the image each of them lies.

It is measured on small changes of two images: noise, and the same noise times the vertical and the horizontal position
of each pixel. Compared with the first, the other two tell the centre of the pixels that a token depends on, with the
weights of their influence. The tokens are those of a grid where each of its cells holds the centre of exactly one. A
model that orders its tokens by what they hold orders those of the two images differently, and has no such grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# size of the changes: far above the rounding of casts to float32 in a model
_STEP = 1e-3
# images of a measurement: two, each followed by its three changes
ROWS = 8
# a token that changes less than this, relative to the median of all, does not depend on the image
_STILL = 1e-2
# in cells, the largest distance of a token's centre from that of its cell but for a common shift and scale, the largest
# shift, and the least distance of the means of two rows; convolutions shift centres by their strides, and scale them,
# since the margin cuts off what they see
_FAR, _SHIFT, _APART, _LEAST_SCALE = 1.5, 0.6, 0.25, 0.6


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
    """Return (ROWS, C, H, W): an image (1, C, H, W), then it plus noise, noise ⊙ y and noise ⊙ x; another likewise."""
    # of another sign, size and order of pixels
    images = torch.stack([image, -0.5 * image.flip(-1)])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64).to(image.device)
    height, width = (_positions(size).to(image.device) for size in image.shape[-2:])
    steps = torch.cat([torch.zeros_like(noise), noise, noise * height[:, None], noise * width], dim=1)
    return (images + _STEP * steps).flatten(0, 1)


def layout_of(tensor: Tensor, size: Sequence[int], known: dict[int, Layout]) -> Layout | None:
    """Return the layout of a tensor of tokens; None where they are not those of a grid that divides the image.

    Args:
        tensor: of a forward pass on `changes(image)`, float64.
        size: (H, W) of the image.
        known: layouts of tensors that were met before, by the number of tokens; a new one is entered. It says which
            tokens are prefix tokens, since these depend on the image a little behind a block, and is tried first.
    """
    if tensor.dim() not in (3, 4):
        return None
    axes = [(batch, channels) for batch in range(tensor.dim()) for channels in (tensor.dim() - 1, 1, 0)]
    for batch, channels in dict.fromkeys(axes):
        if tensor.shape[batch] == ROWS and batch != channels:
            tokens = tensor.movedim((batch, channels), (0, -1)).cpu()
            found = _placed(tokens.flatten(1, -2), tokens.shape[1:-1], size, known.get(tokens[0, ..., 0].numel()))
            if found is not None:
                layout = Layout(batch, channels, *found)
                return known.setdefault(tokens[0, ..., 0].numel(), layout) and layout
    return None


def _placed(
    tokens: Tensor, places: Sequence[int], size: Sequence[int], known: Layout | None
) -> tuple[int, tuple[int, int], tuple[int, ...] | None] | None:
    """Return prefix, grid and order, as of a `Layout`, of tokens (ROWS, N, D) that lie on (N,) or (h, w) places."""
    images = tokens.unflatten(0, (2, 4))
    change = images[:, 1:] - images[:, :1]
    # (3, N): the energy of the first change, and its products with the two others, whose ratios to it are y and x
    sums = (change * change[:, :1]).sum(dim=(0, 3))
    energy, own = sums[0], torch.arange(tokens.shape[1])
    if known is None:
        still = energy <= _STILL**2 * energy[energy > 0].median()
        prefix, patches = own[still], own[~still]
    else:
        order = own if known.order is None else torch.tensor(known.order)
        prefix, patches = order[: known.prefix], order[known.prefix :]
    centres = sums[1:, patches] / energy[patches]
    for grid in _grids(len(patches), size):
        cells = _cells(centres, grid, known is not None or len(places) == 2)
        if cells is not None and (len(places) == 1 or grid == tuple(places)):
            order = torch.cat([prefix, patches[cells.argsort()]])
            return len(prefix), grid, None if torch.equal(order, own) else tuple(order.tolist())
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


def _cells(centres: Tensor, grid: tuple[int, int], ordered: bool) -> Tensor | None:
    """Return the cells (n,) of a grid in which the centres (2, n) in y and x lie; None unless each cell has one.

    Args:
        centres: of the tokens.
        grid: (h, w).
        ordered: whether they are most likely row by row, which is then tried first. Tokens of any order are told by
            single centres, which are noisier than means of rows.
    """
    tried = (_row_by_row, _one_by_one)[:: 1 if ordered else -1]
    return next((cells for find in tried if (cells := find(centres, grid)) is not None), None)


def _one_by_one(centres: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Return the cells of tokens of any order: each centre in another cell."""
    parts = [_along(found, count) for found, count in zip(centres, grid, strict=True)]
    cells = parts[0] * grid[1] + parts[1]
    near = all(_near(found, part, count) for found, part, count in zip(centres, parts, grid, strict=True))
    return cells if near and torch.equal(cells.sort().values, torch.arange(len(cells))) else None


def _row_by_row(centres: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Return the cells of tokens in order: the means of rows and of columns increase."""
    for axis, count in enumerate(grid):
        found, part = centres[axis].unflatten(0, grid), torch.arange(count)
        steps = found.mean(1 - axis).diff()
        part = part[:, None].expand(grid) if axis == 0 else part.expand(grid)
        if not _near(found, part, count) or not (steps >= _APART * 2 / count).all():
            return None
    return torch.arange(centres.shape[1])


def _near(found: Tensor, parts: Tensor, count: int) -> bool:
    """Return whether all centres along an axis are close to those of their parts, but for a common shift and scale."""
    expected = _positions(count)[parts]
    centred, shift = expected - expected.mean(), found.mean() - expected.mean()
    scale = ((found * centred).sum() / centred.square().sum()) if count > 1 else 1
    apart = (found - found.mean() - scale * centred).abs().max()
    return bool(apart <= _FAR * 2 / count and abs(shift) <= _SHIFT * 2 / count and scale >= _LEAST_SCALE)


def _along(found: Tensor, count: int) -> Tensor:
    """Return the parts (n,) of an axis in which centres (n,) lie, but for a common shift and scale of the centres."""
    expected = _positions(count).repeat_interleave(len(found) // count)
    shift, spread = found.mean(), expected.square().sum()
    scale = 1 if count == 1 else ((found.sort().values - shift) * expected).sum() / spread
    return (((found - shift) / scale + 1) * count / 2).nan_to_num().floor().long().clamp(0, count - 1)
