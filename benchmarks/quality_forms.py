"""The methods of `benchmarks.quality_for_time`: dave-fast, the authors' code and captum's, behind one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import authors
from benchmarks.contestants import Within
from dave_fast import DAVE
from dave_fast.evaluate.methods import METHODS, MethodSettings, contributions_of
from dave_fast.ops.precision import DTYPES
from dave_fast.ops.smooth import smooth

AUTHORS = "the authors' code, fp32"
OWN_SAMPLES = (4, 8, 16, 32, 50, 64, 128)
# fewer where a sample costs more, for a run of twenty minutes on two cores
FP32_SAMPLES = (4, 8, 16, 32, 64)
OTHER_SAMPLES = (8, 16, 32, 50)
CAPTUM_SAMPLES = (8, 32)

# image (1, C, H, W), class (1,), S, key of the draws -> map (1, H, W)
Explain = Callable[[Tensor, Tensor, int, int], Tensor]
# image, class, key -> map for every S
Every = Callable[[Tensor, Tensor, int], dict[int, Tensor]]


@dataclass(frozen=True)
class Form:
    """A method in one precision.

    Attributes:
        name: for the tables.
        samples: S at which it is measured, in ascending order.
        explain: the call that is timed.
        every: its maps for all S, of the samples of the largest.
    """

    name: str
    samples: tuple[int, ...]
    explain: Explain
    every: Every


class Shared:
    """The contributions of one photograph at the largest S, for several forms of dave-fast."""

    def __init__(self, explainer: DAVE, samples: int) -> None:
        self.explainer, self.samples = explainer, samples
        self.key: int | None = None
        self.kept = torch.empty(0)

    def of(self, image: Tensor, label: Tensor, key: int) -> Tensor:
        """Return the contributions (1, S, C, H, W) of a photograph, computed once for equal keys."""
        if key != self.key:
            self.kept = contributions_of(self.explainer, image, label, self.samples, (key,), 0)
            self.key = key
        return self.kept


def own_forms(model: str, noise_alpha: float, most: int) -> list[Form]:
    """Return dave-fast in its default precision and in fp32, each with shrinkage and then without.

    Args:
        model: its name, so that the explainer owns the weights, as for a user of the command line.
        noise_alpha: of all forms.
        most: the largest S.
    """
    best = DAVE(model, noise_alpha=noise_alpha).precision
    found = []
    for precision in dict.fromkeys((best, "fp32")):
        samples = tuple(s for s in (OWN_SAMPLES if precision == best else FP32_SAMPLES) if s <= most)
        shrunk, plain = (
            DAVE(model, precision=precision, noise_alpha=noise_alpha, shrink=shrink) for shrink in (True, False)
        )
        shared = Shared(plain, samples[-1])
        for name, explainer in ((f"dave-fast {precision}", shrunk), (f"dave-fast {precision}, the paper's map", plain)):
            every = partial(_every_own, explainer, shared, samples)
            found.append(Form(name, samples, partial(_explain_own, explainer), every))
    return found


def _explain_own(explainer: DAVE, image: Tensor, label: Tensor, samples: int, key: int) -> Tensor:
    return explainer.explain(image, label, samples, image_keys=(key,)).maps


def _every_own(
    explainer: DAVE, shared: Shared, samples: Sequence[int], image: Tensor, label: Tensor, key: int
) -> dict[int, Tensor]:
    """Return maps of the first samples: in the default schedule these are the samples of a call with fewer."""
    kept = shared.of(image, label, key)
    return {s: explainer.aggregate(kept[:, :s].contiguous())[1] for s in samples}


def authors_form(checkout: Path, model: nn.Module, noise_alpha: float, most: int) -> Form:
    """Return the authors' code on a copy of a timm VisionTransformer; it draws anew at every call.

    Of the samples of the largest S, those with noise levels nearest to the levels of a smaller S make its map.
    """
    theirs = authors.load_explainer(checkout, copy.deepcopy(model), noise_alpha)
    samples = tuple(s for s in OTHER_SAMPLES if s <= most)

    def explain(image: Tensor, label: Tensor, samples: int, key: int) -> Tensor:
        made: Tensor = theirs.explain(image, label, samples)
        return made[:, 0]

    def every(image: Tensor, label: Tensor, key: int) -> dict[int, Tensor]:
        with patch.object(theirs, "_aggregate_maps", wraps=theirs._aggregate_maps) as aggregated:
            found = {samples[-1]: explain(image, label, samples[-1], key)}
        (kept,) = aggregated.call_args.args
        for s in samples[:-1]:
            nearest = np.linspace(0, len(kept) - 1, s).round().astype(int)
            found[s] = theirs.post_proc(theirs._aggregate_maps([kept[at] for at in nearest]))[:, 0]
        return found

    return Form(AUTHORS, samples, explain, every)


def captum_forms(model: nn.Module, precision: str, deviation: float, most: int) -> list[Form]:
    """Return captum's integrated gradients and SmoothGrad, ⊙ input, with as many passes as samples.

    Args:
        model: the model.
        precision: of its passes.
        deviation: the smallest standard deviation of the preprocessing, which makes SmoothGrad's usual noise.
        most: the largest S.
    """
    inner = Within(model, DTYPES[precision]).eval()
    samples = tuple(s for s in CAPTUM_SAMPLES if s <= most)
    found = []
    for method in ("integrated gradients", "SmoothGrad"):

        def explain(image: Tensor, label: Tensor, samples: int, key: int, method: str = method) -> Tensor:
            attribute = METHODS[method].make(inner, MethodSettings(samples, spread=1 / deviation))
            return smooth(attribute(image, label, (key,), 0))

        def every(image: Tensor, label: Tensor, key: int, explain: Explain = explain) -> dict[int, Tensor]:
            return {s: explain(image, label, s, key) for s in samples}

        found.append(Form(f"{method}, {precision}", samples, explain, every))
    return found
