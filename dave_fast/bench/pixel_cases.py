"""Cases of the pixel ops, on several different images with their rows out of order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dave_fast.bench.case import Case, Operands, Undecided, calling, named, numbers
from dave_fast.bench.shapes import Shapes
from dave_fast.ops.precision import statistics_dtype
from dave_fast.ops.pull_back import pull_back_ref
from dave_fast.ops.robust_mean import EPSILON, KEPT_SIGMAS, MAD_TO_SIGMA
from dave_fast.ops.spread_mean import densities_of
from dave_fast.sampling import Draws, draw

# more than one, so that a form that reads the first image for all rows is found wrong
IMAGES = 3


def _images(generator: torch.Generator, dtype: torch.dtype, shapes: Shapes) -> Tensor:
    return numbers(generator, IMAGES, *shapes.image).to(statistics_dtype(dtype))


def _draws(generator: torch.Generator, shapes: Shapes, rows: int) -> Draws:
    """Make draws in which neighbouring rows belong to different images, the first to the last image."""
    each = -(-rows // IMAGES)
    made = draw(each, height=shapes.image[1], width=shapes.image[2], image_keys=range(IMAGES))
    order = torch.arange(IMAGES * each).view(IMAGES, each).flip(0).T.flatten()
    return made[order[:rows]].to(generator.device)


def _images_read(given: Operands) -> Tensor:
    """Return the images that rows belong to."""
    return given["images"][given["draws"].image_index.unique()]


def perturb(shapes: Shapes) -> list[Case]:
    """Return the case of S rows."""

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        images = _images(generator, dtype, shapes)
        return {"images": images, "draws": _draws(generator, shapes, shapes.samples)}

    def call(run: Callable[..., Any], given: Operands, dtype: torch.dtype) -> Any:
        return run(given["images"], given["draws"], shapes.patch, dtype=dtype)

    return [Case("perturb", "perturb", operands, calling("perturb", call), lambda given: [_images_read(given)])]


def _cotangents(shapes: Shapes, rows: int) -> Callable[[torch.Generator, torch.dtype], Operands]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        channels, _, _ = shapes.image
        length = channels * shapes.patch[0] * shapes.patch[1]
        cotangents = numbers(generator, rows, shapes.patches, length).to(dtype)
        images, draws = _images(generator, dtype, shapes), _draws(generator, shapes, rows)
        return {"images": images, "draws": draws, "cotangents": cotangents}

    return operands


def pull_back(shapes: Shapes) -> list[Case]:
    """Return the case of S rows."""

    def call(run: Callable[..., Any], given: Operands, dtype: torch.dtype) -> Any:
        images = given["images"]
        return run(given["cotangents"], images, given["draws"], shapes.patch, dtype=images.dtype)

    def reads(given: Operands) -> list[Tensor]:
        return [_images_read(given), given["cotangents"]]

    return [Case("pull_back", "pull_back", _cotangents(shapes, shapes.samples), calling("pull_back", call), reads)]


def pull_back_mean(shapes: Shapes, *, variance: bool = False) -> list[Case]:
    """Return the case of IMAGES means of S rows, each of rows of all images; with their variance if asked for."""
    (case,) = pull_back(shapes)

    def call(run: Callable[..., Any], given: Operands, dtype: torch.dtype) -> Any:
        return run(given["cotangents"], given["images"], given["draws"], shapes.patch, shapes.samples)

    def undecided(wide: Operands) -> list[Undecided]:
        contributions = pull_back_ref(wide["cotangents"], wide["images"], wide["draws"], shapes.patch)
        return _undecided(contributions.unflatten(0, (-1, shapes.samples)), _warp_error(shapes), variance=variance)

    operands = _cotangents(shapes, IMAGES * shapes.samples)
    op = "pull_back_mean_variance" if variance else "pull_back_mean"
    return [replace(case, op=op, name=op, operands=operands, bind=calling(op, call), undecided=undecided)]


def spread_mean(shapes: Shapes) -> list[Case]:
    """Return the case of IMAGES means of S rows."""
    patches = shapes.image[1:], shapes.patch

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        rows = IMAGES * shapes.samples
        values = numbers(generator, rows, shapes.patches).to(statistics_dtype(dtype))
        return {"values": values, "draws": _draws(generator, shapes, rows)}

    def call(run: Callable[..., Any], given: Operands, dtype: torch.dtype) -> Any:
        return run(given["values"], given["draws"], *patches, shapes.samples)

    def undecided(wide: Operands) -> list[Undecided]:
        densities = densities_of(wide["values"], wide["draws"], *patches)
        return _undecided(densities.unflatten(0, (-1, shapes.samples)), _warp_error(shapes), variance=True)

    op = "spread_mean_variance"
    return [Case(op, op, operands, calling(op, call), named("values"), undecided=undecided)]


def _warp_error(shapes: Shapes) -> float:
    """Return a bound of float32's error in what is pulled back, as a share of the largest value.

    float32 rounds the warp's source positions, in pixels, and the random cotangents of neighbours are unrelated.
    """
    return 1e-4 + 5e-6 * max(shapes.image[1:])


def _undecided(contributions: Tensor, share: float, *, variance: bool) -> list[Undecided]:
    """Return `threshold_is_near` of a mean, and of its variance if asked for."""
    mean = threshold_is_near(contributions, share)
    if not variance:
        return [mean]
    # at most all samples are kept, one at least, each as far from the mean as the mean may be
    middle, half = (mean.most + mean.least) / 2, (mean.most - mean.least) / 2
    farthest = ((contributions - middle[:, None]).abs() + half[:, None]).sum(dim=2)
    most = farthest.square().sum(dim=1)
    return [mean, Undecided(mean.where.any(dim=1), torch.zeros_like(most), most)]


def threshold_is_near(contributions: Tensor, share: float) -> Undecided:
    """Find elements with a sample so near the threshold of `robust_mean` that rounding decides whether it is kept.

    The mean then lies between the least and the largest of the samples that may be kept.

    Args:
        contributions: (B, S, ...) float64.
        share: errors of contributions and threshold, as a share of the largest contribution.
    """
    deviations = (contributions - contributions.median(dim=1, keepdim=True).values).abs()
    threshold = KEPT_SIGMAS * (MAD_TO_SIGMA * deviations.median(dim=1, keepdim=True).values + EPSILON)
    slack = share * contributions.abs().amax(1, keepdim=True)
    near = (deviations - threshold).abs() <= slack
    dropped, slack = deviations > threshold + slack, slack.squeeze(1)
    least, most = (contributions.masked_fill(dropped, end) for end in (torch.inf, -torch.inf))
    return Undecided(((deviations > 0) & near).any(1), least.amin(1) - slack, most.amax(1) + slack)


def robust_mean(shapes: Shapes, *, variance: bool = False) -> list[Case]:
    """Return the case of S samples of every image; with the variance if asked for."""

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        values = numbers(generator, IMAGES, shapes.samples, *shapes.image)
        # the cube of a normal number has heavy tails, so that some samples are outliers
        return {"contributions": (values**3).to(statistics_dtype(dtype))}

    op = "robust_mean_variance" if variance else "robust_mean"
    bind = calling(op, lambda run, given, _: run(given["contributions"]))

    def undecided(wide: Operands) -> list[Undecided]:
        return _undecided(wide["contributions"], 1e-6, variance=variance)

    return [Case(op, op, operands, bind, named("contributions"), undecided=undecided)]


def shrink(shapes: Shapes) -> list[Case]:
    """Return the case of every image, whose variance accounts for all in the middle and for little at the sides."""

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        raw = _images(generator, dtype, shapes)
        # up to 1.5 times the mean power of the channel sum, and slow, since the windows average over some 10 pixels
        share = 1.5 - torch.linspace(-1.5, 1.5, shapes.image[2], dtype=torch.float64, device=raw.device).abs()
        power = shapes.image[0] * numbers(generator, IMAGES, *shapes.image[1:]).double() ** 2
        return {"raw": raw, "variance": share * power}

    bind = calling("shrink", lambda run, given, _: run(given["raw"], given["variance"]))
    return [Case("shrink", "shrink", operands, bind, named("raw", "variance"))]


def smooth(shapes: Shapes) -> list[Case]:
    """Return the case of a map of every image."""

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        return {"raw": 0.05 * _images(generator, dtype, shapes)}

    bind = calling("smooth", lambda run, given, _: run(given["raw"]))
    return [Case("smooth", "smooth", operands, bind, named("raw"))]
