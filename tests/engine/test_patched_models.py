"""What users do to a model: it is explained as it is, exactly, or refused in plain words, and left untouched."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dave_fast import DAVE
from dave_fast.models.fingerprint import _known_places
from tests.engine.cases import EXPLAINED, REFUSED, answer, expectation, judged, off, outcome, thinned
from tests.engine.effects import effects
from tests.engine.own_models import Own, images, own_model
from tests.engine.patches import INNER, Damped, Wrapped, replace
from tests.engine.wrappers import WRAPPERS
from tests.held import truth
from tests.tolerances import OF_THE_TRUTH
from tests.variants import CLASSES, ENGINE

IMAGES, CLASSES_OF_IMAGES = images(), torch.tensor([2, 5])
ROUTES = ("auto", "frozen", "engine")
PRECISIONS = ("bf16", "fp32", "fp64")


# changes drawn at random, twelve of each kind


@pytest.mark.parametrize("seed", thinned(range(12), 6))
@pytest.mark.parametrize("kind", INNER)
def test_a_changed_model_is_explained_as_it_is_or_refused(kind: str, seed: int):
    rng = Random(f"{kind} {seed}")
    variant = ENGINE[rng.choice(["vit", "vit-swiglu", "vit-registers", "deit-distilled", "eva02", "beit"])]
    with ExitStack() as undo:
        change = INNER[kind](rng, undo)
        outcome(lambda: change(variant.build()), variant.images(), route=ROUTES[seed % 3])


@pytest.mark.parametrize("name", thinned(WRAPPERS, 2))
def test_a_wrapped_model_is_explained_as_it_is_or_refused(name: str):
    variant = ENGINE["vit"]
    found = outcome(lambda: WRAPPERS[name](variant.build()), variant.images())
    assert found == (REFUSED if name in ("probabilities", "one of two results", "a cut") else EXPLAINED)


# the engine reads a model by its class: what stands in the class's place is what has to be explained


def _damped(before: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *args, **kwargs: 0.1 * before(self, *args, **kwargs)


METHODS = [
    ("vit", timm.layers.Attention, "forward"),
    ("vit", timm.layers.Mlp, "forward"),
    ("vit", timm.layers.PatchEmbed, "forward"),
    ("vit", timm.models.vision_transformer.Block, "forward"),
    ("vit", timm.models.vision_transformer.VisionTransformer, "forward"),
    ("vit", timm.models.vision_transformer.VisionTransformer, "forward_features"),
    ("vit", timm.models.vision_transformer.VisionTransformer, "forward_head"),
    ("vit", timm.models.vision_transformer.VisionTransformer, "_pos_embed"),
    ("vit-average", timm.models.vision_transformer.VisionTransformer, "pool"),
    ("deit3", timm.layers.LayerScale, "forward"),
    ("deit-distilled", timm.models.deit.VisionTransformerDistilled, "forward_head"),
    ("eva02", timm.models.eva.EvaAttention, "forward"),
    ("beit", timm.models.beit.Attention, "forward"),
    ("relative-position", timm.models.vision_transformer_relpos.RelPosAttention, "forward"),
]


@pytest.mark.parametrize("method", thinned(METHODS, 2))
@pytest.mark.parametrize("route", thinned(["auto", "frozen"], 2))
def test_a_method_replaced_in_its_class_is_explained(method: tuple[str, type, str], route: str):
    variant, owner, name = method
    with ExitStack() as undo:
        replace(undo, owner, name, _damped(getattr(owner, name)))
        assert outcome(ENGINE[variant].build, ENGINE[variant].images(), route=route) == EXPLAINED


@pytest.mark.parametrize(
    "name", ["forward", "forward_features", "forward_head", "_pos_embed", "pool", "blocks.0", "blocks.1.attn", "norm"]
)
def test_a_method_replaced_in_the_instance_is_explained(name: str):
    def build() -> nn.Module:
        model = ENGINE["vit"].build()
        owner = model.get_submodule(name) if "." in name or name == "norm" else model
        method = "forward" if owner is not model else name
        plain = getattr(type(owner), method)
        setattr(owner, method, types.MethodType(_damped(plain), owner))
        return model

    assert outcome(build, ENGINE["vit"].images()) == EXPLAINED


WEIGHTS_OF_NORM = torch.linspace(0.2, 2, 32)
# what is put in place between two calls of one explainer, and taken away again
BETWEEN: dict[str, Callable[[nn.Module, ExitStack], Any]] = {
    "a method of a class": lambda m, undo: _weighted(undo, timm.layers.Attention, "forward"),
    "a method of the model's class": lambda m, undo: _weighted(undo, type(m), "forward_features"),
    "a method of PyTorch's": lambda m, undo: _weighted(undo, nn.GELU, "forward"),
    "attention": lambda m, undo: _weighted(undo, F, "scaled_dot_product_attention"),
    "an activation": lambda m, undo: _weighted(undo, F, "gelu"),
    "a product": lambda m, undo: _weighted(undo, F, "linear"),
    "a norm": lambda m, undo: _weighted(undo, F, "layer_norm"),
    "a function of the library": lambda m, undo: _weighted(undo, timm.models.vision_transformer, "global_pool_nlc"),
    "a hook of all modules": lambda m, undo: undo.callback(
        nn.modules.module.register_module_forward_hook(_weight_of_mlp).remove
    ),
    "a hook before all modules": lambda m, undo: undo.callback(
        nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: _weight_of_mlp(module, (), *args)
        ).remove
    ),
    "a hook of one module": lambda m, undo: undo.callback(m.norm.register_forward_hook(_weight_of_all).remove),
    "a method of the instance": lambda m, undo: _weighted(undo, m.blocks[0].mlp, "forward"),
    "an object": lambda m, undo: replace(undo, m, "forward_features", Wrapped(m.forward_features, _weight)),
    "a setting": lambda m, undo: replace(undo, m.blocks[0].norm1, "eps", 2.0),
    "a module": lambda m, undo: _exchanged(undo, m.blocks[0].mlp, "act", nn.ReLU()),
    "a parameter": lambda m, undo: _exchanged(undo, m.fc_norm, "weight", nn.Parameter(WEIGHTS_OF_NORM)),
}


def _weight(y: Tensor, x: Any = None) -> Tensor:
    return y * torch.linspace(0.2, 1.5, y.shape[-1], dtype=y.dtype)


def _weighted(undo: ExitStack, owner: Any, name: str) -> None:
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def function(*args: Any, **kwargs: Any) -> Tensor:
        return _weight(plain(*args, **kwargs))

    replace(undo, owner, name, function)


def _weight_of_mlp(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return _weight(output) if isinstance(module, timm.layers.Mlp) else None


def _weight_before_mlp(module: nn.Module, args: Any) -> Any:
    return (_weight(args[0]),) if isinstance(module, timm.layers.Mlp) else None


def _weight_of_all(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return _weight(output)


def _exchanged(undo: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@pytest.mark.parametrize("route", thinned(["auto", "frozen"], 2))
@pytest.mark.parametrize("what", BETWEEN)
def test_what_changes_between_two_calls_is_explained_as_long_as_it_is_there(what: str, route: str):
    model, given = ENGINE["vit-average"].build(), ENGINE["vit-average"].images()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.0, route=route)
    before, _ = answer(explainer, given)
    with ExitStack() as undo:
        BETWEEN[what](model, undo)
        expected = expectation(lambda: copy.deepcopy(model), given)
        assert off(before, expected[1]) > 0.01
        found = judged(expected, lambda: answer(explainer, given))
        # a function in Python that stands for another one in Python may be refused
        assert found == EXPLAINED or what == "a norm"
    assert off(answer(explainer, given)[0], before) < OF_THE_TRUTH["fp64"]


@pytest.mark.parametrize("kind", ["object", "function", "partial"])
def test_what_a_model_calls_is_watched_though_something_else_stood_there_when_its_class_was_first_seen(kind: str):
    """A replacement at the first sight of a class must not hide later ones at the same place."""
    attention = F.scaled_dot_product_attention

    def weighted(*args: Any, **kwargs: Any) -> Tensor:
        return _weight(attention(*args, **kwargs))

    first = {"object": Wrapped(attention, _weight), "function": weighted, "partial": functools.partial(weighted)}[kind]
    model, given = ENGINE["vit-average"].build(), ENGINE["vit-average"].images()
    _known_places.clear()
    with ExitStack() as undo:
        replace(undo, F, "scaled_dot_product_attention", first)
        answer(DAVE(model, precision="fp64", noise_alpha=0.0), given)
    explainer = DAVE(model, precision="fp64", noise_alpha=0.0)
    before, _ = answer(explainer, given)
    with ExitStack() as undo:
        replace(undo, F, "scaled_dot_product_attention", weighted)
        expected = expectation(lambda: copy.deepcopy(model), given)
        assert off(before, expected[1]) > 0.01
        assert judged(expected, lambda: answer(explainer, given)) == EXPLAINED
    assert off(answer(explainer, given)[0], before) < OF_THE_TRUTH["fp64"]


# heads: all routes give one verdict


class Parts(nn.Module):
    """Two heads that a function joins."""

    def __init__(self, width: int, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.join = nn.Linear(width, CLASSES), nn.Linear(width, CLASSES), join

    def forward(self, z: Tensor) -> Tensor:
        return self.join(self.one(z), self.other(z))


class Cosine(nn.Module):
    """Cosine similarity with a learnt vector of each class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, width))

    def forward(self, z: Tensor) -> Tensor:
        return 10 * F.normalize(z, dim=-1) @ F.normalize(self.weight, dim=-1).T


