"""What users keep in a model beside its parameters and buffers: it is part of what is explained, and left untouched."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dave_fast import DAVE
from tests.engine.cases import EXPLAINED, REFUSED, changes, outcome, state, thinned
from tests.engine.own_models import HEADS, WIDTH, Own, images, own_model
from tests.engine.wrappers import WRAPPERS
from tests.variants import ENGINE

IMAGES = images()
PRECISIONS = ("bf16", "fp32", "fp64")
# in each run of CI the lowest precision, whose conversion is the farthest
SOME = thinned(PRECISIONS, 3)


# complex numbers and tensors that are neither parameter nor buffer, in every precision


def _turn(dtype: torch.dtype = torch.complex64) -> Tensor:
    angle = torch.outer(torch.arange(16.0), 100 ** (-torch.arange(WIDTH // HEADS / 2) / (WIDTH // HEADS / 2)))
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs of components; in at least float32, since there are no complex numbers of half precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Complex(Own):
    """Rotary embeddings by complex numbers that are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", _turn(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, self.turn)


class ComplexAttribute(Own):
    def __init__(self) -> None:
        super().__init__()
        self.turn = _turn()

    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, self.turn)


class ComplexInAList(ComplexAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.turns = [self.turn, self.turn.conj()]
        del self.turn

    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, self.turns[1])


class ComplexParameter(Own):
    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.linspace(0, 3, 8))
        self.turn = nn.Parameter(torch.polar(torch.ones(8), torch.linspace(0, 3, 8)))

    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, self.turn)


class ComplexMadeInForward(Own):
    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, _turn().to(x.device))


class ComplexOfDoubles(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", _turn(torch.complex128))

    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, self.turn)


class ComplexPairs(Own):
    """The same rotation with cosines and sines as a real buffer of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.view_as_real(_turn()))

    def turned(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.pairs.to(x.dtype).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class ComplexFilter(Own):
    """A learnt filter of the images' frequencies ahead of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.polar(torch.linspace(0.5, 1, 17), torch.linspace(0, 1, 17)))

    def before(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.fft.irfft(torch.fft.rfft(wide) * self.gain, n=x.shape[-1]).to(x.dtype)


class ComplexNumber(Own):
    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, torch.tensor([0.6 + 0.8j]))


class ComplexModule(Own):
    def __init__(self) -> None:
        super().__init__()
        self.rope = nn.Module()
        self.rope.register_buffer("turn", _turn())

    def turned(self, x: Tensor) -> Tensor:
        return _rotated(x, self.rope.turn)


COMPLEX = (
    Complex,
    ComplexAttribute,
    ComplexInAList,
    ComplexParameter,
    ComplexMadeInForward,
    ComplexOfDoubles,
    ComplexPairs,
    ComplexFilter,
    ComplexNumber,
    ComplexModule,
)


@pytest.mark.parametrize("precision", SOME)
@pytest.mark.parametrize("kind", thinned(COMPLEX, 2))
def test_complex_numbers_keep_their_imaginary_part(kind: type[Own], precision: str):
    found = outcome(lambda: own_model(kind), IMAGES, precision=precision)
    # a complex parameter cannot be moved to half precision
    assert found == EXPLAINED or (kind is ComplexParameter and precision == "bf16")


MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))


class Pair(NamedTuple):
    mean: Tensor
    std: Tensor


@dataclasses.dataclass
class Constants:
    mean: Tensor
    std: Tensor


def _by_default(x: Tensor, mean: Tensor = MEAN, std: Tensor = STD) -> Tensor:
    return (x - mean) / std


def _read(get: Callable[[nn.Module], tuple[Any, Any]]) -> Callable[[nn.Module, Tensor], Tensor]:
    def before(self: nn.Module, x: Tensor) -> Tensor:
        mean, std = get(self)
        return (x - mean) / std

    return before


# where the constants of a normaliser are kept: a method of the model, and the attributes that it reads
KEPT: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "attributes": (_read(lambda m: (m.mean, m.std)), {"mean": MEAN, "std": STD}),
    "a list": (_read(lambda m: m.kept), {"kept": [MEAN, STD]}),
    "a tuple": (_read(lambda m: m.kept), {"kept": (MEAN, STD)}),
    "a dict": (_read(lambda m: (m.kept["mean"], m.kept["std"])), {"kept": {"mean": MEAN, "std": STD}}),
    "nested": (_read(lambda m: m.kept["a"][0]), {"kept": {"a": [(MEAN, STD)]}}),
    "a named tuple": (_read(lambda m: (m.kept.mean, m.kept.std)), {"kept": Pair(MEAN, STD)}),
    "a dataclass": (_read(lambda m: (m.kept.mean, m.kept.std)), {"kept": Constants(MEAN, STD)}),
    "a namespace": (_read(lambda m: (m.kept.mean, m.kept.std)), {"kept": types.SimpleNamespace(mean=MEAN, std=STD)}),
    "globals": (_read(lambda m: (MEAN, STD)), {}),
    "default arguments": (lambda self, x: _by_default(x), {}),
    "a partial": (lambda self, x: self.kept(x), {"kept": functools.partial(_by_default, mean=MEAN)}),
    "arrays": (
        lambda self, x: (x - torch.from_numpy(self.kept[0]).to(x)) / torch.from_numpy(self.kept[1]).to(x),
        {"kept": (MEAN.numpy(), np.array([0.2, 0.3, 0.4], np.float32).reshape(1, 3, 1, 1))},
    ),
    "numbers": (lambda self, x: (x - torch.tensor(self.kept).view(1, 3, 1, 1)) / 0.3, {"kept": [0.4, 0.5, 0.6]}),
}


