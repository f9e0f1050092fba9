"""Test that the PyTorch peers of the speed comparison compute the frozen gradient with each of their optimisations."""

import warnings
from dataclasses import replace

import pytest
import torch

import dave_fast
from benchmarks.peers import LADDER, FlexFrozen, Peer, quantised
from dave_fast.errors import ModelError
from dave_fast.ops.patches import patchify
from dave_fast.ops.precision import why_not
from tests.tiny import initial_vit
from tests.tolerances import EXACT
from tests.variants import ENGINE

TARGET = 4
EXACT_STEPS = [name for name, tricks in LADDER.items() if not tricks.eight_bits]
POOLING = ["token", "avg"]
EIGHT_BITS = [
    ("P4 in eight bits", torch.bfloat16, 0.2),
    ("P4 in integers", torch.bfloat16, 0.05),
    ("P4 in integers", torch.float32, 0.05),
]


def small_model(pooling):
    model = initial_vit(embed_dim=32, depth=3, num_classes=16, init_values=0.5, global_pool=pooling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().requires_grad_(False)


def case(pooling):
    """Return a model, tokens (R, n, C·p_h·p_w) and their frozen gradient."""
    model = small_model(pooling)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    truth = dave_fast.effective_gradient(model, images, TARGET, precision="fp64", route="frozen")
    return model, patchify(images, (8, 8)), patchify(truth, (8, 8))


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("name", EXACT_STEPS)
def test_every_trick_is_exact(name, pooling):
    model, tokens, truth = case(pooling)
    peer = Peer(model, replace(LADDER[name], compiled=False), torch.float64, "cpu")
    assert error(peer.cotangents(tokens, TARGET), truth) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXACT_STEPS if LADDER[name].compiled and "Flex" not in name])
def test_inductor_keeps_them_exact(name):
    model, tokens, truth = case("token")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(Peer(model, LADDER[name], torch.float64, "cpu").cotangents(tokens, TARGET), truth) < EXACT


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize(("step", "dtype", "most"), EIGHT_BITS)
def test_eight_bits_err_by_the_rounding_of_their_operands(step, dtype, most, pooling):
    reason = why_not("int8", torch.device("cpu"))
    if LADDER[step].eight_bits == "int8" and reason is not None:
        # the bench leaves this peer out there as well
        pytest.skip(f"{reason}, without which PyTorch's sums of bytes are clipped to sixteen bits")
    model, tokens, truth = case(pooling)
    tricks = replace(LADDER[step], compiled=False)
    found = error(Peer(model, tricks, dtype, "cpu").cotangents(tokens.to(dtype), TARGET), truth)
    without = Peer(model, replace(tricks, eight_bits=None), dtype, "cpu")
    assert error(without.cotangents(tokens.to(dtype), TARGET), truth) < found < most


@pytest.mark.slow
def test_inductor_keeps_integers():
    model, tokens, _ = case("token")
    peers = [
        Peer(model, replace(LADDER["P4 in integers"], compiled=compiled), torch.float32, "cpu")
        for compiled in (True, False)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = (peer.cotangents(tokens.float(), TARGET) for peer in peers)
    # a number on the border between two integers may be rounded to either
    assert error(found, expected.double()) < 1e-2


def test_a_row_in_eight_bits_uses_their_whole_range():
    rows = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 1e3, 7.0, 0.0])[:, None]
    eight, scale = quantised(rows)
    assert eight.float().abs().amax(1)[:4].eq(448).all() and eight[4].float().eq(0).all()
    assert (eight.float() * scale - rows).abs().max(1).values.le(2**-4 * rows.abs().amax(1) + 1e-30).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_gradient_of_values_by_a_forward_pass_survives_large_scores():
    q, k, v = (6 * torch.randn(2, 2, 19, 16, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    out = FlexFrozen.apply(q, k, v, 1.0)
    d_out = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, v, d_out)
    p = (q @ k.transpose(-2, -1)).softmax(-1)
    assert error(found, p.transpose(-2, -1) @ d_out) < EXACT


@pytest.mark.parametrize("name", ["vit-qk-norm", "clip", "siglip", "deit-distilled", "dinov2-giant-swiglu"])
def test_other_models_are_refused_with_the_reason(name):
    with pytest.raises(ModelError, match="no form of this model"):
        Peer(ENGINE[name].build(), LADDER["P1 batched"], torch.float32, "cpu")
