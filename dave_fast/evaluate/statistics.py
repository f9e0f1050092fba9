"""Statistics of scores, one number for each image: means with intervals, paired differences, verdicts.

Intervals are 95 % intervals. Over images: percentile bootstrap, images drawn with replacement. Over seeds: Student's t
on the means of the same images under each seed. A verdict compares DAVE with each baseline in two ways: whether their
intervals overlap, and whether the interval of the paired difference, on the images that both scored, contains zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# the method that verdicts are about
DAVE = "DAVE"
BOOTSTRAPS, LEVEL = 2000, 0.95
# below this many images the bootstrap interval is too narrow to be trusted
FEWEST = 5
# Student's t at 97.5 % for 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T_QUANTILES) + 1


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: NaN without images.
        low: lower end of the interval.
        high: upper end of the interval.
        n: how many images or seeds the mean is of.
    """

    mean: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 3) -> str:
        """Return the mean and the interval as text."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"

    def signed(self) -> str:
        """Return a difference and its interval as text, with signs."""
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def touches(self, other: Interval) -> bool:
        """Return whether two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def over_images(scores: ArrayLike) -> Interval:
    """Return the mean score of images and its bootstrap interval; NaN scores are left out."""
    values = np.asarray(scores, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, 0)
    picks = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired(scores: ArrayLike, others: ArrayLike) -> Interval:
    """Return the mean difference scores − others over the images that have both.

    Raises:
        ValueError: the lengths differ.
    """
    ours, theirs = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} scores are not of the same images; give one score of each method an image."
        )
    return over_images(ours - theirs)


def over_seeds(means: ArrayLike) -> Interval:
    """Return the mean over 2 to 10 seeds, each the mean score of the same images, and its t interval."""
    values = np.asarray(means, np.float64)
    half = T_QUANTILES[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values))


@dataclass(frozen=True)
class Verdict:
    """DAVE compared with its strongest rival, the baseline that is furthest ahead of it or else the nearest behind.

    Attributes:
        dave: mean of DAVE.
        rival: name of the baseline.
        other: mean of the baseline.
        difference: paired difference, positive where DAVE is better.
        apart: whether DAVE's interval overlaps no baseline's.
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
        return f"behind {self.rival}" if better.high < 0 else f"not told apart from {self.rival}"

    @property
    def tone(self) -> str:
        """One of "ahead", "behind" and "even", each of which the page gives a colour."""
        return next((tone for tone in ("ahead", "behind") if self.words.startswith(tone)), "even")


def verdict(scores: Mapping[str, ArrayLike], higher: bool) -> Verdict | None:
    """Compare DAVE with its strongest rival in one metric.

    Args:
        scores: method -> scores of the same images; DAVE's is there.
        higher: whether more is better.

    Returns:
        The verdict, or None if no baseline has a score in common with DAVE.
    """
    sign = 1 if higher else -1
    signed = {name: sign * np.asarray(values, np.float64) for name, values in scores.items()}
    differences = {name: paired(signed[DAVE], values) for name, values in signed.items() if name != DAVE}
    differences = {name: found for name, found in differences.items() if found.n}
    if not differences:
        return None
    rival = min(differences, key=lambda name: (differences[name].high >= 0, differences[name].low))
    own = over_images(scores[DAVE])
    others = {name: over_images(scores[name]) for name in differences}
    return Verdict(own, rival, others[rival], differences[rival], not any(own.touches(o) for o in others.values()))