# float32 that is in no attribute of the model stays float32, which a convolution in bfloat16 does not take
OUT_OF_REACH = ("globals", "default arguments", "a partial", "numbers")


@pytest.mark.parametrize("precision", SOME)
@pytest.mark.parametrize("where", thinned(KEPT, 2))
def test_plain_tensors_are_converted_with_the_model(where: str, precision: str):
    before, kept = KEPT[where]
    kind = type("Normalised", (Own,), {"before": before})
    found = outcome(lambda: own_model(kind, **copy.copy(kept)), IMAGES, precision=precision)
    assert found == EXPLAINED or (precision == "bf16" and where in OUT_OF_REACH)


def test_tensors_of_a_class_are_converted_and_left_as_they_are():
    kind = type("Normalised", (Own,), {"mean": MEAN, "std": STD, "before": _read(lambda m: (m.mean, m.std))})
    outcome(lambda: own_model(kind), IMAGES, precision="bf16")
    for precision in ("fp32", "fp64"):
        assert outcome(lambda: own_model(kind), IMAGES, precision=precision) == EXPLAINED
    assert kind.mean is MEAN and MEAN.dtype == torch.float32


@pytest.mark.parametrize("precision", SOME)
def test_a_normaliser_of_plain_tensors_around_a_library_model_is_explained(precision: str):
    variant = ENGINE["vit"]
    build = lambda: WRAPPERS["standardised"](variant.build())  # noqa: E731
    assert outcome(build, variant.images(), precision=precision) == EXPLAINED


# leaves with requires_grad that are no parameters: constants of the function that is explained

GLOBAL_SCALE = torch.tensor(0.7, requires_grad=True)


class InClass(Own):
    scale = torch.tensor(0.7, requires_grad=True)

    def scaled(self, u: Tensor) -> Tensor:
        return u * self.scale


def _leaf() -> Tensor:
    return torch.tensor(0.7, requires_grad=True)


def _by_attribute(name: str, value: Callable[[], Any], get: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    kind = type("Scaled", (Own,), {"scaled": lambda self, u: u * get(getattr(self, name))})
    return lambda: own_model(kind, **{name: value()})


def _by_closure() -> nn.Module:
    scale = _leaf()
    return own_model(type("Scaled", (Own,), {"scaled": lambda self, u: u * scale}))


def _unregistered() -> nn.Module:
    return own_model(type("Scaled", (Own,), {"scaled": lambda self, u: self.hidden[0](u)}), hidden=[nn.Linear(64, 64)])


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "an attribute": _by_attribute("scale", _leaf, lambda v: v),
    "a list": _by_attribute("scales", lambda: [_leaf()], lambda v: v[0]),
    "a dict": _by_attribute("scales", lambda: {"a": _leaf()}, lambda v: v["a"]),
    "a tuple": _by_attribute("scales", lambda: (1, _leaf()), lambda v: v[1]),
    "an object": _by_attribute("scales", lambda: types.SimpleNamespace(a=_leaf()), lambda v: v.a),
    "a parameter in a list": _by_attribute("scales", lambda: [nn.Parameter(torch.tensor(0.7))], lambda v: v[0]),
    "computed from a leaf": _by_attribute("scale", lambda: 2 * _leaf(), lambda v: v),
    "a view of a leaf": _by_attribute("scale", lambda: torch.ones(3, requires_grad=True)[1], lambda v: v),
    "a buffer": _by_attribute("scale", lambda: nn.Buffer(_leaf()), lambda v: v),
    "a closure": _by_closure,
    "the class": lambda: own_model(InClass),
    "a global": lambda: own_model(type("Scaled", (Own,), {"scaled": lambda self, u: u * GLOBAL_SCALE})),
    "made in forward": lambda: own_model(type("Scaled", (Own,), {"scaled": lambda self, u: u * _leaf()})),
    "a module in a list": _unregistered,
}


