"""Forms of the average over samples of evidence, and their scores for each file of `benchmarks.depth_evidence`.

A sample's evidence is spread over the pixels of its patches and pulled back, densities d_s (S, H, W). The forms of
their average m, before `smooth` makes a map of it:

    robust, shrunk    shrink(m, variance) of the robust mean, as at the pixels
    robust            the mean of the values that lie near the median
    mean, shrunk      shrink(m, variance) of the plain mean
    mean              Σ_s d_s / S
    trimmed           the mean without the lowest and highest quarter of the values
    covered           Σ_s d_s / Σ_s τᵀ1: each sample has weight only where its image lies

The last two are scored on scenes only, which are small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.depth_evidence import FEW
from dave_fast.evaluate import metrics
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.robust_mean import robust_mean_variance
from dave_fast.ops.shrink import shrink
from dave_fast.ops.smooth import smooth
from dave_fast.sampling import Draws, Sampling, draw

SIZES = (4, 8, 16, 32, 64)
# densities (L, S, 1, H, W) and τᵀ1 (S, 1, H, W) -> m (L, 1, H, W)
Form = Callable[[Tensor, Tensor], Tensor]
# the sum of weights below which a pixel is as good as not seen, as a share of the samples
LEAST_COVER = 0.1
# pixels along a side up to which all forms are scored, and up to which forms are scored at all numbers of samples
SMALL, MIDDLE = 128, 256
# GridPG or EnergyPG of the smoothed map and of the unsmoothed one, the pointing game, correlation with all samples' map
METRICS = ("inside", "inside, unsmoothed", "pointing", "correlation")


def densities(values: Tensor, draws: Draws, size: tuple[int, int]) -> Tensor:
    """Return what patches' values (S, L, n) are on the pixels, (S, L, H, W): τᵀ of each, spread over its patch."""
    samples, levels, patches = values.shape
    side = round((size[0] * size[1] / patches) ** 0.5)
    spread = values.transpose(1, 2)[..., None].expand(-1, -1, -1, side * side) / side**2
    still = replace(draws, signal=torch.ones_like(draws.signal))
    return pull_back(spread.reshape(samples, patches, -1).contiguous(), torch.ones(1, levels, *size), still, side)


