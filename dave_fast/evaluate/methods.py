"""The attribution methods of a comparison, DAVE among them, behind one signature.

An `Attribute` takes images (B, C, H, W), classes (B,), an integer key for each image and a seed, and returns signed
attributions (B, C, H, W); DAVE's returns its own maps (B, H, W) too, which take the spread of its samples. Each is a
gradient ⊙ input, so that methods differ in the gradient only; the reference input is 0, a normalised image's mean.
Baselines are captum's, with its defaults unless stated here, and those of `dave_fast.evaluate.packages`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import InputError, installing, suggestion
from dave_fast.evaluate.full_gradient import libra_fullgrad_plus
from dave_fast.evaluate.packages import attnlrp, legrad
from dave_fast.explain.depth import PIXELS, Depth
from dave_fast.explain.explainer import DAVE
from dave_fast.numbers import shown
from dave_fast.sampling import draw
from dave_fast.sampling.philox import WORD, splitmix64

# Signed attributions (B, C, H, W), or these and the method's own maps (B, H, W).
Attributed = Tensor | tuple[Tensor, Tensor]
Attribute = Callable[[Tensor, Tensor, Sequence[int], int], Attributed]

ROWS_AT_ONCE = 25
# SmoothGrad's usual share of the input's range
SMOOTHGRAD_SHARE = 0.15
# the extras of dave-fast that install packages of methods
EXTRAS = {"captum": "evaluate", "torchcam": "evaluate", "lxt": "lrp"}
CONTROLS = ("|x|", "uniform")
# a row beside DAVE where DAVE's maps are those of a block
AT_PIXELS = "DAVE, pixels"


@dataclass(frozen=True)
class MethodSettings:
    """How methods are run.

    Attributes:
        n_samples: of DAVE and SmoothGrad, and steps of integrated gradients.
        explainer: keyword arguments of every `DAVE`.
        spread: the range of a normalised pixel.
        depth: of DAVE's maps, one as `DAVE.explain` takes it.
    """

    n_samples: int = DEFAULT_SAMPLES
    explainer: dict[str, Any] = field(default_factory=dict)
    spread: float = 2.0
    depth: Depth = PIXELS

    def dave(self, model: nn.Module) -> DAVE:
        """Return a new explainer of a model, which the caller may change."""
        return DAVE(model, **self.explainer)


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes:
        make: model (in evaluation mode, on its device), settings -> Attribute; raises NotTakenError for a model that
            the method does not support.
        random: whether the result depends on the seed.
        passes: forward and backward passes for each image, for time estimates; None for one a sample.
        package: the package that must be installed, or None.
        make_shared: like `make`, for an Attribute of one image (1, C, H, W) and its key that returns a row for each
            class; None for methods in which the classes of an image share no work.
    """

    make: Callable[[nn.Module, MethodSettings], Attribute]
    random: bool = False
    passes: int | None = None
    package: str | None = None
    make_shared: Callable[[nn.Module, MethodSettings], Attribute] | None = None

    def cost(self, setup: MethodSettings) -> int:
        """Return the number of passes for each image."""
        return setup.n_samples if self.passes is None else self.passes


def choose(names: Sequence[str] | None, depth: Depth = PIXELS) -> tuple[dict[str, Method], dict[str, str]]:
    """Choose methods by name; None for all. DAVE and the controls always run, at a depth DAVE's map of the pixels too.

    Returns:
        The methods to run by name, and the reason for each that cannot run.

    Raises:
        InputError: a name is unknown.
    """
    beside = {} if depth == PIXELS else {AT_PIXELS: Method(_dave_at_pixels, random=True, make_shared=_shared_at_pixels)}
    names = None if names is None else [known_name(name) for name in names]
    chosen, absent = {}, {}
    for name, method in {"DAVE": METHODS["DAVE"], **beside, **METHODS}.items():
        if names is not None and name not in (*names, "DAVE", *beside, *CONTROLS):
            continue
        if method.package and find_spec(method.package) is None:
            absent[name] = f"the package {method.package} is missing: {installing(EXTRAS[method.package])}"
        else:
            chosen[name] = method
    return chosen, absent


