"""The choice of noise_alpha and of the number of samples for a model, from a few of its own images without labels.

noise_alpha. Averaging over noise keeps the part of a gradient that its neighbourhood shares; but noisier samples have
a larger variance, and beyond some level the model recognises nothing. Both can be measured without labels.

- Repeatability r(α): the Pearson correlation of two maps of the same image with different draws, each of a copy of the
  image under slight noise of its own. Without that noise α = 0 would score too well: a single gradient repeats exactly
  at the same point, however noisy it is.
- Decision kept k(α): the share of noisy samples (without the transformations) whose top class, or the sign of whose
  single logit, is that of the unperturbed image. The robust mean over samples breaks down when half of them explain
  something else, so α must keep k(α) ≥ ½.

The choice is the largest such α whose mean r is at least 98 % of the best: the most smoothing at nearly no cost.

n_samples. A bound of a map's relative error, valid nine times in ten, is estimated from halves of its samples
(`explain.convergence`) and falls with 1/√S; a map of relative error e correlates about √(1 − e²) with its limit. So
S = S₀·(bound(S₀)/e)², the median over images, for the requested correlation.

Tried on other scenes than those of the validation (`scripts/validate_tune.py`), and rejected: deletion and insertion
by the model's own maps (flat in α); correlation with the effect of removing random patches (flat, with another
maximum); one standard error instead of 2 % (with few images it permits too much); counting decisions under the
transformations, too (many models are not invariant to them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics
from dave_fast.evaluate.methods import contributions_of
from dave_fast.explain.convergence import checkpoints, refine
from dave_fast.explain.explainer import DAVE
from dave_fast.models.meaning import link_of
from dave_fast.ops.perturb import perturb
from dave_fast.sampling import Sampling, draw

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# samples of each of the two maps that are correlated, draws for each noise level, samples of the error estimate
SAMPLES, LEVEL_DRAWS, ERROR_SAMPLES = 24, 4, 64
# noise in which the two copies of an image differ, as a share of the standard deviation of the images
VIEW_NOISE = 0.1
# the smallest share of decisions kept
KEPT = 0.5
# the share of the best repeatability that may be given up for more smoothing
TOLERANCE = 0.02
QUALITY = 0.9
MOST_SAMPLES = 1000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuning:
    """The result of tuning.

    Attributes:
        alphas: A values of α.
        repeatability: (A, n) float64, of each α and image.
        kept: (A,) float64, share of samples that keep the decision.
        best: index of the highest mean repeatability among the allowed α.
        noise_alpha: the α chosen.
        errors: S -> bound of the relative error, the median over images.
        n_samples: the number of samples chosen.
        quality: the requested correlation with the converged map.
    """

    alphas: tuple[float, ...]
    repeatability: np.ndarray
    kept: np.ndarray
    best: int
    noise_alpha: float
    errors: dict[int, float]
    n_samples: int
    quality: float

    @property
    def means(self) -> np.ndarray:
        """Mean repeatability of each α."""
        return np.nanmean(self.repeatability, axis=1)

    @property
    def spread(self) -> np.ndarray:
        """Standard error of each α's difference from the best, paired by image."""
        differences = self.repeatability - self.repeatability[self.best]
        return np.nanstd(differences, axis=1, ddof=1) / math.sqrt(differences.shape[1])


