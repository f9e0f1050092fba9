"""Rules that choose a block without labels, and how much they lose against the best block of each model.

A rule gives each block of an image a value, and the block with the largest mean over a model's images is chosen:

    classes differ    1 − the correlation of the patches' evidence for the two likeliest classes, unperturbed
    steady            the mean correlation of the patches' evidence with that at both neighbouring blocks, unperturbed
    logit             −|Σ tokens' evidence − logit| / |logit|, of the likeliest class, unperturbed
    positive          the positive share of Σ |evidence| of the patches, of the likeliest class, unperturbed
    halves            the correlation of the maps of 8 samples and of 8 others

A share s of L blocks is the block floor(s·L + ½), as `dave_fast.explain.depth` rounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dave_fast.explain.depth import place_of

SHARES = (0.0, 0.25, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 1.0)


@dataclass(frozen=True)
class Measured:
    """The images of a run at one noise level.

    Attributes:
        inside: GridPG or EnergyPG of the main form, (images, L).
        values: of each rule, (images, L).
    """

    inside: np.ndarray
    values: dict[str, np.ndarray]

    @property
    def blocks(self) -> int:
        """L."""
        return self.inside.shape[1]

    @property
    def best(self) -> int:
        """The block with the largest mean."""
        return int(self.inside.mean(0).argmax())

    def lost(self, block: int) -> tuple[float, float]:
        """Return how much less than the best block one scores, and the standard error of the paired difference."""
        less = self.inside[:, self.best] - self.inside[:, block]
        return float(less.mean()), float(less.std(ddof=1) / len(less) ** 0.5)

    def chosen(self, rule: str) -> tuple[int, float]:
        """Return the block that a rule chooses, and for what share of single images it is within one block of it."""
        block = int(np.nanmean(self.values[rule], 0).argmax())
        own = np.nan_to_num(self.values[rule], nan=-np.inf).argmax(1)
        return block, float((abs(own - block) <= 1).mean())

    def share(self, share: float) -> int:
        """Return the block at a share of the depth."""
        block = place_of(share, [None] * self.blocks)
        assert isinstance(block, int)
        return block


def _alike(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation over the last axis."""
    a, b = (each - each.mean(-1, keepdims=True) for each in (some, others))
    found: np.ndarray = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return found


def _steady(file: dict[str, np.ndarray]) -> np.ndarray:
    alike = _alike(file["plain"][:-1, -2], file["plain"][1:, -2])
    # the first and the last block have one neighbour
    return (np.append(alike, alike[-1]) + np.insert(alike, 0, alike[0])) / 2


def _positive(file: dict[str, np.ndarray]) -> np.ndarray:
    likeliest = file["plain"][:, -2]
    found: np.ndarray = likeliest.clip(min=0).sum(-1) / abs(likeliest).sum(-1)
    return found


# arrays of a file of evidence and of its scores -> (L,)
RULES: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "classes differ": lambda file: 1 - _alike(file["plain"][:, -2], file["plain"][:, -1]),
    "steady": _steady,
    "logit": lambda file: -abs(file["tokens"][:, -2] - file["logits"][-2]) / abs(file["logits"][-2]),
    "positive": _positive,
    "halves": lambda file: file["halves"],
}


def measured(folder: Path, size: int) -> Measured:
    """Return what the scored files of a folder hold, the scores those of the size at this position of `SIZES`."""
    inside, values = [], {name: [] for name in RULES}
    for path in sorted(folder.glob("scores-*.npz")):
        with np.load(path) as scores, np.load(path.with_name(path.name.removeprefix("scores-"))) as evidence:
            file = {name: evidence[name] for name in ("plain", "tokens", "logits")} | {"halves": scores["halves"]}
            inside.append(scores["blocks"][0, size, :, 0])
        for name, rule in RULES.items():
            values[name].append(rule(file))
    return Measured(np.stack(inside), {name: np.stack(each) for name, each in values.items()})
