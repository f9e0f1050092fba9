"""Test the references of normalize, its frozen VJP and assemble against PyTorch and autograd, in float64."""

import pytest
import torch
from torch.nn import functional as F

from dave_fast.ops.norm import normalize_ref, normalize_vjp_ref
from dave_fast.ops.tokens import assemble_ref
from tests.tolerances import EXACT


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("centres", [False, True])
def test_a_norm_and_its_frozen_vjp(centres, centred):
    x, weight, bias, g = numbers(7, 33) + 3, numbers(33, seed=1), numbers(33, seed=2), numbers(7, 33, seed=3)
    by_torch = F.layer_norm(x, (33,), weight, bias, 1e-6) if centres else F.rms_norm(x, (33,), weight, 1e-6) + bias
    expected = by_torch - by_torch.mean(-1, keepdim=True) if centred else by_torch
    y, rstd = normalize_ref(x, weight, bias, 1e-6, centres=centres, centred=centred)
    assert distance(y, expected) < EXACT
    leaf = x.clone().requires_grad_()
    wide = (leaf - leaf.mean(-1, keepdim=True) if centres else leaf) * rstd[:, None] * weight
    wide = wide - wide.mean(-1, keepdim=True) if centred else wide
    (by_autograd,) = torch.autograd.grad(wide, leaf, g)
    assert distance(normalize_vjp_ref(g, weight, rstd, centres=centres, centred=centred), by_autograd) < EXACT


def test_heads_of_any_strides_in_low_precision():
    packed = numbers(2, 5, 3, 4, 16).bfloat16()
    y, rstd = normalize_ref(packed[:, :, 1], torch.ones(16), torch.zeros(16), 1e-6, centres=True)
    assert y.shape == (2, 5, 4, 16) and y.is_contiguous() and y.dtype == torch.bfloat16
    assert rstd.shape == (2, 5, 4) and rstd.dtype == torch.float32
    torch.testing.assert_close(y.float(), F.layer_norm(packed[:, :, 1].float(), (16,)), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_stream_is_prefix_then_patches_with_positions(prefix):
    patches, position, tokens = numbers(3, 7, 9), numbers(7, 9, seed=1), numbers(prefix, 9, seed=2)
    expected = torch.cat([tokens.expand(3, -1, -1), patches + position], dim=1).reshape(-1, 9)
    assert torch.equal(assemble_ref(patches, tokens, position), expected)
    x, squares = assemble_ref(patches, tokens, position, squares=True)
    assert torch.equal(x, expected)
    assert distance(squares.sum(1), expected.square().sum(1)) < EXACT
