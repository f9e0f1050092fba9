"""Several hundred models, each with one to four changes drawn at random: explained as they are, or refused."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from dave_fast import DAVE
from tests.engine.cases import BASES, EXPLAINED, answer, expectation, judged, outcome, patched
from tests.engine.patches import INNER
from tests.variants import ENGINE

pytestmark = pytest.mark.slow
BATCH = 20


@pytest.mark.parametrize("route", ["auto", "frozen", "engine"])
@pytest.mark.parametrize("first", range(0, 600, BATCH))
def test_twenty_changed_models_are_explained_as_they_are_or_refused(first: int, route: str):
    wrong, found = {}, Counter()
    for seed in range(first, first + BATCH):
        with patched(seed) as (changes, build, images):
            try:
                found[outcome(build, images, route=route)] += 1
            except Exception as error:
                wrong[seed] = f"{changes}: {type(error).__name__}: {error}"
    assert not wrong
    # a reader that refuses everything is never wrong; the engine alone has to refuse most of these
    assert route == "engine" or found[EXPLAINED] > BATCH / 4


@pytest.mark.parametrize("first", range(0, 240, BATCH))
def test_what_changes_between_two_calls_is_noticed(first: int):
    wrong, found = {}, Counter()
    for seed in range(first, first + BATCH):
        try:
            found[_changed_between_calls(Random(seed))] += 1
        except Exception as error:
            wrong[seed] = f"{type(error).__name__}: {error}"
    assert not wrong
    assert found[EXPLAINED] > BATCH / 4


def _changed_between_calls(rng: Random) -> str:
    """Explain a model, change it, and return the outcome of explaining it again by the same explainer."""
    variant = ENGINE[rng.choice(BASES)]
    given, images = variant.build(), variant.images()
    explainer = DAVE(given, precision="fp64", noise_alpha=0.0)
    plain, _ = answer(explainer, images)
    names = [rng.choice([name for name in INNER if name != "mode"]) for _ in range(rng.choice([1, 1, 2]))]
    with ExitStack() as undo:
        drawn = [INNER[name](rng, undo) for name in names]

        def changed(model: nn.Module) -> nn.Module:
            for change in drawn:
                model = change(model)
            return model

        expected = expectation(lambda: changed(variant.build()), images)
        changed(given)
        found = judged(expected, lambda: answer(explainer, images))
    if set(names) <= {"class", "library"}:
        # nothing of the changes is left
        torch.testing.assert_close(answer(explainer, images)[0], plain)
    return found


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _compiled_block(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def _compiled_and_hooked(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    model.blocks[0].attn.register_forward_hook(lambda module, args, output: 0.1 * output)
    return compiled


def _compiled_then_patched(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    plain = model.blocks[0].mlp.forward
    model.blocks[0].mlp.forward = lambda x: 0.1 * plain(x)
    return compiled


def _compiled_and_called(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    compiled(ENGINE["vit"].images(dtype=next(model.parameters()).dtype))
    return compiled


COMPILED = (
    _compiled,
    _compiled_in_place,
    _compiled_block,
    _compiled_and_hooked,
    _compiled_then_patched,
    _compiled_and_called,
)


@pytest.mark.parametrize("change", COMPILED)
def test_a_compiled_model_is_explained_as_it_is_or_refused(change: Callable[[nn.Module], nn.Module]):
    outcome(lambda: change(ENGINE["vit"].build()), ENGINE["vit"].images())
    torch.compiler.reset()


def _adapted(merged: bool, **settings: Any) -> Callable[[], nn.Module]:
    import peft

    def build() -> nn.Module:
        model = ENGINE["vit"].build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["qkv", "fc1"], **settings})
            adapted = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            # adapters start as zeros, as which they would change nothing
            if "lora_" in name and "magnitude" not in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        return adapted.merge_and_unload() if merged else adapted

    return build


ADAPTERS: dict[str, dict[str, Any]] = {
    "two layers": {},
    "all layers": {"target_modules": "all-linear"},
    "patches too": {"target_modules": ["qkv", "proj"]},
    "weights and directions": {"use_dora": True},
    "stabilised": {"use_rslora": True},
    "a trained head": {"modules_to_save": ["head"]},
    "biases": {"bias": "all"},
    "one block": {"layers_to_transform": [1], "layers_pattern": "blocks"},
    "dropout": {"lora_dropout": 0.5},
    "some ranks": {"rank_pattern": {"blocks.0.attn.qkv": 2}, "alpha_pattern": {"fc1": 3}},
}


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapted_model_is_explained_with_its_adapter(name: str, merged: bool):
    pytest.importorskip("peft")
    build = _adapted(merged, **ADAPTERS[name])
    assert outcome(build, ENGINE["vit"].images()) == EXPLAINED
    rng = Random(name)
    plain, adapted = ENGINE["vit"].build(), build()
    images = ENGINE["vit"].images(seed=rng.randrange(100))
    assert (plain(images) - adapted(images)).norm() > 1e-3 * plain(images).norm()