class Then(nn.Module):
    """A linear head and a function of its output."""

    def __init__(self, width: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(width, CLASSES), function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self.layer(z))


# head of a width, and whether it has an effective gradient
HEADS_OF_USERS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "two layers": (lambda d: nn.Sequential(nn.Linear(d, 16), nn.GELU(), nn.Linear(16, CLASSES)), EXPLAINED),
    "norm first": (lambda d: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, CLASSES)), EXPLAINED),
    "dropout": (lambda d: nn.Sequential(nn.Dropout(0.5), nn.Linear(d, CLASSES)), EXPLAINED),
    "cosine": (Cosine, EXPLAINED),
    "mean of two": (lambda d: Parts(d, lambda a, b: (a + b) / 2), EXPLAINED),
    "larger of two": (lambda d: Parts(d, torch.maximum), EXPLAINED),
    "largest of parts": (lambda d: Parts(d, lambda a, b: torch.stack([a, b]).amax(0)), EXPLAINED),
    "gated": (lambda d: Parts(d, lambda a, b: a * torch.sigmoid(b)), EXPLAINED),
    "absolute": (lambda d: Then(d, torch.abs), EXPLAINED),
    "tanh": (lambda d: Then(d, torch.tanh), EXPLAINED),
    "tempered": (lambda d: Then(d, lambda z: z / 0.07), EXPLAINED),
    "softmax": (lambda d: nn.Sequential(nn.Linear(d, CLASSES), nn.Softmax(-1)), REFUSED),
    "log softmax": (lambda d: nn.Sequential(nn.Linear(d, CLASSES), nn.LogSoftmax(-1)), REFUSED),
    "sigmoid": (lambda d: nn.Sequential(nn.Linear(d, CLASSES), nn.Sigmoid()), REFUSED),
    "exponential": (lambda d: Then(d, torch.exp), REFUSED),
    "softplus": (lambda d: nn.Sequential(nn.Linear(d, CLASSES), nn.Softplus()), REFUSED),
    "square": (lambda d: Then(d, lambda z: z * z), REFUSED),
    "power": (lambda d: Then(d, lambda z: z**2), REFUSED),
    "product of two": (lambda d: Parts(d, torch.mul), REFUSED),
    "partly detached": (lambda d: Then(d, lambda z: z + z.detach()), REFUSED),
    "gate of its own": (lambda d: Then(d, lambda z: z * z.detach()), REFUSED),
    "all detached": (lambda d: Then(d, Tensor.detach), REFUSED),
    "in no_grad": (lambda d: Then(d, torch.no_grad()(lambda z: 2 * z)), REFUSED),
    "rounded": (lambda d: Then(d, torch.round), REFUSED),
}


