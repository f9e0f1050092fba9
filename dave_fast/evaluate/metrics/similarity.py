"""Similarity of maps (under noise, of two classes, of a randomised model), and artefacts along patch borders."""

from __future__ import annotations

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate.metrics.localisation import same_shape


def correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Return the Pearson correlation over the pixels of two maps.

    Stability is that of the maps of x and of x + small noise, with equal seeds.

    Args:
        maps: (B, ...).
        others: (B, ...), of equal shape.

    Returns:
        (B,) float64, NaN if one of the maps is constant.

    Raises:
        InputError: the shapes differ.
    """
    same_shape(maps, others)
    centred = [m.flatten(1).double() for m in (maps, others)]
    centred = [m - m.mean(1, keepdim=True) for m in centred]
    norms = [m.norm(dim=1) for m in centred]
    # rounding leaves a constant map with a norm above zero, which is no signal
    flat = torch.stack([(m.flatten(1) == m.flatten(1)[:, :1]).all(1) for m in (maps, others)]).any(0)
    return ((centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])).masked_fill(flat, torch.nan)


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Return the Spearman correlation over the pixels of two maps; ties get their mean rank.

    Parameter randomisation (Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018) is that of the maps of a
    model and of a copy with random weights. Arguments and result are those of `correlation`.
    """
    same_shape(maps, others)
    return correlation(_mean_ranks(maps), _mean_ranks(others))


def relative_change(maps: Tensor, others: Tensor) -> Tensor:
    """Return ‖others − maps‖₂ / ‖maps‖₂ of maps (B, ...), (B,) float64; NaN if `maps` is zero."""
    same_shape(maps, others)
    reference = maps.flatten(1).double()
    norm = reference.norm(dim=1)
    change = (others.flatten(1).double() - reference).norm(dim=1) / norm
    return change.masked_fill(norm == 0, torch.nan)


def border_excess(attributions: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Return how much stronger an attribution is along the patch grid than inside the patches.

    It is the mean of |attribution| over the pixels that touch a border between two patches, divided by the mean over
    the others, minus 1. The outermost pixels of the image are left out of both.

    Args:
        attributions: (B, H, W), or (B, C, H, W), whose |·| is summed over channels.
        patch_size: in pixels, or (height, width).

    Returns:
        (B,) float64: 0 for no grid, NaN if the other pixels are all zero or no two patches share a border.

    Raises:
        InputError: the patches do not divide the image.
    """
    strength = attributions.double().abs()
    strength = strength.sum(1) if strength.ndim == 4 else strength
    height, width = strength.shape[1:]
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height % ph or width % pw:
        raise InputError(
            f"patches of {ph}×{pw} pixels do not divide attributions of {height}×{width}; give the model's patch size."
        )
    border = _touches_border(height, ph)[:, None] | _touches_border(width, pw)
    border = border[1:-1, 1:-1].to(strength.device)
    inner = strength[:, 1:-1, 1:-1]
    interior = inner[:, ~border].mean(1)
    return (inner[:, border].mean(1) / interior - 1).masked_fill(interior == 0, torch.nan)


def _mean_ranks(maps: Tensor) -> Tensor:
    """Return the ranks of the values of each map, (B, pixels) float64; ties get their mean rank, NaN stays NaN."""
    flat = maps.flatten(1).double()
    ordered = flat.sort(dim=1).values
    below = torch.searchsorted(ordered, flat, side="left")
    upto = torch.searchsorted(ordered, flat, side="right")
    return ((below + upto).double() / 2).masked_fill(flat.isnan(), torch.nan)


def _touches_border(size: int, patch: int) -> Tensor:
    """Return which pixels of one axis lie next to a border between two patches, (size,) bool."""
    place = torch.arange(size)
    after = (place % patch == 0) & (place > 0)
    before = (place % patch == patch - 1) & (place < size - 1)
    return after | before
