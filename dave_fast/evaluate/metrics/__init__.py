"""Metrics of maps: localisation, deletion and insertion, stability, artefacts. Batched, on the maps' device.

Every score is one number for each image; means and intervals are left to the caller. Where a definition does not apply,
the score is 0 for a map without positive values, and NaN, to be left out of means, for an image without a mask or a map
without anything to compare. NaN in a map gives NaN.

Maps are (B, H, W), of any float dtype and scale, signed or not; sums are taken in float64.

    localisation   energy pointing game, pointing game, grid pointing game and its mosaics
    perturbation   deletion and insertion, by named protocols
    similarity     correlations, relative change, and the excess along patch borders
"""

from dave_fast.evaluate.metrics.localisation import (
    build_mosaics,
    choose_mosaics,
    energy_pointing_game,
    grid_pointing_game,
    pointing_game,
)
from dave_fast.evaluate.metrics.perturbation import (
    PROTOCOLS,
    Curve,
    Protocol,
    blur,
    mean_score,
    perturbation_curve,
    published_area,
)
from dave_fast.evaluate.metrics.similarity import border_excess, correlation, rank_correlation, relative_change

__all__ = [
    "PROTOCOLS",
    "Curve",
    "Protocol",
    "blur",
    "border_excess",
    "build_mosaics",
    "choose_mosaics",
    "correlation",
    "energy_pointing_game",
    "grid_pointing_game",
    "mean_score",
    "perturbation_curve",
    "pointing_game",
    "published_area",
    "rank_correlation",
    "relative_change",
]
