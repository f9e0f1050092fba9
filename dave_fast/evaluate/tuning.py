"""The choice of noise_alpha and of the number of samples for a model, from a few of its own images without labels.

noise_alpha. The rule is that of an untuned model (`explain.noise_level`), with the spread of the model's own images in
place of that of photographs: scans, drawings and dark images have another one. Then the level is halved until the
decision is kept: k(α), the share of noisy samples (without the transformations) whose top class, or the sign of whose
single logit, is that of the unperturbed image, must be ½ or more, since the robust mean over samples breaks down when
half of them explain something else.

n_samples. A bound of a map's relative error, valid nine times in ten, is estimated from halves of its samples
(`explain.convergence`) and falls with 1/√S; a map of relative error e correlates about √(1 − e²) with its limit. So
S = S₀·(bound(S₀)/e)², the median over images, for the requested correlation.

Tried (`scripts/validate_tune.py`), and rejected: the largest level at which two maps of an image agree nearly as well
as at any other (0.5 on the demo model, whose EnergyPG is 2 % below its best there); deletion and insertion by the
model's own maps (flat in α); correlation with the effect of removing random patches (flat, with another maximum);
counting decisions under the transformations, too (many models are not invariant to them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate.methods import contributions_of
from dave_fast.explain.convergence import checkpoints, refine
from dave_fast.explain.explainer import DAVE
from dave_fast.explain.noise_level import level_for
from dave_fast.models.meaning import link_of
from dave_fast.ops.perturb import perturb
from dave_fast.sampling import Sampling, draw

# levels at which decisions are counted, draws of each, samples of the error estimate
LEVELS, LEVEL_DRAWS, ERROR_SAMPLES = 13, 4, 64
HIGHEST = 0.9
# the smallest share of decisions kept
KEPT = 0.5
QUALITY = 0.9
MOST_SAMPLES = 1000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuning:
    """The result of tuning.

    Attributes:
        spread: standard deviation of the images.
        by_spread: the α that it stands for.
        alphas: (A,) float64, rising.
        kept: (A,) float64, share of samples that keep the decision; NaN where the model decides nothing.
        noise_alpha: the α chosen.
        errors: S -> bound of the relative error, the median over images.
        n_samples: the number of samples chosen.
        quality: the requested correlation with the converged map.
    """

    spread: float
    by_spread: float
    alphas: np.ndarray
    kept: np.ndarray
    noise_alpha: float
    errors: dict[int, float]
    n_samples: int
    quality: float

    @property
    def decides(self) -> bool:
        """Whether the model decides something, so that decisions were counted."""
        return not np.isnan(self.kept).any()

    def kept_at(self, alpha: float) -> float:
        """Return the share of samples that keep the decision at a level."""
        return float(np.interp(alpha, self.alphas, self.kept))


def choose_alpha(spread: float, alphas: np.ndarray, kept: np.ndarray) -> float:
    """Choose α by the rule above; 0 if no α keeps half of the decisions.

    Args:
        spread: standard deviation of the model's images.
        alphas: (A,), rising from 0.
        kept: (A,), share of samples that keep the decision; NaN where there is none.
    """
    halved = (level_for(spread) / 2**times for times in range(6))
    return next((alpha for alpha in halved if not np.interp(alpha, alphas, kept) < KEPT), 0.0)


def samples_for(quality: float, samples: int, error: float) -> int:
    """Return the number of samples whose map correlates with the limit by `quality`.

    Args:
        quality: the correlation, between 0 and 1.
        samples: number of samples of the estimate.
        error: relative error of a map of that many samples.
    """
    wanted = math.sqrt(1 - quality**2)
    return min(MOST_SAMPLES, max(2, math.ceil(samples * (error / wanted) ** 2)))


def tune(
    explainer: DAVE, images: Tensor, *, quality: float = QUALITY, seed: int = 0, progress: Progress | None = None
) -> Tuning:
    """Choose noise_alpha and the number of samples for a model; the predicted classes are explained.

    Args:
        explainer: of the model, with any noise_alpha, which is restored.
        images: (n, C, H, W), normalised, three or more.
        quality: the wanted correlation with the converged map, between 0 and 1.
        seed: of the draws.
        progress: called with (samples done, samples in all, description).

    Raises:
        InputError: an argument is outside of these limits, or the model's output is no scores (B, K).
    """
    if images.ndim != 4 or len(images) < 3:
        raise InputError(f"images {tuple(images.shape)}: tuning takes three or more, (n, C, H, W); eight are better.")
    if not 0 < quality < 1:
        raise InputError(f"quality is {quality}; expected a correlation between 0 and 1, as 0.9.")
    total = (LEVELS * LEVEL_DRAWS + ERROR_SAMPLES) * len(images)
    done = 0

    def tell(samples: int, what: str) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total, what)

    tell(0, "noise_alpha")
    output = explainer.predict(images)
    if output.ndim != 2:
        raise InputError(f"the model's output is {tuple(output.shape)}; tuning takes the scores of classes, (B, K).")
    alphas = np.linspace(0, HIGHEST, LEVELS)
    kept = np.full(LEVELS, np.nan)
    if link_of(explainer.model, output.shape[1]) is not None:
        kept = _kept(explainer, images, _decisions(output), alphas, seed, tell)
    spread = images.double().std(dim=(0, 2, 3)).mean().item()
    before, chosen = explainer.sampling, choose_alpha(spread, alphas, kept)
    try:
        explainer.sampling = replace(before, noise_alpha=chosen)
        errors = _errors(explainer, images, output.argmax(1), seed, tell)
    finally:
        explainer.sampling = before
    n_samples = samples_for(quality, ERROR_SAMPLES, errors[ERROR_SAMPLES])
    return Tuning(spread, level_for(spread), alphas, kept, chosen, errors, n_samples, quality)


def _decisions(output: Tensor) -> Tensor:
    """Return the decision on each image, (n,) int64: the top class, or of a single logit whether it is positive."""
    return output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()


def _kept(
    explainer: DAVE,
    images: Tensor,
    decisions: Tensor,
    levels: np.ndarray,
    seed: int,
    tell: Callable[[int, str], None],
) -> np.ndarray:
    """Return the share of noisy samples that keep the decision, (A,): for each α the mean over levels up to it."""
    height, width = images.shape[2:]
    still = Sampling(rotation=0.0, scale=(1.0, 1.0), translation=0.0, flip=0.0)
    keys = range(len(images))
    draws = draw(LEVEL_DRAWS, height=height, width=width, seed=seed, image_keys=keys, sampling=still)
    wanted = decisions.cpu()[draws.image_index]
    shares = []
    for level in levels.tolist():
        # a single patch of the image's size: its token is the perturbed image
        signal = torch.full_like(draws.signal, 1 - level)
        at_level = replace(draws, signal=signal, noise=torch.full_like(draws.noise, math.sqrt(level * (2 - level))))
        shaken = perturb(images.cpu(), at_level, (height, width))
        found = _decisions(explainer.predict(shaken.view(-1, *images.shape[1:]))).cpu()
        shares.append((found == wanted).double().mean().item())
        tell(len(shaken), "noise_alpha")
    # the mean over [0, α] by the trapezoid rule; at α = 0 it is the first share
    areas = np.cumsum((np.array(shares[1:]) + shares[:-1]) / 2 * np.diff(levels))
    return np.concatenate([shares[:1], areas / levels[1:]])


def _errors(
    explainer: DAVE, images: Tensor, classes: Tensor, seed: int, tell: Callable[[int, str], None]
) -> dict[int, float]:
    """Return the bound of the relative error by number of samples, the median over images."""
    sizes = [size for size in checkpoints(ERROR_SAMPLES) if size >= 8]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for number, (image, target) in enumerate(zip(images.split(1), classes.cpu().split(1), strict=True)):
        contributions = contributions_of(explainer, image, target, ERROR_SAMPLES, [number], seed)
        for size in sizes:
            found[size].append(refine(explainer, contributions[:, :size]).bounds[0])
        tell(ERROR_SAMPLES, "number of samples")
    return {size: float(np.median(values)) for size, values in found.items()}
