"""The noise level of a model: the authors' where they tuned one, else one by the scale of the model's pixels.

A sample is (1 − t)·τ(x) + √(1 − (1 − t)²)·ε with t up to α and ε ~ N(0, 1), whatever the scale of x (DAVE,
arXiv 2602.06613, Eq. 7). So the same α is stronger noise for a model whose pixels have a smaller spread s: at the
highest level noise and image have the ratio

    √(1 − (1 − α)²) / ((1 − α)·s),   hence   α = 1 − 1/√(1 + (ratio·s)²)

The ratio is that of α = 0.1 for pixels that are normalised as ImageNet's, s = 1. A larger spread gets 0.1 too, since
1 − t also takes contrast away, which the model sees at any scale. An authors' level is of the model alone: a module
that normalises the images ahead of it gets the level of the same ratio. `scripts/validate_tune.py` measures how far the
result is from the best level of a sweep.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from torch import nn

from dave_fast.errors import is_out_of_memory, reason_of
from dave_fast.given.wrappers import last_part
from dave_fast.images.preprocess import Preprocessing, preprocessing
from dave_fast.models.catalog import noise_alpha_for

logger = logging.getLogger("dave_fast.explain")

# the level for pixels of spread 1
LEVEL = 0.1
# the spread of photographs in [0, 1]: the mean of the standard deviations by which ImageNet's channels are divided
PHOTOGRAPHS = 0.226


def noise_level(model: nn.Module, name: str, prepared: Callable[[], Preprocessing]) -> float:
    """Return noise_alpha for a model; log it where it is none of the authors'.

    It depends on nothing but the model's name and its description of its pixels.

    Args:
        model: any module.
        name: of the model, as `load_model` returns it.
        prepared: returns the model's preprocessing, or raises for a model without one.
    """
    tuned = noise_alpha_for(name)
    chosen = level = LEVEL if tuned is None else tuned
    try:
        std = prepared().std
        reference = PHOTOGRAPHS if tuned is None else _mean(preprocessing(last_part(model)).std)
        chosen, why = level_for(reference / _mean(std), level), f"divided by {', '.join(f'{s:.3g}' for s in std)}"
    # a description of the user's own may be anything
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f"an unknown scale: {reason_of(error)}"
    if chosen != tuned:
        logger.info(
            "noise_alpha is %g for %s, by the scale of its pixels (%s): --noise-alpha or noise_alpha= sets another, "
            "`dave-fast tune` measures one",
            chosen,
            name,
            why,
        )
    return chosen


def level_for(spread: float, level: float = LEVEL) -> float:
    """Return noise_alpha for pixels of a spread, to two digits, so that rounding does not tell.

    Args:
        spread: standard deviation of a model's normalised images, relative to that for which `level` is right.
        level: noise_alpha for a spread of 1.
    """
    if spread >= 1:
        return level
    ratio = math.sqrt(1 / (1 - level) ** 2 - 1)
    return float(f"{1 - 1 / math.hypot(1, ratio * spread):.2g}")


def _mean(std: Sequence[float]) -> float:
    """Return the mean magnitude; a normalisation may turn the sign of its images."""
    mean = sum(map(abs, std)) / len(std)
    if not 0 < mean < math.inf:
        raise ValueError(f"a standard deviation of {mean:g}")
    return mean
