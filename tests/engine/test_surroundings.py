"""Contexts around a call of the explainer, in which a model computes something else: the explanation stays the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.cases import EXPLAINED, expectation, explained, judged, thinned
from tests.variants import ALL


class Watching(TorchFunctionMode):
    """A mode that calls every function as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """A mode that calls every function as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients": torch.enable_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "a mode": Watching,
    "a mode below autograd": Dispatched,
    "operations counted": lambda: FlopCounterMode(display=False),
    "plain attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "saved on the host": torch.autograd.graph.save_on_cpu,
    "anomalies detected": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("base", thinned(["vit", "eva02", "hand-written", "torchvision"], 4))
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_context_of_a_call_changes_nothing(name: str, base: str):
    variant = ALL[base]
    images, expected = variant.images(), expectation(variant.build, variant.images())
    for route in ("auto", "frozen"):

        def call(route: str = route) -> tuple[Tensor, Tensor]:
            model = variant.build()
            with SURROUNDINGS[name]():
                return explained(model, images, route=route)

        assert judged(expected, call) == EXPLAINED


@pytest.mark.parametrize("base", thinned(["vit", "hand-written"], 2))
def test_models_that_are_explained_at_the_same_time_do_not_meet(base: str):
    variant, seeds, found = ALL[base], range(4), {}
    # built one after the other, since the weights are drawn from the generator of the process
    models = [variant.build(seed=seed) for seed in seeds]

    def work(seed: int) -> None:
        found[seed] = explained(models[seed], variant.images(seed=seed), route="auto" if base == "vit" else "frozen")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        expected = expectation(partial(variant.build, seed=seed), variant.images(seed=seed))
        assert judged(expected, partial(found.get, seed)) == EXPLAINED
