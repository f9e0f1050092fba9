"""How good is a map: localisation, deletion, stability, patch-grid artefacts. Batched, on any device.

Every score is one number an image, never an average: means and their intervals are the caller's. Scores that
the definition leaves open have a stated value: 0 where a map has no positive value (it points nowhere), NaN where
the question itself is empty (no mask, nothing to compare), to be left out of means. NaN in a map gives NaN.

Maps are (B, H, W), of any float dtype and scale, signed or not; sums are taken in float64. Only their positive part
counts in the pointing games, as in the sources. A signed attribution (B, C, H, W) is summed over channels first.

Sources
  pointing game         Zhang et al., Top-down neural attention by excitation backprop, IJCV 2018; tolerance 0
  energy pointing game  Wang et al., Score-CAM, CVPRW 2020; positive part and masks as Rao et al., ICCV 2023
  grid pointing game    Böhle et al., B-cos networks, CVPR 2022, and Convolutional dynamic alignment networks, CVPR 2021
  deletion              DAVE, arXiv 2602.06613, Fig. 6: least important pixels first, blurred fill
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dave_fast.errors import InputError

# Knuth's multiplicative hash: scatters pixel indices evenly and repeatably.
_SCATTER, _SCATTER_RANGE = 2654435761, 2**32


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive attribution that lies inside the object (EnergyPG): (B,) float64 in [0, 1].

    maps: (B, H, W). masks: (B, H, W) bool, or weights in [0, 1] for soft masks; boxes are masks, too.
    0 for a map without positive values; NaN for an empty mask; 1 for a full one.
    """
    _same_shape(maps, masks)
    masks = masks.to(torch.float64)
    share = _share(_positive(maps), masks)
    return share.masked_fill(masks.flatten(1).sum(1) == 0, torch.nan)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the largest value lies inside the object: (B,) float64 in [0, 1].

    maps: (B, H, W). masks: (B, H, W) bool. Where several pixels share the maximum, the share of them that is inside:
    the expectation over a random choice. So a constant positive map scores the mask's area.
    0 for a map without positive values; NaN for an empty mask.
    """
    _same_shape(maps, masks)
    flat = maps.flatten(1)
    highest = flat.amax(dim=1, keepdim=True)
    # NaN never compares equal, so such a map has no maximum and its share is 0/0
    top = (flat == highest).to(torch.float64)
    inside = (top * masks.flatten(1)).sum(1) / top.sum(1)
    inside = inside.masked_fill(highest[:, 0] <= 0, 0.0)
    return inside.masked_fill(~masks.flatten(1).any(1), torch.nan)


def grid_pointing_game(maps: Tensor, cells: Tensor, grid: int) -> Tensor:
    """Share of the positive attribution that lies in the right cell of a mosaic (GridPG): (R,) float64 in [0, 1].

    maps: (R, H, W), each explaining the class of one cell. cells: (R,) int64, that cell, row-major in the grid.
    grid: cells a side. Chance is 1 / grid². Where grid does not divide H or W, a pixel on the line between two cells
    counts for each by its share of the pixel's area. 0 for a map without positive values.
    """
    if maps.ndim != 3 or cells.shape != maps.shape[:1]:
        raise InputError(f"maps {tuple(maps.shape)} and cells {tuple(cells.shape)}: expected (R, H, W) and (R,).")
    if cells.numel() and not 0 <= int(cells.min()) <= int(cells.max()) < grid**2:
        raise InputError(f"cells must lie in 0..{grid**2 - 1} for grid={grid}; got {cells.tolist()[:8]} ...")
    rows = _cell_overlap(maps.shape[1], grid).to(maps.device)[cells // grid]
    columns = _cell_overlap(maps.shape[2], grid).to(maps.device)[cells % grid]
    return _share(_positive(maps), rows[:, :, None] * columns[:, None, :])


def build_mosaics(tiles: Tensor, *, rescale: bool = False) -> Tensor:
    """Grids of images for GridPG: (M, C, g·H, g·W), or (M, C, H, W) where rescaled.

    tiles: (M, g², C, H, W), tile k in row k // g, column k % g.
    rescale: shrink the mosaic (bilinear, antialiased) to the size of one tile, for models of a fixed input size;
    otherwise tiles keep their pixels, and a ViT needs its position embedding resampled to the larger grid.
    """
    if tiles.ndim != 5 or round(tiles.shape[1] ** 0.5) ** 2 != tiles.shape[1]:
        raise InputError(f"tiles {tuple(tiles.shape)}: expected (M, g², C, H, W) with a square number of tiles.")
    count, cells, channels, height, width = tiles.shape
    grid = round(cells**0.5)
    tiles = tiles.reshape(count, grid, grid, channels, height, width)
    mosaics = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, grid * height, grid * width)
    if rescale:
        mosaics = F.interpolate(mosaics, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return mosaics


def choose_mosaics(labels: Tensor, confidences: Tensor, grid: int, n_mosaics: int, *, seed: int = 0) -> Tensor:
    """Which images make the mosaics of GridPG: (M, g²) int64 indices, distinct classes within a mosaic.

    labels: (n,) int64 and confidences: (n,) of images that the model gets right.
    Each mosaic draws g² classes among those with images left and takes the most confident unused image of each (of
    equals the earlier), so that no image is used twice. Raises InputError where the images do not suffice.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.argsort(confidences, descending=True, stable=True)
    queues = {int(c): order[labels[order] == c].tolist() for c in labels.unique()}
    chosen = []
    for mosaic in range(n_mosaics):
        left = [c for c, queue in queues.items() if queue]
        if len(left) < grid**2:
            raise InputError(f"images suffice for {mosaic} of {n_mosaics} mosaics of {grid}×{grid}; give more images.")
        picked = torch.randperm(len(left), generator=generator)[: grid**2]
        chosen.append([queues[left[i]].pop(0) for i in picked.tolist()])
    return torch.tensor(chosen, dtype=torch.int64).reshape(n_mosaics, grid**2)


