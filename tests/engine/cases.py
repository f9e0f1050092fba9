"""A model as its user left it, and whether what is explained is that model, or it is refused, and left untouched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dave_fast import DAVE
from dave_fast.errors import DaveFastError
from tests.engine.patches import INNER, wrapper
from tests.held import Held, truth
from tests.tolerances import OF_THE_TRUTH
from tests.variants import ENGINE

BASES = (
    "vit",
    "vit-average",
    "vit-registers",
    "vit-max-pool",
    "vit-swiglu",
    "deit-distilled",
    "deit3",
    "siglip",
    "eva02",
    "rope",
    "beit",
    "relative-position",
)
CLASSES = torch.tensor([2, 5])
# relative difference between a model's outputs in float32 and in float64; more than that are two models
SINGLE = 1e-2
REFUSED, EXPLAINED = "refused", "explained"

Build = Callable[[], nn.Module]
# the output (B, K) and the effective gradient (B, C, H, W), each None where there is none
Expectation = tuple[Tensor | None, Tensor | None]


@contextmanager
def patched(seed: int) -> Iterator[tuple[str, Build, Tensor]]:
    """Yield a description, a maker of equal patched models and images for them, and undo what reached other models."""
    rng = Random(seed)
    variant = ENGINE[rng.choice(BASES)]
    with ExitStack() as undo:
        names = [rng.choice(list(INNER)) for _ in range(rng.choice([1, 1, 2, 3]))]
        changes = [INNER[name](rng, undo) for name in names]
        if rng.random() < 0.3:
            names.append("wrapper")
            changes.append(wrapper(rng, undo))

        def build() -> nn.Module:
            model = variant.build()
            for change in changes:
                model = change(model)
            return model

        yield " + ".join(names), build, variant.images()


def outcome(
    build: Build, images: Tensor, classes: Tensor = CLASSES, *, route: str = "auto", precision: str = "fp64"
) -> str:
    """Return "explained" or "refused", and fail where neither is right, or where the model was changed.

    Args:
        build: makes equal models of one's own, one of which is explained and another is the truth.
        images: (B, C, H, W).
        classes: (B,).
        route: of the explainer.
        precision: of the explainer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, given = expectation(build, images, classes), build()
    before = state(given)
    try:
        return judged(expected, lambda: explained(given, images, classes, route=route, precision=precision), precision)
    finally:
        assert changes(before, state(given)) == []


def judged(expected: Expectation, explain: Callable[[], tuple[Tensor, Tensor]], precision: str = "fp64") -> str:
    """Return "refused" where explaining raises an error of the project's, else compare what it returns.

    Args:
        expected: as `expectation` returns it.
        explain: () -> effective gradient and output.
        precision: of the explainer.
    """
    try:
        gradient, predicted = explain()
    except DaveFastError:
        return REFUSED
    output, slope = expected
    assert output is not None, "a model that fails was explained"
    assert slope is not None, "explained, and there is no effective gradient"
    errors = {"gradient": off(gradient, slope), "output": off(predicted, output)}
    # predictions are handed out in float32
    allowed = {"gradient": OF_THE_TRUTH[precision], "output": max(OF_THE_TRUTH[precision], 1e-6)}
    assert all(errors[k] <= allowed[k] for k in errors), f"relative errors {errors}"
    return EXPLAINED


def thinned(values: Iterable[Any], every: int) -> list[Any]:
    """Return parameters of a test, of which one in `every` runs always and the others are slow."""
    return [value if i % every == 0 else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]


def explained(
    model: nn.Module, images: Tensor, classes: Any = CLASSES, *, route: str = "auto", precision: str = "fp64"
) -> tuple[Tensor, Tensor]:
    """Return the effective gradient and the output that the explainer has for a model, whatever route it warns of."""
    return answer(DAVE(model, precision=precision, noise_alpha=0.0, route=route), images, classes)


def answer(explainer: DAVE, images: Tensor, classes: Any = CLASSES) -> tuple[Tensor, Tensor]:
    """Return the effective gradient and the output of an explainer, whatever route it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explainer.effective_gradient(images, classes), explainer.predict(images)


def expectation(build: Build, images: Tensor, classes: Tensor = CLASSES) -> Expectation:
    """Return a model's output and its effective gradient in float64."""
    try:
        # with gradients: without them PyTorch's encoder layers run as one function, past hooks of their modules
        single = build().eval()(images)
    except Exception:  # whatever a broken model raises
        return None, None
    double = doubled(build())
    output = Held().run(double, images.double().requires_grad_())
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] <= int(classes.max()):
        return None, None
    assert off(single.detach(), output.detach()) < SINGLE, "the truth is of another model"
    return output.detach(), truth(doubled(build()), images, classes)


def off(found: Tensor, expected: Tensor) -> float:
    """Return the relative error; a gradient of zeros has to be met exactly."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-200))


def doubled(model: nn.Module) -> nn.Module:
    """Return the model itself in float64 and evaluation mode, without gradients of parameters, nor checkpoints."""
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = False
    return model._apply(lambda t: t.double() if t.is_floating_point() else t).eval().requires_grad_(False)


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that can be seen of a model: each attribute's identity, and a copy of each tensor."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        _look(seen, path, vars(module), depth=0)
    return seen


def _look(seen: dict[str, Any], path: str, value: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        seen[path] = (value, value.detach().clone(), value.requires_grad, value.grad if value.is_leaf else None)
    elif isinstance(value, dict | list | tuple) and depth < 4:
        seen[path] = (value, len(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _look(seen, f"{path}.{key}", item, depth + 1)
    else:
        seen[path] = (value,)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the paths at which two states of one model differ."""
    return [path for path in {**before, **after} if not _same(before.get(path), after.get(path))]


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None or len(one) != len(other) or one[0] is not other[0]:
        return False
    if isinstance(one[0], Tensor):
        return torch.equal(one[1], other[1]) and one[2:] == other[2:] and one[3] is other[3]
    return len(one) == 1 or one[1] == other[1]
