"""Choose noise_alpha and the number of samples for a model, from a handful of its own images, without labels.

noise_alpha. Averaging over noise has a gain and a price. The gain: what is left of a gradient behind the noise is what
its neighbourhood agrees on. The price: noisier samples scatter more, and beyond some level the model sees no object.
Both can be seen without labels.

- Repeatability r(α): the Pearson correlation of two maps of the same image that share nothing but the image and the
  model: other draws, and each of a copy of the image under slight noise of its own. Without the latter the noiseless
  extreme would flatter itself: a single gradient, however shattered, repeats perfectly at the very same point.
- Decision kept k(α): the share of noisy samples (without the transformations) in which the unperturbed image's class
  still comes first. The robust mean over samples breaks down when half of them speak of something else, so α must
  leave k(α) ≥ ½.

The choice is the largest such α whose mean r is at least 98 % of the best: as much smoothing as costs next to nothing.

n_samples. A bound of a map's relative error, which holds nine times in ten, comes from halves of its samples
(`explain.convergence`) and falls with 1/√S; a map of relative error e correlates about √(1 − e²) with its limit. So
S = S₀·(bound(S₀)/e)², the median over images, for the correlation that is asked for.

Considered, on other scenes than those of the validation (`scripts/validate_tune.py`), and rejected: deletion and
insertion by the model's own maps (flat in α); correlation with the effect of removing random patches (flat, with its
maximum elsewhere); one standard error instead of 2 % (with a handful of images it lets far too much through); counting
decisions under the transformations, too (many a model is no more invariant to a flip than a digit is).
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
from dave_fast.explain.convergence import checkpoints, refine
from dave_fast.explain.explainer import DAVE
from dave_fast.ops.perturb import perturb
from dave_fast.sampling import Draws, Sampling, draw

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# samples of each of the two maps of a repetition, draws for each noise level, and samples of the error estimate
SAMPLES, LEVEL_DRAWS, ERROR_SAMPLES = 24, 4, 64
# of the slight noise that two views of an image differ by, as a share of the standard deviation of the images
VIEW_NOISE = 0.1
KEPT = 0.5
# what repeatability may be given up for smoothing
TOLERANCE = 0.02
QUALITY = 0.9
MOST_SAMPLES = 1000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuning:
    """What was found. repeatability: (A, n) by α and image. kept: (A,) share of samples that keep the decision.

    errors: S -> bound of the relative error, the median over images.
    best: index of the highest repeatability among allowed α.
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
        return standard_errors(self.repeatability, self.best)


def choose_alpha(repeatability: np.ndarray, kept: np.ndarray) -> tuple[int, int]:
    """Indices of the α chosen and of the most repeatable one, by the rule above; repeatability (A, n), kept (A,).

    α must rise. Where no α keeps half of the decisions, the smallest is taken.
    """
    allowed = [i for i, share in enumerate(kept) if share >= KEPT] or [0]
    means = np.nanmean(repeatability, axis=1)
    best = max(allowed, key=lambda i: means[i])
    return max(i for i in allowed if means[i] >= means[best] - TOLERANCE * abs(means[best])), best


def standard_errors(repeatability: np.ndarray, best: int) -> np.ndarray:
    """Of the mean paired difference of every α from the best one: (A,)."""
    differences = repeatability - repeatability[best]
    return np.nanstd(differences, axis=1, ddof=1) / math.sqrt(differences.shape[1])


def samples_for(quality: float, samples: int, error: float) -> int:
    """How many samples correlate with the limit by `quality`, when `samples` have the relative error `error`."""
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
    """Tune for a model from its own images (n, 3, H, W), normalised; explained are the predicted classes.

    explainer: of the model, with any noise_alpha; it is left as it was. quality: correlation with the converged map.
    Raises InputError for fewer than three images, α that do not rise within [0, 1], or a quality outside of (0, 1).
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

    classes = explainer.predict(images).argmax(1)
    kept = _kept(explainer, images, classes, alphas, seed)
    views = _views(images, seed)
    rows = []
    try:
        for alpha in alphas:
            explainer.sampling = replace(before, noise_alpha=float(alpha))
            maps = []
            for number, view in enumerate(views):
                found = explainer.explain(view, classes, SAMPLES, seed + number, image_keys=range(len(images)))
                maps.append(found.maps)
                tell(SAMPLES * len(images), f"noise_alpha {alpha:g}")
            rows.append(metrics.correlation(*maps).cpu().numpy())
        repeatability = np.stack(rows)
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
    """Two copies of the images, each under slight noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    spread = VIEW_NOISE * images.std()
    noise = [torch.randn(images.shape, generator=generator).to(images) for _ in range(2)]
    return [images + spread * each for each in noise]


def _kept(explainer: DAVE, images: Tensor, classes: Tensor, alphas: Sequence[float], seed: int) -> np.ndarray:
    """Share of noisy samples that keep the decision for every α: the mean over noise levels up to it."""
    levels = np.linspace(0, alphas[-1], 13)
    size = (images.shape[2], images.shape[3])
    still = Sampling(rotation=0.0, scale=(1.0, 1.0), translation=0.0, flip=0.0)
    keys = range(len(images))
    draws = draw(LEVEL_DRAWS, height=size[0], width=size[1], seed=seed, image_keys=keys, sampling=still)
    wanted = classes.cpu()[draws.image_index]
    shares = []
    for level in levels:
        # a patch as large as the image: the one token is the perturbed image
        shaken = perturb(images.cpu(), _at(draws, float(level)), size)
        found = explainer.predict(shaken.view(-1, *images.shape[1:])).argmax(1).cpu()
        shares.append((found == wanted).double().mean().item())
    # the mean over [0, α] by trapezoids; at 0 it is the first share itself
    steps = np.concatenate([[0.0], np.cumsum((np.array(shares[1:]) + shares[:-1]) / 2 * np.diff(levels))])
    return np.array([shares[0] if a == 0 else np.interp(a, levels, steps) / a for a in alphas])


def _at(draws: Draws, level: float) -> Draws:
    """The same noise, all at one level t."""
    signal = torch.full_like(draws.signal, 1 - level)
    return replace(draws, signal=signal, noise=torch.full_like(draws.noise, math.sqrt(level * (2 - level))))


def _errors(
    explainer: DAVE, images: Tensor, classes: Tensor, seed: int, tell: Callable[[int, str], None]
) -> dict[int, float]:
    """Bound of the relative error by number of samples, the median over images."""
    sizes = [size for size in checkpoints(ERROR_SAMPLES) if size >= 8]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    rows = explainer.fitting_rows(images[:1])
    for number in range(len(images)):
        image, target = images[number : number + 1], classes[number : number + 1, None].cpu()
        draws = draw(
            ERROR_SAMPLES,
            height=images.shape[2],
            width=images.shape[3],
            seed=seed,
            image_keys=[number],
            sampling=explainer.sampling,
        )
        parts = [explainer.contributions(image, draws[at : at + rows], target) for at in range(0, ERROR_SAMPLES, rows)]
        contributions = torch.cat(parts, dim=1)
        for size in sizes:
            found[size].append(refine(explainer, contributions[:, :size]).bounds[0])
        tell(ERROR_SAMPLES, "number of samples")
    return {size: float(np.median(values)) for size, values in found.items()}
