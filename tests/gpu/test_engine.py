"""Test the engine on the device against the frozen route, itself without graphs, the CPU, and its memory limit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch

import dave_fast
from dave_fast import DAVE
from dave_fast.engine.aggregation import attributions
from dave_fast.evaluate import DemoScenes
from dave_fast.evaluate.methods import contributions_of
from dave_fast.evaluate.metrics import correlation
from dave_fast.models.demo import load_demo_model
from dave_fast.ops.precision import has_bf16, why_no_fp8
from dave_fast.targets import Contrast, Similarity
from tests.gpu.conftest import REHEARSAL
from tests.tolerances import EXACT, LOW_PRECISION_RATIO
from tests.variants import ENGINE

SAMPLES = 4 if REHEARSAL else 50
NOISE_ALPHA = 0.5
VARIANTS = ["vit", "vit-average", "vit-no-final-norm", "deit-distilled", "clip", "vit-qk-norm", "dinov2-giant-swiglu"]
FIDELITY = {"bf16": 0.999, "fp8": 0.99}


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    found, truth = found.double().cpu(), truth.double().cpu()
    return ((found - truth).norm() / truth.norm()).item()


def demo(**settings: Any) -> DAVE:
    return DAVE(load_demo_model(), noise_alpha=NOISE_ALPHA, **settings)


def scenes(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = DemoScenes(number, seed=11).read(0, number)
    return drawn.images, drawn.labels


@pytest.mark.parametrize("name", VARIANTS)
def test_float64_agrees_with_the_frozen_route(name: str, device: str) -> None:
    variant = ENGINE[name]
    model, images = variant.build(torch.float64).to(device), variant.images(2, torch.float64).to(device)
    found = dave_fast.effective_gradient(model, images, 1, precision="fp64", route="engine", device=device)
    truth = dave_fast.effective_gradient(model, images, 1, precision="fp64", route="frozen", device=device)
    assert relative(found, truth) < EXACT


def test_questions_of_one_image_are_those_of_their_own_calls(device: str) -> None:
    images, _ = scenes(2)
    found = demo(device=device, precision="fp32")
    asked: list[Any] = [4, Contrast(4, 6), Similarity(torch.ones(10)), lambda y: y.log_softmax(1)[:, 3]]
    together = found.explain(images, targets=asked, n_samples=SAMPLES)
    for which, target in enumerate(asked):
        alone = found.explain(images, target, n_samples=SAMPLES)
        assert relative(together.raw[:, which], alone.raw) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_low_precision_is_as_good_as_plain_pytorch(name: str, precision: str, device: str) -> None:
    if precision == "bf16" and not has_bf16(torch.device(device)):
        pytest.skip("this device does not multiply bfloat16")
    variant = ENGINE[name]
    model, images = variant.build().to(device), variant.images(8).to(device)
    truth = dave_fast.effective_gradient(model, images, 1, precision="fp64", device=device)
    found = dave_fast.effective_gradient(model, images, 1, precision=precision, route="engine", device=device)
    plain = dave_fast.effective_gradient(model, images, 1, precision=precision, device=device)
    assert relative(found, truth) <= LOW_PRECISION_RATIO * relative(plain, truth)


@pytest.mark.parametrize("precision", FIDELITY)
def test_final_maps_follow_float32_on_trained_weights(precision: str, device: str) -> None:
    reason = why_no_fp8(torch.device(device)) if precision == "fp8" else None
    if precision == "bf16" and not has_bf16(torch.device(device)):
        reason = "this device does not multiply bfloat16"
    if reason is not None:
        pytest.skip(reason)
    images, labels = scenes(8)
    # The promise is about maps of the default number of samples; rounding shows more in those of fewer.
    maps = [demo(precision=p, device=device).explain(images, labels).maps.cpu() for p in (precision, "fp32")]
    assert correlation(*maps).min() >= FIDELITY[precision]


def test_contributions_of_an_image_on_the_host_are_on_the_device(device: str) -> None:
    explainer, (images, labels) = demo(device=device), scenes(1)
    found = contributions_of(explainer, images, labels, SAMPLES, (0,), 0)
    assert found.device == explainer.device
    _, maps = explainer.aggregate(found)
    assert correlation(maps.cpu(), explainer.explain(images, labels, SAMPLES).maps.cpu()).min() > 0.9999


def test_the_devices_maps_are_the_cpus(device: str) -> None:
    """Test float32 maps against a CPU's at equal draws: only rounding and values on the outlier threshold differ."""
    images, labels = scenes(2)
    maps = [demo(precision="fp32", device=each).explain(images, labels, SAMPLES).maps.cpu() for each in (device, "cpu")]
    assert correlation(*maps).min() > 0.9999