def choose_alpha(repeatability: np.ndarray, kept: np.ndarray) -> tuple[int, int]:
    """Choose α by the rule above; the smallest if no α keeps half of the decisions.

    Args:
        repeatability: (A, n), of rising α and each image.
        kept: (A,), share of samples that keep the decision.

    Returns:
        Indices of the α chosen and of the most repeatable one among those allowed.
    """
    allowed = [i for i, share in enumerate(kept) if share >= KEPT] or [0]
    means = np.nanmean(repeatability, axis=1)
    best = max(allowed, key=lambda i: means[i])
    return max(i for i in allowed if means[i] >= means[best] - TOLERANCE * abs(means[best])), best


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
    explainer: DAVE,
    images: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    quality: float = QUALITY,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tuning:
    """Choose noise_alpha and the number of samples for a model; the predicted classes are explained.

    Args:
        explainer: of the model, with any noise_alpha, which is restored.
        images: (n, 3, H, W), normalised, three or more.
        alphas: rising values within [0, 1].
        quality: the wanted correlation with the converged map, between 0 and 1.
        seed: of the draws.
        progress: called with (samples done, samples in all, description).

    Raises:
        InputError: an argument is outside of these limits, or the model's scores have no probabilities.
    """
    _check(images, alphas, quality)
    before = explainer.sampling
    total = len(alphas) * 2 * SAMPLES * len(images) + ERROR_SAMPLES * len(images)
    done = 0

    def tell(samples: int, what: str) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total, what)

    output = explainer.predict(images)
    if link_of(explainer.model, output.shape[1]) is None:
        raise InputError("the model's scores decide nothing (its link is None): choose noise_alpha by looking at maps.")
    classes = output.argmax(1)
    kept = _kept(explainer, images, _decisions(output), alphas, seed)
    views = _views(images, seed)
    try:
        repeatability = _repeatability(explainer, views, classes, alphas, seed, tell)
        chosen, best = choose_alpha(repeatability, kept)
        explainer.sampling = replace(before, noise_alpha=float(alphas[chosen]))
        errors = _errors(explainer, images, classes, seed, tell)
    finally:
        explainer.sampling = before
    n_samples = samples_for(quality, ERROR_SAMPLES, errors[ERROR_SAMPLES])
    return Tuning(tuple(alphas), repeatability, kept, best, float(alphas[chosen]), errors, n_samples, quality)


def _check(images: Tensor, alphas: Sequence[float], quality: float) -> None:
    if images.ndim != 4 or len(images) < 3:
        raise InputError(f"images {tuple(images.shape)}: tuning takes three or more, (n, 3, H, W); eight are better.")
    if len(alphas) < 2 or list(alphas) != sorted(set(alphas)) or not 0 <= alphas[0] <= alphas[-1] <= 1:
        raise InputError(f"alphas are {list(alphas)}; expected two or more that rise, between 0 and 1.")
    if not 0 < quality < 1:
        raise InputError(f"quality is {quality}; expected a correlation between 0 and 1, as 0.9.")


def _views(images: Tensor, seed: int) -> list[Tensor]:
    """Return two copies of the images, each under slight noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    spread = VIEW_NOISE * images.std()
    noise = [torch.randn(images.shape, generator=generator).to(images) for _ in range(2)]
    return [images + spread * each for each in noise]


def _repeatability(
    explainer: DAVE,
    views: Sequence[Tensor],
    classes: Tensor,
    alphas: Sequence[float],
    seed: int,
    tell: Callable[[int, str], None],
) -> np.ndarray:
    """Return the correlation of the maps of both views, (A, n) by α and image; changes the explainer's α."""
    rows = []
    for alpha in alphas:
        explainer.sampling = replace(explainer.sampling, noise_alpha=float(alpha))
        maps = []
        for number, view in enumerate(views):
            found = explainer.explain(view, classes, SAMPLES, seed + number, image_keys=range(len(view)))
            maps.append(found.maps)
            tell(SAMPLES * len(view), f"noise_alpha {alpha:g}")
        rows.append(metrics.correlation(*maps).cpu().numpy())
    return np.stack(rows)


def _decisions(output: Tensor) -> Tensor:
    """Return the decision on each image, (n,) int64: the top class, or of a single logit whether it is positive."""
    return output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()


def _kept(explainer: DAVE, images: Tensor, decisions: Tensor, alphas: Sequence[float], seed: int) -> np.ndarray:
    """Return the share of noisy samples that keep the decision, (A,): for each α the mean over levels up to it."""
    levels = np.linspace(0, alphas[-1], 13)
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
    # the mean over [0, α] by the trapezoid rule; at α = 0 it is the first share
    steps = np.concatenate([[0.0], np.cumsum((np.array(shares[1:]) + shares[:-1]) / 2 * np.diff(levels))])
    return np.array([shares[0] if a == 0 else np.interp(a, levels, steps) / a for a in alphas])


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
