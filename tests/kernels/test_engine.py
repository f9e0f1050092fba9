"""Test the engine on Triton kernels, end to end, against the frozen route in float64."""

from dataclasses import replace

import pytest
import torch

from dave_fast.engine.levels import Levels
from dave_fast.ops.patches import patchify
from tests.kernels.conftest import INTERPRETED
from tests.tolerances import LOW_PRECISION_RATIO
from tests.toys import engine_of, frozen_vjp
from tests.variants import ENGINE

DTYPES = [torch.float32, *([] if INTERPRETED else [torch.bfloat16])]
# a trimmed last block, two tokens read, average pooling, LayerNorms that are not centred, RMSNorm, a norm ahead of the
# blocks, norms of queries and keys, gated MLPs, attention pooling, every activation, rotations, a bias of the scores,
# branches in parallel, norms behind and inside branches
NAMES = [
    *("vit", "deit-distilled", "vit-average", "vit-no-final-norm", "vit-rms-norm", "clip", "vit-qk-norm"),
    *("dinov2-giant-swiglu", "vit-glu", "siglip", "vit-tanh-gelu", "vit-relu"),
    *("dinov3-untied-bias-token", "beit-shared-bias"),
    *("vit-parallel", "vit-post-norm", "eva02-inner-norms"),
]


def distance(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_walks_are_as_good_as_plain_pytorch(name, dtype, device):
    variant = ENGINE[name]
    images = variant.images(3)
    model = variant.build(dtype).to(device)
    with torch.no_grad():
        classes = variant.build()(images).shape[1]
    cotangent = torch.randn(3, classes, generator=torch.Generator().manual_seed(3)).to(device)
    images = images.to(device)
    double = variant.build(torch.float64).to(device)
    logits, expected = frozen_vjp(double, images.double(), lambda output: (output * cotangent).sum(1))
    low_logits, plain = frozen_vjp(model, images.to(dtype), lambda output: (output * cotangent).sum(1))
    engine = engine_of(variant.build(), dtype=dtype, device=device, backend="triton")
    output, saved = engine.forward(patchify(images, engine.plan.patch_size).to(dtype))
    given = cotangent.clone()
    found = engine.vjp(saved, cotangent)
    # the walk works in its own memory: another VJP of the same forward walk is the same
    assert torch.equal(engine.vjp(saved, cotangent), found) and torch.equal(cotangent, given)
    assert distance(output, logits) <= LOW_PRECISION_RATIO * distance(low_logits, logits)
    expected, plain = (patchify(t, engine.plan.patch_size) for t in (expected, plain))
    assert distance(found, expected) <= LOW_PRECISION_RATIO * distance(plain, expected)


@pytest.mark.parametrize("name", ["vit", "vit-parallel", "vit-post-norm"])
def test_levels_change_no_bit_and_evidence_is_as_good_as_plain_pytorch(name, device):
    """Products write into the residual's memory, except where the tokens that enter a block are kept."""
    variant = ENGINE[name]
    engines = [
        engine_of(variant.build(dtype), dtype=dtype, device=device, backend=backend)
        for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton"))
    ]
    levels = Levels(True, (0, 1))
    images, cotangent = variant.images(3).to(device), torch.eye(7, device=device)[[1, 2, 5]]
    evidence = []
    for engine in engines:
        tokens = patchify(images, engine.plan.patch_size).to(engine.plan.dtype)
        _, saved = engine.forward(tokens, levels)
        found = engine.vjp.pull(saved, cotangent.to(engine.plan.dtype), levels)
        _, saved = engine.forward(tokens)
        assert torch.equal(found.pixels, engine.vjp(saved, cotangent.to(engine.plan.dtype)))
        evidence.append(found.evidence)
    for truth, plain, ours in zip(*evidence, strict=True):
        assert distance(ours, truth) <= LOW_PRECISION_RATIO * distance(plain, truth)


def test_an_identity_tail_does_not_change_the_cotangent(device):
    engine = engine_of(ENGINE["vit-average-all-tokens"].build(), dtype=torch.float32, device=device, backend="triton")
    engine.plan = replace(engine.plan, tail=torch.nn.Identity().eval())
    images = ENGINE["vit-average-all-tokens"].images(2).to(device)
    output, saved = engine.forward(patchify(images, engine.plan.patch_size))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(device)
    given = cotangent.clone()
    engine.vjp(saved, cotangent)
    assert torch.equal(cotangent, given)


class Transposed(torch.nn.Module):
    """A tail whose input has a cotangent that is not contiguous."""

    def forward(self, x):
        return x.transpose(1, 2)


def test_a_row_is_the_same_alone_where_the_tail_transposes(device):
    engine = engine_of(ENGINE["vit-average-all-tokens"].build(), dtype=torch.float32, device=device, backend="triton")
    engine.plan = replace(engine.plan, tail=Transposed().eval())
    tokens = patchify(ENGINE["vit-average-all-tokens"].images(2).to(device), engine.plan.patch_size)
    output, saved = engine.forward(tokens)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(device)
    both = engine.vjp(saved, cotangent)
    _, saved = engine.forward(tokens[:1])
    assert distance(engine.vjp(saved, cotangent[:1]), both[:1]) < 1e-5
