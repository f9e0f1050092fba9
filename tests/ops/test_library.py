"""Test the torch.library schemas of the pixel ops by opcheck and torch.compile."""

import pytest
import torch

from dave_fast.ops import _library
from dave_fast.ops.perturb import perturb
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.pull_back_mean import pull_back_mean, pull_back_mean_variance
from dave_fast.ops.robust_mean import robust_mean, robust_mean_variance
from dave_fast.ops.shrink import shrink
from dave_fast.ops.smooth import smooth
from dave_fast.ops.spread_mean import spread_mean_variance
from dave_fast.sampling import draw

PATCH = (4, 8)


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 16, generator=generator)
    draws = draw(3, height=8, width=16, image_keys=(1, 2))
    cotangents = torch.randn(6, 4, 96, generator=generator)
    return images, draws, cotangents


def arguments(op, case):
    images, draws, cotangents = case
    return {
        "perturb": (images, draws.tensors(), *PATCH, torch.bfloat16, "torch"),
        "pull_back": (cotangents, images, draws.tensors(), *PATCH, None, "torch"),
        "pull_back_mean": (cotangents, images, draws.tensors(), *PATCH, 3, "torch"),
        "robust_mean": (images.bfloat16(), "torch"),
        "pull_back_mean_variance": (cotangents, images, draws.tensors(), *PATCH, 3, "torch"),
        "robust_mean_variance": (cotangents.bfloat16(), "torch"),
        "spread_mean_variance": (cotangents[..., 0].contiguous(), draws.tensors(), 8, 16, *PATCH, 3, "torch"),
        "shrink": (images, images[:, 0].double().square(), "torch"),
        "smooth": (images.double(), "torch"),
    }[op]


@pytest.mark.parametrize("op", _library.SCHEMAS)
def test_schema_and_fake_form_are_the_ops(op, case):
    torch.library.opcheck(getattr(torch.ops.dave_fast, op).default, arguments(op, case))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_compiled_function_has_them_as_nodes(case, backend):
    def pixels(images, draws, cotangents):
        tokens = perturb(images, draws, PATCH, backend=backend)
        contributions = pull_back(tokens + cotangents, images, draws, PATCH, backend=backend)
        raw = robust_mean(contributions.view(2, 3, 3, 8, 16), backend=backend)
        tiled = pull_back_mean(tokens + cotangents, images, draws, PATCH, 3, backend=backend)
        again, variance = robust_mean_variance(contributions.view(2, 3, 3, 8, 16), backend=backend)
        of_tiles = pull_back_mean_variance(tokens + cotangents, images, draws, PATCH, 3, backend=backend)
        shrunk = shrink(raw, variance, backend=backend)
        of_patches = spread_mean_variance(cotangents[..., 0], draws, (8, 16), PATCH, 3, backend=backend)
        return smooth(shrunk, backend=backend), raw - tiled, again - of_tiles[0], of_tiles[1], *of_patches

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    images, draws, cotangents = case
    found = torch.compile(pixels, backend=keep, fullgraph=True)(images, draws, cotangents)
    for got, expected in zip(found, pixels(images, draws, cotangents), strict=True):
        assert torch.equal(got, expected)
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert {f"dave_fast.{op}" for op in _library.SCHEMAS} <= called


def test_checks_run_in_a_compiled_function_too(case):
    with pytest.raises(TypeError, match="float32 or float64"):
        torch.ops.dave_fast.smooth(case[0].int(), "torch")
