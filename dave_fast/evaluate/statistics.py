"""From a score an image to what can be said: means with intervals, paired differences, verdicts.

Intervals hold 95 %. Over images: percentile bootstrap, images drawn with replacement. Over seeds: Student's t on the
means of the same images under each seed. A verdict compares DAVE with each baseline in two ways: whether their
intervals touch, and whether the interval of the paired difference, on the images that both scored, holds zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BOOTSTRAPS, LEVEL = 2000, 0.95
# below this many images the bootstrap says nothing
FEWEST = 5
# Student's t at 97.5 % for 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T_QUANTILES) + 1


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval, and how many images are behind it; NaN where none are."""

    mean: float
    low: float
    high: float
    n: int

    def touches(self, other: Interval) -> bool:
        """Whether two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def over_images(scores: ArrayLike) -> Interval:
    """Mean score of images and its bootstrap interval; NaN scores are left out."""
    values = np.asarray(scores, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, 0)
    picks = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired(scores: ArrayLike, others: ArrayLike) -> Interval:
    """Mean difference scores − others over the images that have both. Raises ValueError for different lengths."""
    ours, theirs = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} scores are not of the same images.")
    return over_images(ours - theirs)


def over_seeds(means: ArrayLike) -> Interval:
    """Mean over 2 to 10 seeds, each of them the mean score of the same images, and its t interval; n counts seeds."""
    values = np.asarray(means, np.float64)
    half = T_QUANTILES[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values))


@dataclass(frozen=True)
class Verdict:
    """DAVE against the baseline that comes nearest to it, or is ahead most.

    difference: DAVE − baseline in the direction that is better, paired. apart: intervals do not touch any baseline's.
    """

    dave: Interval
    rival: str
    other: Interval
    difference: Interval
    apart: bool

    @property
    def words(self) -> str:
        """The verdict in words."""
        better = self.difference
        if better.n < FEWEST:
            return f"too few images to tell ({better.n})"
        if better.low > 0:
            touching = "intervals apart" if self.apart else "intervals touch; ahead image by image"
            return f"ahead of every baseline; {touching}"
        if better.high < 0:
            return f"behind {self.rival}"
        return f"not told apart from {self.rival}"


def verdict(scores: Mapping[str, ArrayLike], higher: bool, dave: str = "DAVE") -> Verdict | None:
    """DAVE against its strongest rival in one metric; None where there is nothing to compare.

    scores: by method, of the same images. The strongest rival is one that is ahead, else the nearest.
    """
    sign = 1 if higher else -1
    signed = {name: sign * np.asarray(values, np.float64) for name, values in scores.items()}
    differences = {name: paired(signed[dave], values) for name, values in signed.items() if name != dave}
    differences = {name: found for name, found in differences.items() if found.n}
    if not differences:
        return None
    rival = min(differences, key=lambda name: (differences[name].high >= 0, differences[name].low))
    own = over_images(scores[dave])
    others = {name: over_images(scores[name]) for name in differences}
    return Verdict(own, rival, others[rival], differences[rival], not any(own.touches(o) for o in others.values()))
