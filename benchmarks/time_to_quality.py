"""The time in which a method reaches the quality that another has, from qualities and times at several S.

Quality is the mean score over images; between two measured S it is linear in log S, and seconds are linear in S. An
interval is a 95 % percentile bootstrap: images are drawn with replacement, alike for both methods, and with them one of
the rounds in which both were timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BOOTSTRAPS = 2000
TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Measured:
    """One method at one S.

    Attributes:
        scores: of each image, NaN where an image has none.
        seconds: of one image, in each round.
    """

    scores: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True)
class Reached:
    """The comparison of a method with the quality of another.

    Attributes:
        samples: S from which on the quality is reached; None where it is not reached at any measured S.
        seconds: of an image with that many samples.
        ratio: the other method's seconds over these.
        low: lower end of the interval of the ratio, 0 where the quality is not reached.
        high: upper end.
        share: of the resamples in which the quality is reached.
        at_least: whether it is reached at the smallest measured S already, so that the ratio is a lower bound.
    """

    samples: float | None
    seconds: float | None
    ratio: float | None
    low: float
    high: float
    share: float
    at_least: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def samples_needed(samples: Sequence[int], quality: Sequence[float], wanted: float) -> float | None:
    """Return the S from which on a curve stays at or above a wanted quality.

    Args:
        samples: S in ascending order.
        quality: at each S.
        wanted: the quality.

    Returns:
        S; the first where the whole curve is above, and None where its last point is below.
    """
    above = np.asarray(quality) >= wanted
    # NaN is not above
    if not above[-1]:
        return None
    below = np.flatnonzero(~above)
    if not len(below):
        return float(samples[0])
    left = below[-1]
    position = (wanted - quality[left]) / (quality[left + 1] - quality[left])
    return float(np.exp(np.interp(position, [0, 1], np.log([samples[left], samples[left + 1]]))))


def compare(form: Mapping[int, Measured], other: Measured) -> Reached:
    """Compare the time of a method at the quality of another with the other's time.

    Args:
        form: S -> what was measured, in rounds and images that correspond to the other's.
        other: the method whose quality is wanted, at its S.
    """
    samples = sorted(form)
    scores = np.stack([form[s].scores for s in samples])
    seconds = np.stack([form[s].seconds for s in samples])
    known = ~np.isnan(scores).any(0) & ~np.isnan(other.scores)
    scores, wanted = scores[:, known], other.scores[known]

    def ratio(images: np.ndarray, own: np.ndarray, theirs: float) -> tuple[float | None, float, float]:
        needed = samples_needed(samples, scores[:, images].mean(1).tolist(), float(wanted[images].mean()))
        if needed is None:
            return None, np.nan, 0.0
        taken = float(np.interp(needed, samples, own))
        return needed, taken, theirs / taken

    generator = np.random.default_rng(0)
    count = len(wanted)
    drawn = []
    for _ in range(BOOTSTRAPS):
        turn = generator.integers(seconds.shape[1])
        drawn.append(ratio(generator.integers(count, size=count), seconds[:, turn], float(other.seconds[turn]))[2])
    needed, taken, times = ratio(np.arange(count), np.median(seconds, axis=1), float(np.median(other.seconds)))
    low, high = np.quantile(drawn, TAILS)
    share = float(np.mean(np.array(drawn) > 0))
    if needed is None:
        return Reached(None, None, None, float(low), float(high), share, False)
    return Reached(needed, taken, times, float(low), float(high), share, needed == samples[0])


def median_ratio(pairs: Sequence[float]) -> dict[str, Any]:
    """Return the median of ratios that were each taken side by side, and its interval over the pairs."""
    values = np.asarray(pairs, np.float64)
    picks = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), TAILS)
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "pairs": len(values)}