def known_name(text: str) -> str:
    """Return the name of the method that a text means: case, dashes and spaces do not matter, nor x for ×.

    Raises:
        InputError: there is no such method.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]+", " ", name.casefold().replace("×", "x")).strip()

    known = {plain(name): name for name in METHODS}
    if not isinstance(text, str):
        raise InputError(f"a method is {shown(text)}; expected a name: {', '.join(METHODS)}")
    if plain(text) not in known:
        hint = suggestion(plain(text), list(known), ", ".join(METHODS))
        raise InputError(f"there is no method {shown(text)}: {hint}")
    return known[plain(text)]


def _dave(model: nn.Module, setup: MethodSettings) -> Attribute:
    explainer = setup.dave(model)

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        found = explainer.explain(images, classes, setup.n_samples, seed, depth=setup.depth, image_keys=keys)
        return found.raw.to(images), found.maps.to(images)

    return attribute


def _dave_shared(model: nn.Module, setup: MethodSettings) -> Attribute:
    """Return DAVE of several classes of one image with one forward walk for all; the maps equal those of `_dave`."""
    explainer = setup.dave(model)

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        found = explainer.explain(
            images, targets=classes, n_samples=setup.n_samples, seed=seed, depth=setup.depth, image_keys=keys
        )
        return found.raw[0].to(images), found.maps[0].to(images)

    return attribute


def _dave_at_pixels(model: nn.Module, setup: MethodSettings) -> Attribute:
    return _dave(model, replace(setup, depth=PIXELS))


def _shared_at_pixels(model: nn.Module, setup: MethodSettings) -> Attribute:
    return _dave_shared(model, replace(setup, depth=PIXELS))


def contributions_of(
    explainer: DAVE, image: Tensor, classes: Tensor, n_samples: int, keys: Sequence[int], seed: int
) -> Tensor:
    """Return the contributions of the samples of one image (1, C, H, W) to its classes (K,), (K, S, C, H, W)."""
    height, width = image.shape[-2:]
    draws = draw(n_samples, height=height, width=width, seed=seed, image_keys=keys, sampling=explainer.sampling)
    shape = len(classes), len(draws), *image.shape[1:]
    kept = torch.empty(shape, dtype=explainer.statistics_dtype, device=explainer.device)
    rows = explainer.fitting_rows(image)
    for start in range(0, len(draws), rows):
        some = slice(start, start + rows)
        kept[:, some] = explainer.contributions(image, draws[some], classes[None])
    return kept


def _frozen(model: nn.Module, setup: MethodSettings) -> Attribute:
    explainer = setup.dave(model)
    return lambda images, classes, keys, seed: explainer.effective_gradient(images, classes).to(images) * images


def _input_gradient(model: nn.Module, setup: MethodSettings) -> Attribute:
    from captum.attr import InputXGradient

    method = InputXGradient(model)
    return lambda images, classes, keys, seed: method.attribute(
        images.clone().requires_grad_(), target=classes
    ).detach()


def _integrated(model: nn.Module, setup: MethodSettings) -> Attribute:
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> Tensor:
        rows = max(ROWS_AT_ONCE, len(images))
        found = method.attribute(images, target=classes, n_steps=setup.n_samples, internal_batch_size=rows)
        return found.detach().to(images)

    return attribute


def _smoothgrad(model: nn.Module, setup: MethodSettings) -> Attribute:
    """Return the mean gradient over noisy copies ⊙ the clean input; noise depends on the image's key and the seed."""
    from captum.attr import NoiseTunnel, Saliency

    tunnel = NoiseTunnel(Saliency(model))

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> Tensor:
        found = torch.empty_like(images)
        devices = [images.device] if images.device.type == "cuda" else []
        for row, key in enumerate(keys):
            with torch.random.fork_rng(devices):
                # masked to 32 bits because a CPU generator ignores the others
                torch.manual_seed(splitmix64(splitmix64(seed) ^ key) & WORD)
                gradient = tunnel.attribute(
                    images[row : row + 1].clone().requires_grad_(),
                    target=int(classes[row]),
                    abs=False,
                    nt_samples=setup.n_samples,
                    nt_samples_batch_size=ROWS_AT_ONCE,
                    stdevs=SMOOTHGRAD_SHARE * setup.spread,
                )
            found[row] = gradient[0].detach() * images[row]
        return found

    return attribute


METHODS = {
    "DAVE": Method(_dave, random=True, make_shared=_dave_shared),
    "frozen gradient": Method(_frozen, passes=1),
    "input × gradient": Method(_input_gradient, passes=1, package="captum"),
    "integrated gradients": Method(_integrated, package="captum"),
    "SmoothGrad": Method(_smoothgrad, random=True, package="captum"),
    "Libra FullGrad+": Method(libra_fullgrad_plus, passes=1),
    "LeGrad": Method(legrad, passes=1, package="torchcam"),
    "AttnLRP": Method(attnlrp, passes=1, package="lxt"),
    CONTROLS[0]: Method(lambda model, setup: lambda images, classes, keys, seed: images.abs(), passes=0),
    CONTROLS[1]: Method(lambda model, setup: lambda images, classes, keys, seed: torch.ones_like(images), passes=0),
}
