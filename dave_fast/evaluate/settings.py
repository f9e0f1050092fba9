"""What an evaluation is asked for, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics
from dave_fast.evaluate.metrics.perturbation import protocol_of
from dave_fast.evaluate.statistics import MOST_SEEDS

VARIANTS = ("as it is", "smoothed")
GROUPS = ("localisation", "curves", "stability", "classes", "seeds", "randomisation", "grids")
# name -> cells a side, and whether tiles are shrunk so that a mosaic has the model's own size
GRIDS = {"2x2": (2, False), "3x3": (3, False), "2x2-rescaled": (2, True), "3x3-rescaled": (3, True)}

# metric -> whether more is better; None: neither, it is read beside another
METRICS: dict[str, bool | None] = {
    "EnergyPG": True,
    "pointing game": True,
    **{f"GridPG {name}": True for name in GRIDS},
    "two objects": True,
    "wrong object": None,
    "stability": True,
    "class similarity": False,
    "random model": False,
    "border excess": False,
} | {f"{name} curve": protocol.higher_is_better for name, protocol in metrics.PROTOCOLS.items()}


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and on how many images.

    images: for localisation. probes: of them for curves, stability, class similarity and seeds; randomised: for
    parameter randomisation. pairs: images with two objects. mosaics: of 2×2; of 3×3 as many as make as many maps.
    groups: of metrics; methods: by name, None for all. confident: probability from which an image counts in curves
    and mosaics. seeds: of the random methods, 1 to 10; the first of them is `seed`.
    grids: names of `GRIDS`.
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
        """How many mosaics of grid×grid make as many maps as `mosaics` of 2×2."""
        return max(1, 4 * self.mosaics // grid**2)


@dataclass
class Results:
    """scores: method -> variant -> metric -> one number an image, in the images' order; mosaics count as images.

    curves: protocol -> (changed shares, method -> variant -> (n, P) scores).
    seeds: method -> variant -> a mean EnergyPG a seed.
    randomised: (stage names, method -> variant -> (n, stages) rank correlations).
    examples: images and maps for pictures. absent: what was not run, and why. facts: about the images.
    """

    scores: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    curves: dict[str, tuple[Tensor, dict[str, dict[str, Tensor]]]] = field(default_factory=dict)
    seeds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    randomised: tuple[tuple[str, ...], dict[str, dict[str, Tensor]]] = ((), {})
    examples: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, method: str, variant: str, metric: str, values: Tensor) -> None:
        """Scores of further images."""
        row = self.scores.setdefault(method, {}).setdefault(variant, {}).setdefault(metric, [])
        row.extend(values.double().cpu().tolist())
