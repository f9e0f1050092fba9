"""The pointing games: where an attribution lies. Only positive values count, as in the sources.

Sum a signed attribution (B, C, H, W) over its channels first.

Sources
  pointing game         Zhang et al., Top-down neural attention by excitation backprop, IJCV 2018; tolerance 0
  energy pointing game  Wang et al., Score-CAM, CVPRW 2020; positive part and masks as Rao et al., ICCV 2023
  grid pointing game    Böhle et al., B-cos networks, CVPR 2022, and Convolutional dynamic alignment networks, CVPR 2021

Quantus 0.6 differs: `RelevanceMassAccuracy` is the energy pointing game of non-negative maps only (it sums signed
values); `PointingGame` counts an image with an empty mask as a hit (it writes NaN into booleans) and one tied maximum
inside as a whole hit; `Focus` is not the grid pointing game (two of its tiles show the class).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dave_fast.errors import InputError


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of the positive attribution that lies inside the object (EnergyPG).

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool, or weights in [0, 1] for soft masks.

    Returns:
        (B,) float64 in [0, 1]: 0 for a map without positive values, NaN for an empty mask, 1 for a full one.

    Raises:
        InputError: the shapes differ.
    """
    same_shape(maps, masks)
    masks = masks.to(torch.float64)
    share = _share(_positive(maps), masks)
    return share.masked_fill(masks.flatten(1).sum(1) == 0, torch.nan)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Return whether the largest value lies inside the object.

    If several pixels share the maximum, the score is the share of them inside, the expectation over a random choice;
    so a constant positive map scores the mask's area.

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1]: 0 for a map without positive values, NaN for an empty mask.

    Raises:
        InputError: the shapes differ.
    """
    same_shape(maps, masks)
    flat = maps.flatten(1)
    highest = flat.amax(dim=1, keepdim=True)
    # NaN never compares equal, so a map with NaN has no maximum and its share is 0/0 = NaN
    top = (flat == highest).to(torch.float64)
    inside = (top * masks.flatten(1)).sum(1) / top.sum(1)
    inside = inside.masked_fill(highest[:, 0] <= 0, 0.0)
    return inside.masked_fill(~masks.flatten(1).any(1), torch.nan)


def grid_pointing_game(maps: Tensor, cells: Tensor, grid: int) -> Tensor:
    """Return the share of the positive attribution that lies in the right cell of a mosaic (GridPG).

    Chance is 1 / grid². If `grid` does not divide H or W, a pixel on the line between two cells counts for each by its
    share of the pixel's area.

    Args:
        maps: (n, H, W), each of the class of one cell.
        cells: (n,) int64, that cell, row-major in the grid.
        grid: cells along each side.

    Returns:
        (n,) float64 in [0, 1]: 0 for a map without positive values.

    Raises:
        InputError: the shapes do not fit, or a cell is outside of the grid.
    """
    if maps.ndim != 3 or cells.shape != maps.shape[:1]:
        raise InputError(f"maps {tuple(maps.shape)} and cells {tuple(cells.shape)}: expected (n, H, W) and (n,).")
    if cells.numel() and not 0 <= int(cells.min()) <= int(cells.max()) < grid**2:
        raise InputError(f"cells are {cells.tolist()[:8]} ...; expected 0 to {grid**2 - 1} for grid={grid}.")
    rows = _cell_overlap(maps.shape[1], grid).to(maps.device)[cells // grid]
    columns = _cell_overlap(maps.shape[2], grid).to(maps.device)[cells % grid]
    return _share(_positive(maps), rows[:, :, None] * columns[:, None, :])


def build_mosaics(tiles: Tensor, *, rescale: bool = False) -> Tensor:
    """Arrange images in square grids for GridPG.

    Args:
        tiles: (m, g², C, H, W), tile k in row k // g, column k % g.
        rescale: whether to shrink the mosaic (bilinear, antialiased) to the size of one tile, for models of a fixed
            input size; otherwise tiles keep their pixels, and a ViT needs its position embedding resampled.

    Returns:
        (m, C, g·H, g·W), or (m, C, H, W) if rescaled.

    Raises:
        InputError: the number of tiles is not a square.
    """
    if tiles.ndim != 5 or round(tiles.shape[1] ** 0.5) ** 2 != tiles.shape[1]:
        raise InputError(f"tiles {tuple(tiles.shape)}: expected (m, g², C, H, W) with a square number of tiles.")
    count, cells, channels, height, width = tiles.shape
    grid = round(cells**0.5)
    tiles = tiles.reshape(count, grid, grid, channels, height, width)
    mosaics = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, grid * height, grid * width)
    if rescale:
        mosaics = F.interpolate(mosaics, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return mosaics


def choose_mosaics(labels: Tensor, confidences: Tensor, grid: int, n_mosaics: int, *, seed: int = 0) -> Tensor:
    """Choose the images of the mosaics of GridPG.

    Each mosaic draws g² classes among those with unused images, and takes the unused image of each with the highest
    confidence (the first of equals). So its classes are distinct, and no image is used twice.

    Args:
        labels: (n,) int64, of images that the model classifies correctly.
        confidences: (n,), the probabilities of their classes.
        grid: g, cells along each side.
        n_mosaics: how many to choose.
        seed: of the draw of classes.

    Returns:
        (n_mosaics, g²) int64 indices of images.

    Raises:
        InputError: there are not enough images.
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


def same_shape(maps: Tensor, others: Tensor) -> None:
    """Raise InputError if two batches of maps differ in shape."""
    if maps.shape != others.shape:
        raise InputError(f"shapes {tuple(maps.shape)} and {tuple(others.shape)} differ; expected equal (B, H, W).")


def _positive(maps: Tensor) -> Tensor:
    return maps.to(torch.float64).clamp(min=0)


def _share(positive: Tensor, weights: Tensor) -> Tensor:
    """Return Σ weights · positive / Σ positive over the pixels, (B,) float64; 0 for a map without positive values."""
    total = positive.flatten(1).sum(1)
    return ((positive * weights).flatten(1).sum(1) / total).masked_fill(total == 0, 0.0)


def _cell_overlap(size: int, grid: int) -> Tensor:
    """Return the length of pixel p = [p, p + 1] inside cell i = [i, i + 1] · size / grid, (grid, size) float64."""
    edges = torch.arange(grid + 1, dtype=torch.float64) * size / grid
    pixels = torch.arange(size, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], pixels)
    high = torch.minimum(edges[1:, None], pixels + 1)
    return (high - low).clamp(min=0)
