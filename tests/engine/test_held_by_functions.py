"""What hooks, tables and objects know of a model: its modules by identity, factors that change, what they collect."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dave_fast import DAVE
from dave_fast.given.isolation import isolated
from dave_fast.models.fingerprint import structure
from tests.engine.cases import EXPLAINED, explained, off, outcome
from tests.engine.own_models import Own, images, own_model

FACTORS: dict[Any, float] = {}
SEEN: dict[str, Tensor] = {}
FACTOR, OTHER = 1.0, {"factor": 1.0}


def _by_global(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * FACTORS.get(module, 1.0)


class Table:
    """Factors of modules by their id."""

    def __init__(self, *modules: nn.Module) -> None:
        self.factors = {id(module): 3.0 for module in modules}

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.factors.get(id(module), 1.0)


class Asks(Own):
    """A model that asks its own table whether a module is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = None
        self.key: Callable[[nn.Module], Any] = lambda module: module

    def attend(self, x: Tensor) -> Tensor:
        return super().attend(x) * (3.0 if self.key(self.proj) in self.table else 1.0)


def _asks(table: Callable[[Any], Any], key: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = own_model(Asks)
        model.key, model.table = key, table(key(model.proj))
        return model

    return make


def _hooked(make: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = own_model()
        model.fc2.register_forward_hook(make(model.fc2))
        return model

    return build


def _globally(layer: nn.Linear) -> Any:
    FACTORS[layer] = 3.0
    return _by_global


def _through_an_object(layer: nn.Linear) -> Any:
    table = Table(layer)
    return lambda *call: table(*call)


def _through_itself(layer: nn.Linear) -> Any:
    table: dict[str, Any] = {"layer": layer}
    table["table"] = table
    return lambda module, _, output: output * (3.0 if table["table"]["layer"] is module else 1.0)


def _in_a_table(table: Any, key: Callable[[nn.Module], Any] = lambda module: module) -> Any:
    return lambda module, _, output: output * (3.0 if key(module) in table else 1.0)


class Weakly(Own):
    """A model that calls its head by a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.last = [weakref.ref(self.head), weakref.WeakMethod(self.doubled)]

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self.proj(x)

    def scaled(self, u: Tensor) -> Tensor:
        return self.last[1]()(u.unflatten(-1, (2, -1)).sum(-2)).repeat(1, 1, 2)


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "dict by module": _asks(lambda key: {key: 1}, lambda module: module),
    "dict by id": _asks(lambda key: {key: 1}, id),
    "defaultdict by id": _asks(lambda key: defaultdict(int, {key: 1}), id),
    "set of ids": _asks(lambda key: {key}, id),
    "list of ids": _asks(lambda key: [key], id),
    "weak keys": _asks(lambda key: weakref.WeakKeyDictionary({key: 1}), lambda module: module),
    "weak set": _asks(lambda key: weakref.WeakSet([key]), lambda module: module),
    "weak method": lambda: own_model(Weakly),
    "hook, global dict": _hooked(_globally),
    "hook, dict by module": _hooked(lambda layer: _in_a_table({layer: 1})),
    "hook, dict by id": _hooked(lambda layer: _in_a_table({id(layer): 1}, id)),
    "hook, set": _hooked(lambda layer: _in_a_table({layer})),
    "hook, frozen set of ids": _hooked(lambda layer: _in_a_table(frozenset([id(layer)]), id)),
    "hook, object": _hooked(_through_an_object),
    "hook that is an object": _hooked(Table),
    "hook, dict that holds itself": _hooked(_through_itself),
}


@pytest.mark.parametrize("name", KNOWN)
def test_modules_that_are_known_by_identity_are_those_of_the_copy(name: str):
    assert outcome(KNOWN[name], images()) == EXPLAINED


def test_hooks_that_share_a_list_are_explained():
    def build() -> nn.Module:
        model, kept = own_model(), []
        model.proj.register_forward_hook(lambda module, _, output: kept.append(output))
        model.fc2.register_forward_hook(lambda module, _, output: output + kept.pop())
        return model

    assert outcome(build, images()) == EXPLAINED


def _keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
    SEEN["tokens"] = output


class Reads(Own):
    """A model whose forward reads what a hook has put into a global table."""

    def scaled(self, u: Tensor) -> Tensor:
        return u + SEEN["tokens"].repeat(1, 1, 2)


def test_a_global_that_a_hook_writes_and_a_method_reads_is_one():
    def build() -> nn.Module:
        model = own_model(Reads)
        model.proj.register_forward_hook(_keep)
        return model

    assert outcome(build, images()) == EXPLAINED


def _scaled_by(get: Callable[[], Any]) -> Any:
    return lambda module, inputs, output: output * get()


class Factor:
    """A factor, applied by a method or by a call."""

    def __init__(self) -> None:
        self.factor = 1.0

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.factor

    __call__ = hook


def _cell() -> tuple[Any, Callable[[], None]]:
    factor = 1.0

    def change() -> None:
        nonlocal factor
        factor = 3.0

    return lambda module, inputs, output: output * factor, change


def _changed(hook: Callable[[Any], Any], holder: Any, change: Callable[[Any], Any]) -> tuple[Any, Callable[[], Any]]:
    return hook(holder), lambda: change(holder)


def _set(holder: Any) -> None:
    holder.factor = 3.0


def _global(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * FACTOR * OTHER["factor"]


FACTOR_CHANGES: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {
    "cell": _cell,
    "dict": lambda: _changed(lambda d: lambda m, i, o: o * d["a"], {"a": 1.0}, lambda d: d.update(a=3.0)),
    "list": lambda: _changed(lambda d: lambda m, i, o: o * d[0], [1.0], lambda d: d.append(d.pop() * 3)),
    "tensor": lambda: _changed(lambda t: lambda m, i, o: o * t.to(o), torch.ones(1), lambda t: t.mul_(3)),
    "tensor in a dict": lambda: _changed(
        lambda d: lambda m, i, o: o * d["a"].to(o), {"a": torch.ones(1)}, lambda d: d.update(a=torch.full((1,), 3.0))
    ),
    "object": lambda: _changed(lambda f: lambda m, i, o: o * f.factor, Factor(), _set),
    "method": lambda: _changed(lambda f: f.hook, Factor(), _set),
    "callable object": lambda: _changed(lambda f: f, Factor(), _set),
    "function in a function": lambda: _changed(
        lambda d: _scaled_by(lambda: d["a"]), {"a": 1.0}, lambda d: d.update(a=3.0)
    ),
}


def _follows(model: nn.Module, change: Callable[[], Any]) -> None:
    """Assert that an explainer follows a change of the model."""
    explainer = DAVE(model, precision="fp64", noise_alpha=0.0, route="frozen")
    with torch.no_grad():
        assert off(explainer.predict(images()), model(images()).double()) < 1e-5
        change()
        assert off(explainer.predict(images()), model(images()).double()) < 1e-5


@pytest.mark.parametrize("holder", FACTOR_CHANGES)
def test_a_factor_that_a_hook_holds_is_that_of_the_call(holder: str):
    hook, change = FACTOR_CHANGES[holder]()
    model = own_model()
    model.fc2.register_forward_hook(hook)
    _follows(model, change)


@pytest.mark.parametrize("name", ["FACTOR", "OTHER"])
def test_a_global_that_a_hook_names_is_that_of_the_call(name: str, monkeypatch):
    model = own_model()
    model.fc2.register_forward_hook(_global)
    value = 3.0 if name == "FACTOR" else {"factor": 3.0}
    _follows(model, lambda: monkeypatch.setitem(globals(), name, value))


def test_a_setting_of_an_object_on_a_model_is_that_of_the_call():
    model = own_model(scaled=lambda u: u)
    model.settings = Factor()
    model.scaled = lambda u: u * model.settings.factor
    _follows(model, lambda: setattr(model.settings, "factor", 3.0))


class Collected(dict[str, Any]):
    """A dictionary of a class of its own."""


@pytest.mark.parametrize("kind", [dict, list, Collected])
def test_collecting_changes_no_explanation_and_makes_no_new_route(kind: type, monkeypatch):
    model, kept = own_model(), kind()
    collect = kept.append if kind is list else lambda output: kept.__setitem__("tokens", output)
    model.fc2.register_forward_hook(lambda module, _, output: collect(output))
    explainer = DAVE(model, precision="fp64", noise_alpha=0.0, route="frozen")
    first = explainer.predict(images())
    assert kind is Collected or len(kept) == 0
    made: list[int] = []
    monkeypatch.setattr("dave_fast.explain.route_cache.make_route", lambda *_, **__: made.append(1))
    model(images())
    assert torch.equal(explainer.predict(images()), first)
    assert made == []


def test_items_of_data_that_an_object_holds_are_not_read_at_every_call():
    class Item(str):
        __slots__ = ()
        reads = 0

        @property
        def __class__(self) -> type:
            Item.reads += 1
            return str

    model = own_model()
    model.settings = Factor()
    model.settings.files = [Item("file")] * 2000
    structure(model)
    assert Item.reads == 0
    model.settings.files = model.settings.files[:1]
    structure(model)
    assert Item.reads > 0


def test_a_data_set_on_a_model_is_not_copied():
    model = own_model()
    model.data = TensorDataset(torch.zeros(3, 2))
    model.loader, model.optimizer = DataLoader(model.data), torch.optim.AdamW(model.parameters())
    made = isolated(model, torch.float64)
    assert all(getattr(made, name) is getattr(model, name) for name in ("data", "loader", "optimizer"))


@pytest.mark.slow
def test_an_exported_model_is_explained():
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(own_model(), (images(),), dynamic_shapes=({0: batch},))
    model = program.module()
    gradient, output = explained(model, images())
    expected, plain = explained(own_model(), images())
    assert off(output, plain.double()) < 1e-6
    assert off(gradient, expected.double()) < 1e-9
