"""Rows of a comparison: methods under several settings, those that can be from the same samples.

A `Family` explains one image for K classes and returns a row of maps for each of its settings. The first samples of a
run of DAVE are themselves a run, so one run of the most samples gives the rows of all smaller numbers, each with and
without shrinkage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.evaluate.methods import METHODS, MethodSettings, contributions_of
from dave_fast.evaluate.packages import attnlrp
from dave_fast.evaluate.probes import contrasted
from dave_fast.evaluate.scoring import Maps, as_maps
from dave_fast.evaluate.settings import VARIANTS
from dave_fast.explain.explainer import DAVE
from dave_fast.ops.robust_mean import robust_mean_variance
from dave_fast.ops.shrink import shrink
from dave_fast.ops.smooth import smooth

# image (1, C, H, W), classes (K,), key -> row -> variant -> (K, H, W)
Family = Callable[[Tensor, Tensor, int], dict[str, Maps]]

PAPERS = "paper's"


def dave(model: nn.Module, title: str, sizes: Sequence[int], seed: int, alpha: float | None = None) -> Family:
    """Return DAVE's family: a row for each number of samples, with shrinkage and the paper's.

    As everywhere in an evaluation, the signed sum is that of raw, which is never shrunk.

    Args:
        model: in evaluation mode.
        title: of the rows, "{title}, S = 32" and "{title}, S = 32, paper's".
        sizes: numbers of samples.
        seed: of the draws.
        alpha: noise_alpha; None for what the explainer chooses.
    """
    explainer = DAVE(model, noise_alpha=alpha)

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        found = contributions_of(explainer, image, classes, max(sizes), [key], seed)
        made = {}
        for size in sizes:
            raw, variance = robust_mean_variance(found[:, :size])
            made[f"{title}, S = {size}"] = as_maps((raw, smooth(shrink(raw, variance))))
            made[f"{title}, S = {size}, {PAPERS}"] = as_maps(raw)
        return made

    return rows


def dave_contrast(model: nn.Module, title: str, size: int, seed: int, alpha: float | None = None) -> Family:
    """Return DAVE's family for the class's logit minus the mean of the other logits; the model has a linear head."""
    return dave(contrasted(model), title, (size,), seed, alpha)


def log_p(output: Tensor, row: int, classes: Tensor) -> Tensor:
    """Return the logarithm of the probability of `classes[row]`, of logits (n, classes)."""
    return output.float().log_softmax(1)[:, int(classes[row])]


def against_others(output: Tensor, row: int, classes: Tensor) -> Tensor:
    """Return the logit of `classes[row]` minus the mean logit of the others of `classes`, such as those of a mosaic."""
    others = torch.cat([classes[:row], classes[row + 1 :]])
    return output[:, int(classes[row])] - output[:, others].mean(1)


def dave_score(
    model: nn.Module,
    title: str,
    size: int,
    seed: int,
    alpha: float | None,
    score: Callable[[Tensor, int, Tensor], Tensor],
) -> Family:
    """Return DAVE's family for a score of (logits (n, classes), row of the maps, classes that are asked for)."""
    explainer = DAVE(model, noise_alpha=alpha)

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        def asked(row: int) -> Callable[[Tensor], Tensor]:
            return lambda output: score(output, row, classes)

        found = [explainer.explain(image, asked(row), size, seed, image_keys=[key]) for row in range(len(classes))]
        maps = torch.cat([each.raw for each in found]), torch.cat([each.maps for each in found])
        return {f"{title}, S = {size}": as_maps(maps)}

    return rows


def single(
    model: nn.Module, name: str, setup: MethodSettings, seed: int, *, row: str | None = None, autocast: bool = False
) -> Family:
    """Return a family of one row, a method of `METHODS`.

    Args:
        model: in evaluation mode.
        name: of the method.
        setup: how it is run.
        seed: of its draws.
        row: name of the row; None for that of the method.
        autocast: whether to run it under bfloat16.

    Raises:
        NotTakenError: the method does not support the model or the installation.
    """
    return _of_one(METHODS[name].make(model, setup), row or name, seed, autocast)


def attnlrp_with(model: nn.Module, gammas: tuple[float, float], seed: int) -> Family:
    """Return AttnLRP's family with γ of the patch embedding and of linear layers; raises as `attnlrp`."""
    return _of_one(attnlrp(model, None, gammas), "AttnLRP", seed)


def _of_one(attribute: Any, name: str, seed: int, autocast: bool = False) -> Family:
    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        found = []
        # class by class, so that a mosaic needs no more memory than an image of its size
        for wanted in classes.split(1):
            with _precision(image, autocast):
                made = attribute(image, wanted, [key], seed)
            found.append(as_maps(made if isinstance(made, tuple) else made.float()))
        return {name: {variant: torch.cat([maps[variant] for maps in found]) for variant in VARIANTS}}

    return rows


def _precision(image: Tensor, autocast: bool) -> AbstractContextManager[Any]:
    return torch.autocast(image.device.type, torch.bfloat16) if autocast else nullcontext()


def passes_in_the_time_of(
    family: Family, method: Callable[[int], Family], image: Tensor, classes: Tensor, rounds: int = 5
) -> int:
    """Return how many passes of a method take the time of a family's map, by runs in turns.

    Args:
        family: whose time is met.
        method: number of passes -> family.
        image: (1, C, H, W).
        classes: (1,).
        rounds: of which the median ratio is taken; one more is run ahead.
    """
    few, many = method(2), method(10)
    ratios = []
    for _ in range(rounds + 1):
        whole, short, long = (_seconds(each, image, classes) for each in (family, few, many))
        # of noise the difference may be nothing: ten passes are taken to be a quarter of their time at least
        ratios.append((whole - short) / max((long - short) / 8, long / 40) + 2)
    return max(1, round(float(torch.tensor(ratios[1:]).median())))


def _seconds(family: Family, image: Tensor, classes: Tensor) -> float:
    start = time.perf_counter()
    family(image, classes, 0)
    return time.perf_counter() - start