def _mean(of: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (L, 1, H, W) of densities (L, S, 1, H, W), and its variance (L, H, W)."""
    mean = of.mean(1)
    return mean, (of[:, :, 0] - mean).square().mean(1) / (of.shape[1] - 1)


def _trimmed(of: Tensor, cover: Tensor) -> Tensor:
    quarter = of.shape[1] // 4
    return of.sort(1).values[:, quarter : of.shape[1] - quarter].mean(1)


def _covered(of: Tensor, cover: Tensor) -> Tensor:
    return of.mean(1) / cover.mean(0).clamp(min=LEAST_COVER)


FORMS: dict[str, Form] = {
    "robust, shrunk": lambda of, cover: shrink(*robust_mean_variance(of)),
    "robust": lambda of, cover: robust_mean_variance(of)[0],
    "mean, shrunk": lambda of, cover: shrink(*_mean(of, cover)),
    "mean": lambda of, cover: of.mean(1),
    "trimmed": _trimmed,
    "covered": _covered,
}
MAIN = next(iter(FORMS))
# L -> blocks whose evidence is averaged
GROUPS: dict[str, Callable[[int], slice]] = {
    "deeper half": lambda blocks: slice(blocks // 2, blocks),
    "deeper half but the last": lambda blocks: slice(blocks // 2, blocks - 1),
    "all": slice,
}


@dataclass(frozen=True)
class Example:
    """The file of one item.

    Attributes:
        of: its arrays (`benchmarks.depth_evidence`).
        draws: of its samples.
        size: (H, W).
    """

    of: dict[str, Tensor]
    draws: Draws
    size: tuple[int, int]

    @classmethod
    def read(cls, path: Path, alpha: float) -> Example:
        """Return the example of a file, whose number is the key of its draws."""
        with np.load(path) as file:
            of = {name: torch.from_numpy(file[name]) for name in file.files}
        height, width = of["pixels"].shape[-2:]
        samples, sampling = of["evidence"].shape[2], Sampling(alpha)
        draws = draw(samples, height=height, width=width, image_keys=(int(path.stem),), sampling=sampling)
        return cls(of, draws, (height, width))

    @property
    def classes(self) -> int:
        """K."""
        return self.of["evidence"].shape[1]

    def densities(self, which: int) -> Tensor:
        """Return a class's densities, (L, S, 1, H, W)."""
        made = densities(self.of["evidence"][:, which].transpose(0, 1), self.draws, self.size)
        return made.transpose(0, 1)[:, :, None].contiguous()

    def cover(self) -> Tensor:
        """Return τᵀ1 of each sample, (S, 1, H, W)."""
        samples, patches = self.of["evidence"].shape[2:]
        # a patch's value is spread over its pixels
        ones = torch.full((samples, 1, patches), self.size[0] * self.size[1] / patches)
        return densities(ones, self.draws, self.size)

    def inside(self, maps: Tensor, which: int) -> Tensor:
        """Return GridPG or EnergyPG of maps (L, H, W) of a class, (L,)."""
        if "cells" in self.of:
            return metrics.grid_pointing_game(maps, self.of["cells"][which].expand(len(maps)), 2)
        return metrics.energy_pointing_game(maps, self._mask(maps))

    def pointing(self, maps: Tensor) -> Tensor:
        """Return the pointing game of maps (L, H, W); NaN in a mosaic."""
        if "cells" in self.of:
            return torch.full((len(maps),), torch.nan)
        return metrics.pointing_game(maps, self._mask(maps))

    def _mask(self, maps: Tensor) -> Tensor:
        return self.of["mask"].expand(len(maps), -1, -1)


def scores_of(path: Path, alpha: float) -> dict[str, np.ndarray]:
    """Return the scores of one file, means over its classes.

    Returns:
        "blocks" (forms, sizes, L, metrics), "pixels" (the paper's and shrunk, `FEW` samples and all, metrics), and
        "halves" (L,), how alike maps of 8 and of 8 other samples are, of the main form and the first class.
    """
    one = Example.read(path, alpha)
    cover, scored, pixels, halves = one.cover(), [], [], np.zeros(0)
    for which in range(one.classes):
        of = one.densities(which)
        if which == 0:
            parts = [smooth(FORMS[MAIN](of[:, at:FEW:2].contiguous(), cover)).double() for at in (0, 1)]
            halves = metrics.correlation(*parts).numpy()
        scored.append([_by_size(one, of, cover, form, which) for form in FORMS.values()])
        signed = one.of["pixels"][:, :, which]
        pixels.append([_scores(one, form[:, None], form[-1:, None].expand_as(form[:, None]), which) for form in signed])
    return {"blocks": np.mean(scored, 0), "pixels": np.mean(pixels, 0), "halves": halves}


def together(path: Path, alpha: float) -> np.ndarray:
    """Return GridPG or EnergyPG of the main form for the mean evidence of each group of blocks, (groups,)."""
    one = Example.read(path, alpha)
    evidence = one.of["evidence"][:, :, :FEW]
    blocks, draws, found = len(evidence), one.draws[: evidence.shape[2]], []
    for which in range(one.classes):
        means = [evidence[group(blocks), which].mean(0) for group in GROUPS.values()]
        of = densities(torch.stack(means, 1), draws, one.size).transpose(0, 1)[:, :, None].contiguous()
        found.append(one.inside(smooth(FORMS[MAIN](of, of)).double(), which).numpy())
    return np.mean(found, 0)


def _by_size(one: Example, of: Tensor, cover: Tensor, form: Form, which: int) -> np.ndarray:
    """Return the scores of a form, (sizes, L, metrics), NaN for more samples than there are."""
    found = np.full((len(SIZES), len(of), len(METRICS)), np.nan)
    if form in (_trimmed, _covered) and max(one.size) > SMALL:
        return found
    limit = form(of, cover)
    for at, size in enumerate(SIZES):
        if size == of.shape[1]:
            found[at] = _scores(one, limit, limit, which)
        elif size < of.shape[1] and max(one.size) <= MIDDLE:
            found[at] = _scores(one, form(of[:, :size].contiguous(), cover[:size]), limit, which)
    return found


def _scores(one: Example, signed: Tensor, limit: Tensor, which: int) -> np.ndarray:
    """Return `METRICS` of signed maps (L, 1, H, W), (L, metrics)."""
    maps = smooth(signed.contiguous()).double()
    like = metrics.correlation(maps, smooth(limit.contiguous()).double())
    return torch.stack([one.inside(maps, which), one.inside(signed[:, 0], which), one.pointing(maps), like], -1).numpy()