@pytest.mark.device_only
def test_raw_of_a_random_vit_b_is_as_near_to_float64_as_plain_bfloat16(device: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224").eval()
    images = torch.randn(1, 3, 224, 224)

    def raw(precision: str, route: str) -> torch.Tensor:
        explainer = DAVE(model, precision=precision, route=route, noise_alpha=NOISE_ALPHA, device=device)
        return explainer.explain(images, 3, n_samples=4).raw

    exact = raw("fp64", "engine")
    plain = relative(raw("bf16", "frozen"), exact)
    assert relative(raw("bf16", "engine"), exact) <= LOW_PRECISION_RATIO * plain


@pytest.mark.device_only
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_give_what_eager_gives(precision: str, device: str) -> None:
    images, labels = scenes(3)
    raw = {}
    for graphs in (True, False):
        explainer = demo(precision=precision, device=device, graphs=graphs)
        # twice: the second time replays what the first captured, with other draws
        raw[graphs] = [explainer.explain(images, labels, 37, seed).raw for seed in (0, 1)]
    for replayed, eager in zip(raw[True], raw[False], strict=True):
        assert relative(replayed, eager) < (1e-5 if precision == "fp32" else 1e-2)
    assert relative(raw[True][0], raw[True][1]) > 1e-3


@pytest.mark.device_only
def test_out_of_memory_halves_the_micro_batch_and_goes_on(device: str) -> None:
    images, labels = scenes(2)
    expected = demo(precision="fp32", device=device).explain(images, labels, 64)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    small = demo(precision="fp32", device=device, internal_batch_size=128)
    small.explain(images, labels, 2)
    try:
        # a little more than is reserved now, which is too little for 128 rows
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (96 << 20)) / total)
        found = small.explain(images, labels, 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert correlation(found.maps.cpu(), expected.maps.cpu()).min() > 0.999


@pytest.mark.device_only
def test_a_side_stream_and_a_second_thread_get_the_same_maps(device: str) -> None:
    images, labels = scenes(2)
    explainer = demo(precision="fp32", device=device)
    expected = explainer.explain(images, labels, 8).raw
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = explainer.explain(images, labels, 8).raw
    stream.synchronize()
    assert relative(found, expected) < 1e-5


@contextmanager
def host_waits() -> Iterator[list[warnings.WarningMessage]]:
    """Yield a list of the host's waits for the device within this context, as PyTorch reports them."""
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list[warnings.WarningMessage] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [each for each in reported if "synchronizing CUDA operation" in str(each.message)]


@pytest.mark.device_only
@pytest.mark.parametrize("weights", ["cpu", "cuda"])
def test_the_host_waits_once_a_call_and_never_in_its_loop(
    weights: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = scenes(3)
    explainer = DAVE(load_demo_model().to(weights), noise_alpha=NOISE_ALPHA, device=device)

    def strict(*args: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return attributions(*args, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("warn")

    asked: list[dict[str, Any]] = [{}, {"target": 3}, {"targets": [1, Contrast(2, 3), Similarity(torch.ones(10))]}]
    for each in asked:
        # the first captures graphs
        expected = explainer.explain(images, n_samples=SAMPLES, **each).raw
        with monkeypatch.context() as patch, host_waits() as waits:
            patch.setattr("dave_fast.explain.explainer.attributions", strict)
            found = explainer.explain(images, n_samples=SAMPLES, **each).raw
        assert len(waits) == 1, [str(wait.filename) for wait in waits]
        assert torch.equal(found, expected)
