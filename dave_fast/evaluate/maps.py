"""From an attribution to the maps that are scored."""

from __future__ import annotations

from torch import Tensor

from dave_fast.evaluate.settings import VARIANTS
from dave_fast.ops.smooth import smooth


def as_maps(raw: Tensor) -> dict[str, Tensor]:
    """An attribution (n, C, H, W) as maps (n, H, W): as it is (signed sum over channels), and smoothed."""
    return {VARIANTS[0]: raw.sum(1), VARIANTS[1]: smooth(raw)}