def blur(images: Tensor, size: int = 31, sigma: float = 7.0) -> Tensor:
    """Images (B, C, H, W) under a normalised size×size Gaussian; outside counts as 0, a normalised image's mean."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = (window / window.sum()).to(images)
    channels = images.shape[1]
    across = F.conv2d(images, window.expand(channels, 1, 1, size), padding=(0, size // 2), groups=channels)
    return F.conv2d(across, window[:, None].expand(channels, 1, size, 1), padding=(size // 2, 0), groups=channels)


@torch.no_grad()
def deletion_curve(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    order: str = "least",
    fraction: float = 0.9,
    steps: int = 128,
    fill: Tensor | None = None,
    batch_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """The class's probability while pixels are replaced: removed fractions (steps + 1,), curves (B, steps + 1).

    model: images (n, C, H, W) to logits (n, K). images: (B, C, H, W), normalised. maps: (B, H, W). targets: (B,).
    order: "least" important pixels first (a faithful map keeps the probability high), or "most".
    fraction, steps: after step k, round(k · fraction · H·W / steps) pixels are replaced, in all channels.
    fill: (B, C, H, W) what replaces them, by default `blur(images)`.
    Pixels of equal value go in the order of index · 2654435761 mod 2³²: a fixed scatter, so that a flat map deletes
    evenly everywhere. The paper uses images that the model gets right with a probability of 0.9 or more: choose them.
    """
    if order not in ("least", "most"):
        raise InputError(f'order={order!r}: expected "least" or "most".')
    if maps.shape != (images.shape[0], *images.shape[2:]):
        raise InputError(f"maps {tuple(maps.shape)} do not belong to images {tuple(images.shape)}.")
    ranks = _deletion_ranks(maps if order == "least" else -maps)
    fill = blur(images) if fill is None else fill
    counts = [round(k * fraction * ranks[0].numel() / steps) for k in range(steps + 1)]
    curves = torch.empty(len(images), steps + 1, dtype=torch.float64, device=images.device)
    for row in range(len(images)):
        for start in range(0, steps + 1, batch_size):
            removed = torch.tensor(counts[start : start + batch_size], device=images.device)
            gone = ranks[row] < removed[:, None, None]
            altered = torch.where(gone[:, None], fill[row], images[row])
            probabilities = model(altered).double().softmax(dim=-1)
            curves[row, start : start + len(removed)] = probabilities[:, targets[row]]
    return torch.tensor(counts, dtype=torch.float64, device=images.device) / ranks[0].numel(), curves


def deletion_auc(fractions: Tensor, curves: Tensor) -> Tensor:
    """Mean probability along deletion curves (trapezoids over the removed fraction, ÷ its range): (B,) in [0, 1].

    fractions: (n,). curves: (B, n). The authors' script integrates over per cent: 90 times this at fraction = 0.9.
    """
    return torch.trapezoid(curves, fractions, dim=1) / (fractions[-1] - fractions[0])


def correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Pearson correlation over the pixels of two maps: (B,) float64. NaN where one of them is constant.

    maps, others: (B, ...), of equal shape. Stability: the map of x against the map of x + small noise, equal seeds.
    """
    _same_shape(maps, others)
    centred = [m.flatten(1).double() for m in (maps, others)]
    centred = [m - m.mean(1, keepdim=True) for m in centred]
    norms = [m.norm(dim=1) for m in centred]
    # what rounding leaves of a constant map is no signal
    flat = torch.stack([(m.flatten(1) == m.flatten(1)[:, :1]).all(1) for m in (maps, others)]).any(0)
    return ((centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])).masked_fill(flat, torch.nan)


