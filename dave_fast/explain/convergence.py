"""Estimate the error of a map from its own samples.

The error of a map m_S of S samples is its relative L2 distance to its limit, ‖m_S − m_∞‖ / ‖m_∞‖. A median, a ReLU and
a division by the maximum stand between samples and map, so that no formula gives it from per-pixel variances. Instead
the samples are split into two halves, and a map is made of each, A and B:

    ê² = ½·(‖A − m_S‖² + ‖B − m_S‖²) / ‖m_S‖²

For a plain mean of independent samples the distance between half the samples and all of them has the variance of the
distance between all of them and the limit, 1/(S/2) − 1/S = 1/S. By the parallelogram law ê² also contains the squared
bias between S/2 and S, ‖m_S − ½(A + B)‖², which the difference of two halves would not. The halves are of consecutive
samples: in the van der Corput schedule every run of consecutive samples has noise levels from the whole range, whereas
every second sample has not.

The bound is factor(S)·ê, the factor being the 0.9 quantile of error/ê over scenes of the demo model, for shrunk maps
and for the paper's (`benchmarks/convergence.py`, with the validation on other scenes beside it in benchmarks/results),
and for maps of the tokens that enter a block (`benchmarks/convergence_depth.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from dave_fast.engine.levels import Place
    from dave_fast.explain.explainer import DAVE

# Returns raw, maps, and signed maps where these are wanted, of the samples of a slice.
Aggregate = Callable[[slice], tuple[Tensor, ...]]

# The 0.9 quantile of error/ê by S, of shrunk maps (True) and of the paper's. It is interpolated linearly in log S, and
# constant after the last S. Halves are shrunk more than the map of all samples, and so tell less of its error.
FACTORS = {
    True: {8: 1.32, 16: 1.42, 32: 1.47, 64: 1.54, 128: 1.50, 256: 1.45},
    False: {8: 1.37, 16: 1.35, 32: 1.33, 64: 1.40, 128: 1.38, 256: 1.34},
}
# The same at blocks, where the bounds of the factors above held for 77 to 92 % of the maps.
BLOCK_FACTORS = {
    True: {8: 1.39, 16: 1.47, 32: 1.65, 64: 1.76},
    False: {8: 1.34, 16: 1.41, 32: 1.48, 64: 1.69},
}
# fewer samples have no bound
FEWEST = 8


@dataclass(frozen=True)
class Refined:
    """Maps of one image and K classes from its first S samples, and their estimated errors.

    Attributes:
        maps: (K, H, W) float32, of several depths (K, L, H, W).
        raw: (K, C, H, W) float32, of several depths (K, L, C, H, W).
        samples: S.
        errors: the estimate ê of each map, class by class, and of a class depth by depth.
        bounds: an upper bound of each error that holds with a probability of 0.9; infinity below eight samples.
        shrink: whether the maps are shrunk (see `dave_fast.DAVE`).
        signed: maps before negative values are cut off, of the shape of maps (see `Explanation`); None where not made.
    """

    maps: Tensor
    raw: Tensor
    samples: int
    errors: list[float]
    bounds: list[float]
    shrink: bool
    signed: Tensor | None = None

    @property
    def bound(self) -> float:
        """The largest of the bounds."""
        return max(self.bounds)


def refine(explainer: DAVE, contributions: Tensor, *, shrink: bool | None = None) -> Refined:
    """Make maps and estimate their errors.

    The maps of both halves of the samples are shrunk where that of all is, each by its own variance.

    Args:
        explainer: which the contributions are of.
        contributions: (K, S, C, H, W) of K classes and S samples.
        shrink: whether the maps are shrunk; None takes the explainer's setting.
    """
    shrink = explainer.shrink if shrink is None else shrink
    return refined(
        lambda some: explainer.aggregate(contributions[:, some], shrink=shrink), contributions.shape[1], shrink=shrink
    )


def refined(aggregate: Aggregate, samples: int, *, shrink: bool, places: Sequence[Place] = (None,)) -> Refined:
    """Make maps of all samples, and of their halves for the errors.

    Args:
        aggregate: returns raw (K, C, H, W) and maps (K, H, W) of a slice of the samples, or both with a dimension of
            depths after K; and signed maps of the shape of maps, where they are wanted.
        samples: S.
        shrink: whether these maps are shrunk.
        places: the depths of the maps of each class, blocks and pixels.
    """
    raw, maps, *others = aggregate(slice(samples))
    half, each = samples // 2, maps.flatten(end_dim=-3)
    errors = [math.inf] * len(each)
    if half > 0:
        # Of an odd number of samples the last one is in neither half.
        halves = [aggregate(slice(start, start + half))[1].flatten(end_dim=-3) for start in (0, half)]
        errors = estimate(each, *halves)
    factors = [factor(samples, shrink=shrink, block=place is not None) for place in places]
    bounds = [each * error for each, error in zip(cycle(factors), errors, strict=False)]
    made, of_channels, *signed = (each.float().cpu() for each in (maps, raw, *others))
    return Refined(made, of_channels, samples, errors, bounds, shrink, *signed)


def joined(parts: Sequence[Refined]) -> Refined:
    """Return the maps of classes that were made one by one, from the same samples."""
    first = parts[0]
    return Refined(
        maps=torch.cat([part.maps for part in parts]),
        raw=torch.cat([part.raw for part in parts]),
        samples=first.samples,
        errors=[error for part in parts for error in part.errors],
        bounds=[bound for part in parts for bound in part.bounds],
        shrink=first.shrink,
        signed=None if first.signed is None else torch.cat([part.signed for part in parts if part.signed is not None]),
    )


def estimate(maps: Tensor, first: Tensor, second: Tensor) -> list[float]:
    """Return ê of maps (K, H, W), given the maps of both halves of their samples; infinity for a map of zeros."""
    distance = (_squares(first - maps) + _squares(second - maps)) / 2
    return [math.sqrt(d / n) if n > 0 else math.inf for d, n in zip(distance.tolist(), _squares(maps), strict=True)]


def relative_distance(maps: Tensor, limit: Tensor) -> list[float]:
    """Return the error ‖m − m_∞‖ / ‖m_∞‖ of maps (K, H, W), given their limit."""
    return (_squares(maps - limit) / _squares(limit)).sqrt().tolist()


def factor(samples: int, *, shrink: bool, block: bool = False) -> float:
    """Return the factor that makes ê a bound with probability 0.9; infinity for fewer samples than `FEWEST`.

    Args:
        samples: S.
        shrink: whether the maps are shrunk.
        block: whether the maps are of tokens that enter a block.
    """
    if samples < FEWEST:
        return math.inf
    known = (BLOCK_FACTORS if block else FACTORS)[shrink]
    return float(np.interp(math.log(samples), np.log(list(known)), list(known.values())))


def checkpoints(n_samples: int) -> list[int]:
    """Return the numbers of samples at which a map is made on the way: 1, 2, 3, 4, 6, 8, 12, 16, 24 … and the last."""
    powers = [2**exponent for exponent in range(n_samples.bit_length())]
    return sorted({n_samples, *(size for power in powers for size in (power, power * 3 // 2) if size < n_samples)})


def _squares(maps: Tensor) -> Tensor:
    return maps.double().square().sum(dim=(-2, -1)).cpu()
