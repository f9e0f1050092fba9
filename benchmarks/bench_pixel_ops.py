"""The pixel ops, PyTorch beside native: 50 samples of one 3×224×224 image, patches of 16.

    pytest benchmarks/bench_pixel_ops.py --benchmark-group-by=group

Every native form is compared with the reference on the same inputs before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dave_fast import _ext
from dave_fast.ops import _registry
from dave_fast.sampling import draw, normal

SAMPLES, SIZE, PATCH = 50, 224, 16

FORMS = ["torch"] + ([] if _ext.unavailable() else _ext.module().usable_isas())


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """What each op gets: the output of the one before it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    draws = draw(SAMPLES, height=SIZE, width=SIZE)
    tokens = _registry.bind("perturb")(images, draws, PATCH)
    contributions = _registry.bind("pull_back")(tokens, images, draws, PATCH).unflatten(0, (1, SAMPLES))
    raw = _registry.bind("robust_mean")(contributions)
    return {"images": images, "draws": draws, "tokens": tokens, "contributions": contributions, "raw": raw}


def _calls(inputs: dict) -> dict[str, Callable[[Callable], Tensor]]:
    images, draws = inputs["images"], inputs["draws"]
    return {
        "perturb": lambda run: run(images, draws, PATCH),
        "perturb-bf16": lambda run: run(images, draws, PATCH, dtype=torch.bfloat16),
        "pull_back": lambda run: run(inputs["tokens"], images, draws, PATCH),
        "robust_mean": lambda run: run(inputs["contributions"]),
        "smooth": lambda run: run(inputs["raw"]),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["perturb", "perturb-bf16", "pull_back", "robust_mean", "smooth"])
def test_op(benchmark, inputs, op, form):
    call, name = _calls(inputs)[op], op.removesuffix("-bf16")
    reference = _registry.load(name, "torch")
    if form == "torch":
        run = reference
    else:
        _ext.module().use_isa(form)
        run = _registry.load(name, "native")
        torch.testing.assert_close(call(run), call(reference), rtol=1e-5, atol=1e-5)
    benchmark.group = f"{op}, S={SAMPLES}, {SIZE}²"
    benchmark.pedantic(lambda: call(run), rounds=3 if form == "torch" else 20, warmup_rounds=1)


@pytest.mark.parametrize("n_images", [1, 64])
def test_draw(benchmark, n_images):
    benchmark.group = "draw, S=50"
    benchmark(lambda: draw(SAMPLES, height=SIZE, width=SIZE, image_keys=range(n_images)))


def test_normal_in_torch(benchmark, inputs):
    draws = inputs["draws"]
    benchmark.group = "normal, S=50, 224²"
    benchmark.pedantic(lambda: normal(draws.keys, draws.samples, 3 * SIZE * SIZE), rounds=3)