def relative_change(maps: Tensor, others: Tensor) -> Tensor:
    """‖others − maps‖₂ / ‖maps‖₂: (B,) float64. NaN where `maps` is zero. maps, others: (B, ...)."""
    _same_shape(maps, others)
    reference = maps.flatten(1).double()
    norm = reference.norm(dim=1)
    change = (others.flatten(1).double() - reference).norm(dim=1) / norm
    return change.masked_fill(norm == 0, torch.nan)


def border_excess(attributions: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """How much stronger an attribution is along the patch grid than inside the patches: (B,) float64, 0 for no grid.

    attributions: (B, H, W) or (B, C, H, W); |·| is summed over channels. Mean over the pixels that touch a border
    between two patches ÷ mean over the others − 1; the outermost pixels of the image, which border on nothing,
    belong to neither. NaN where the others are all zero or there is no border between patches.
    """
    strength = attributions.double().abs()
    strength = strength.sum(1) if strength.ndim == 4 else strength
    height, width = strength.shape[1:]
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height % ph or width % pw:
        raise InputError(f"patch size {ph}×{pw} does not divide attributions of {height}×{width} pixels.")
    border = _touches_border(height, ph)[:, None] | _touches_border(width, pw)
    border = border[1:-1, 1:-1].to(strength.device)
    inner = strength[:, 1:-1, 1:-1]
    interior = inner[:, ~border].mean(1)
    return (inner[:, border].mean(1) / interior - 1).masked_fill(interior == 0, torch.nan)


def _same_shape(maps: Tensor, others: Tensor) -> None:
    if maps.shape != others.shape:
        raise InputError(f"shapes {tuple(maps.shape)} and {tuple(others.shape)} differ; expected equal (B, H, W).")


def _positive(maps: Tensor) -> Tensor:
    return maps.to(torch.float64).clamp(min=0)


def _share(positive: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · positive / Σ positive over the pixels, 0 where there is nothing positive: (B,) float64."""
    total = positive.flatten(1).sum(1)
    return ((positive * weights).flatten(1).sum(1) / total).masked_fill(total == 0, 0.0)


def _cell_overlap(size: int, grid: int) -> Tensor:
    """Length of pixel p = [p, p + 1] inside cell i = [i, i + 1] · size / grid: (grid, size) float64."""
    edges = torch.arange(grid + 1, dtype=torch.float64) * size / grid
    pixels = torch.arange(size, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], pixels)
    high = torch.minimum(edges[1:, None], pixels + 1)
    return (high - low).clamp(min=0)


def _deletion_ranks(maps: Tensor) -> Tensor:
    """When each pixel goes, 0 first: (B, H, W) int64, ascending in value, ties by the scatter."""
    flat = maps.flatten(1)
    scatter = torch.arange(flat.shape[1], device=maps.device) * _SCATTER % _SCATTER_RANGE
    by_scatter = torch.argsort(scatter)
    order = by_scatter[torch.argsort(flat[:, by_scatter], dim=1, stable=True)]
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(maps.shape)


def _touches_border(size: int, patch: int) -> Tensor:
    """Which of the pixels of one axis lie next to a border between two patches: (size,) bool."""
    place = torch.arange(size)
    after = (place % patch == 0) & (place > 0)
    before = (place % patch == patch - 1) & (place < size - 1)
    return after | before
