"""The settings of an evaluation, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics
from dave_fast.evaluate.metrics.perturbation import protocol_of
from dave_fast.evaluate.statistics import MOST_SEEDS

VARIANTS = ("as it is", "smoothed")
GROUPS = ("localisation", "curves", "stability", "classes", "seeds", "randomisation", "grids")
# name -> cells along each side, and whether tiles are shrunk so that a mosaic has the model's own size
GRIDS = {"2x2": (2, False), "3x3": (3, False), "2x2-rescaled": (2, True), "3x3-rescaled": (3, True)}

# section of the report -> metric -> whether more is better; None for one that is only meaningful beside another
SECTIONS: dict[str, dict[str, bool | None]] = {
    "Where the attribution lies": {
        "EnergyPG": True,
        "pointing game": True,
        **{f"GridPG {name}": True for name in GRIDS},
        "two objects": True,
        "wrong object": None,
    },
    "How it behaves": {
        "stability": True,
        "class similarity": False,
        "random model": False,
        "border excess": False,
        **{f"{name} curve": protocol.higher_is_better for name, protocol in metrics.PROTOCOLS.items()},
    },
}
METRICS = {name: higher for section in SECTIONS.values() for name, higher in section.items()}


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and on how many images.

    Attributes:
        images: how many to explain, for localisation.
        probes: how many of them to use for curves, stability, class similarity and seeds.
        randomised: how many of them to use for parameter randomisation.
        pairs: how many images with two objects to explain.
        mosaics: how many of 2×2; of 3×3 as many as give an equal number of maps.
        grids: names of `GRIDS`.
        protocols: names of `metrics.PROTOCOLS`.
        curve_steps: about how many points a curve has.
        seeds: how many for the random methods, 1 to 10.
        seed: the first of them.
        confident: probability from which an image is used in curves and mosaics.
        stability_sigma: standard deviation of the noise on the normalised image.
        batch_size: images at a time.
        examples: how many images to show in the report.
        groups: names of `GROUPS`.
        methods: by name; None for all.
    """

    images: int = 100
    probes: int = 16
    randomised: int = 4
    pairs: int = 16
    mosaics: int = 4
    grids: tuple[str, ...] = ("2x2", "3x3")
    protocols: tuple[str, ...] = ("dave", "rise-deletion", "rise-insertion")
    curve_steps: int = 32
    seeds: int = 3
    seed: int = 0
    confident: float = 0.9
    stability_sigma: float = 0.02
    batch_size: int = 16
    examples: int = 4
    groups: tuple[str, ...] = GROUPS
    methods: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, given, allowed in (("group of metrics", self.groups, GROUPS), ("grid", self.grids, tuple(GRIDS))):
            if unknown := [one for one in given if one not in allowed]:
                raise InputError(f"there is no {name} {unknown[0]!r}; expected some of {', '.join(allowed)}.")
        for protocol in self.protocols:
            protocol_of(protocol)
        if not 1 <= self.seeds <= MOST_SEEDS or self.images < 1 or self.batch_size < 1:
            raise InputError(
                f"images={self.images}, batch_size={self.batch_size}, seeds={self.seeds}: expected images and a batch "
                f"of 1 or more, and 1 to {MOST_SEEDS} seeds."
            )

    def mosaics_of(self, grid: int) -> int:
        """Return how many mosaics of grid×grid give as many maps as `mosaics` of 2×2."""
        return max(1, 4 * self.mosaics // grid**2)


@dataclass
class Results:
    """The results of an evaluation.

    Attributes:
        scores: method -> variant -> metric -> a number for each image, in their order; mosaics count as images.
        curves: protocol -> (changed shares, method -> variant -> (n, P) scores).
        seeds: method -> variant -> the mean EnergyPG of each seed.
        randomised: (stage names, method -> variant -> (n, stages) rank correlations).
        examples: images and maps for pictures.
        absent: method or metric that was not run -> the reason.
        facts: about the images.
    """

    scores: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    curves: dict[str, tuple[Tensor, dict[str, dict[str, Tensor]]]] = field(default_factory=dict)
    seeds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    randomised: tuple[tuple[str, ...], dict[str, dict[str, Tensor]]] = ((), {})
    examples: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, method: str, metric: str, scores: Mapping[str, Tensor]) -> None:
        """Append scores of further images, by variant."""
        for variant, values in scores.items():
            row = self.scores.setdefault(method, {}).setdefault(variant, {}).setdefault(metric, [])
            row.extend(values.double().cpu().tolist())