@pytest.mark.parametrize("precision", thinned(["fp64", "fp32"], 2))
@pytest.mark.parametrize("where", thinned(LEAVES, 2))
def test_a_leaf_with_a_gradient_is_a_constant(where: str, precision: str):
    found = outcome(_same_at_every_call(LEAVES[where]), IMAGES, precision=precision)
    assert found == EXPLAINED or where == "a module in a list"
    assert GLOBAL_SCALE.grad is None and InClass.scale.grad is None


def _same_at_every_call(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return make()

    return build


# what a model keeps of what it saw


def _keeps(**methods: Callable[..., Any]) -> type[Own]:
    return type("Keeps", (Own,), methods)


def _count(self: Any, **found: Tensor) -> None:
    self.count = getattr(self, "count", 0) + 1


def _cached(self: Any, x: Tensor) -> Tensor:
    if x.shape not in self.cache:
        self.cache[x.shape] = torch.linspace(0.5, 1, x.shape[-1], dtype=x.dtype)
    return x * self.cache[x.shape]


def _buffered(self: Any, **found: Tensor) -> None:
    if "attention" in found:
        self.register_buffer("map", found["attention"], persistent=False)


def _moving(self: Any, **found: Tensor) -> None:
    """Update a statistic in place at every call, as code for training may do in evaluation too."""
    if "tokens" in found:
        self.statistic.mul_(0.9).add_(0.1 * found["tokens"].detach().mean().to(self.statistic))


def _retained(self: Any, **found: Tensor) -> None:
    for value in found.values():
        if value.requires_grad:
            value.retain_grad()
            value.register_hook(lambda gradient: setattr(self, "gradient", gradient))


KEEPERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: own_model(_keeps(seen=lambda self, **f: vars(self).update(f))),
    "a list": lambda: own_model(_keeps(seen=lambda self, **f: self.kept.extend(f.values())), kept=[]),
    "a dict": lambda: own_model(_keeps(seen=lambda self, **f: self.kept.update(f)), kept={}),
    "detached": lambda: own_model(
        _keeps(seen=lambda self, **f: self.kept.extend(v.detach() for v in f.values())), kept=[]
    ),
    "a count": lambda: own_model(_keeps(seen=_count)),
    "a cache": lambda: own_model(_keeps(before=_cached), cache={}),
    "a buffer": lambda: own_model(_keeps(seen=_buffered)),
    "an object": lambda: own_model(
        _keeps(seen=lambda self, **f: vars(self.kept).update(f)), kept=types.SimpleNamespace()
    ),
    "a statistic": lambda: own_model(_keeps(seen=_moving), statistic=nn.Buffer(torch.zeros(()))),
    "the images": lambda: own_model(_keeps(before=lambda self, x: vars(self).update(given=x) or 2 * x)),
    "gradients": lambda: own_model(_keeps(seen=_retained)),
}


@pytest.mark.parametrize("called", thinned([True, False], 2), ids=["called before", "fresh"])
@pytest.mark.parametrize("what", KEEPERS)
def test_what_a_model_keeps_changes_nothing(what: str, called: bool):
    def build() -> nn.Module:
        model = KEEPERS[what]()
        if called:
            model(IMAGES.to(next(model.parameters()).dtype)).sum().backward()
        return model

    assert outcome(build, IMAGES) == EXPLAINED
    model = build()
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = DAVE(model, precision="fp32", noise_alpha=0.1)
        for size in (32, 48, 32):
            assert explainer.explain(images(size), 2, n_samples=2).maps.isfinite().all()
    assert changes(before, state(model)) == []


# attributes that cannot be copied


def _numbers() -> Any:
    yield from range(10)


UNCOPYABLE: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "a reentrant lock": threading.RLock,
    "a condition": threading.Condition,
    "thread-local storage": threading.local,
    "a generator": _numbers,
    "a file": lambda: open(__file__),  # noqa: SIM115
    "a lambda": lambda: lambda x: x,
    "a module of Python's": lambda: re,
    "a weak reference": lambda: weakref.ref(IMAGES),
    "a weak dictionary": weakref.WeakKeyDictionary,
    "a memory view": lambda: memoryview(b"123"),
    "an object that forbids it": lambda: Stubborn(),
    "a lock in a list": lambda: [threading.Lock()],
    "a lock in an object": lambda: types.SimpleNamespace(lock=threading.Lock()),
}


class Stubborn:
    """An object that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not to be pickled")


@pytest.mark.parametrize("base", thinned(["library", "own"], 2))
@pytest.mark.parametrize("what", thinned(UNCOPYABLE, 2))
def test_an_attribute_that_cannot_be_copied_does_not_matter_or_is_named(what: str, base: str):
    made = []

    def build() -> nn.Module:
        model = ENGINE["vit"].build() if base == "library" else own_model()
        made.append(UNCOPYABLE[what]())
        (model if base == "own" else model.blocks[0].attn).of_the_user = made[-1]
        return model

    found = outcome(build, IMAGES)
    for each in made:
        getattr(each, "close", lambda: None)()
    assert found in (EXPLAINED, REFUSED)