@pytest.mark.parametrize("route", thinned(ROUTES, 3))
@pytest.mark.parametrize("name", HEADS_OF_USERS)
def test_a_head_is_explained_or_refused_on_every_route(name: str, route: str):
    make, verdict = HEADS_OF_USERS[name]

    def build() -> nn.Module:
        model = ENGINE["vit"].build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model.head = make(32).eval()
        return model

    assert outcome(build, ENGINE["vit"].images(), route=route) == verdict


# weights that are computed at every call


def _weight_norm_of_old(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer).weight_g.data.mul_(0.7)


def _pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)


def _pruned_for_good(layer: nn.Linear) -> None:
    _pruned(layer)
    prune.remove(layer, "weight")


def _computed_in_a_hook(layer: nn.Linear) -> None:
    """Compute the weight ahead of each call, as normalisations of one's own do."""
    weight = layer.weight
    del layer.weight
    layer.register_parameter("raw", nn.Parameter(weight.detach().clone()))

    def hook(module: nn.Module, args: Any) -> None:
        module.weight = 0.5 * module.raw / module.raw.norm(dim=1, keepdim=True)

    layer.register_forward_pre_hook(hook)
    hook(layer, None)


WEIGHTS: dict[str, Callable[[nn.Linear], Any]] = {
    "weight norm of old": _weight_norm_of_old,
    "weight norm": lambda layer: parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(0.7),
    "spectral norm of old": lambda layer: nn.utils.spectral_norm(layer).eval(),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Damped()),
    "own, of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", Damped()),
    "two": lambda layer: [parametrize.register_parametrization(layer, "weight", Damped()) for _ in range(2)],
    "own, taken off": lambda layer: (
        parametrize.register_parametrization(layer, "weight", Damped())
        and parametrize.remove_parametrizations(layer, "weight")
    ),
    "pruned": _pruned,
    "pruned for good": _pruned_for_good,
    "computed in a hook": _computed_in_a_hook,
}


@pytest.mark.parametrize("path", thinned(["blocks.1.mlp.fc1", "blocks.0.attn.qkv", "head"], 3))
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_computed_weight_is_the_weight_that_is_explained(name: str, path: str):
    def build() -> nn.Module:
        model = ENGINE["vit"].build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            WEIGHTS[name](model.get_submodule(path))
        return model.eval()

    assert outcome(build, ENGINE["vit"].images()) == EXPLAINED


def test_the_truth_sees_every_effect():
    # without this, the tests above could pass for patches that change nothing
    plain = truth(own_model().double(), IMAGES, CLASSES_OF_IMAGES)
    for name, act in effects(0.5).items():
        changed = truth(_with_effect(act), IMAGES, CLASSES_OF_IMAGES)
        # no constant that is added, and no order of tokens whose mean is taken, changes a gradient
        assert (changed is None) == (name in ("squared", "half detached", "straight through"))
        assert (changed is not None and torch.allclose(changed, plain)) == (name in ("nothing", "shifted"))


def _with_effect(act: Callable[..., Tensor]) -> nn.Module:
    model = own_model().double()
    model.attend = lambda x: act(Own.attend(model, x), x)
    return model
