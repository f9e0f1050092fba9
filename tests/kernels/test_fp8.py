"""Test e4m3 operands on Triton: codes bit for bit, products against float64, the engine end to end."""

import pytest
import torch

from dave_fast.kernels.fp8 import WIDEST, linear_fp8_triton, quantise_triton
from dave_fast.ops.fp8 import dequantise, linear_fp8_ref, pack_fp8, quantise
from dave_fast.ops.patches import patchify
from tests.toys import engine_of
from tests.variants import ENGINE

SHAPES = [(1, 32, 64), (7, 37, 65), (33, 64, 130)]
LOW = [torch.float16, torch.bfloat16]


def numbers(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (5, 257), (2, WIDEST + 3)], ids=str)
def test_codes_and_scales_match_the_reference(shape, dtype, device):
    x = numbers(shape[0], shape[1] + 5, dtype=dtype, device=device)[:, : shape[1]]
    rows = numbers(shape[0], seed=1, device=device)
    codes, scale = quantise_triton(x)
    expected, expected_scale = quantise(x)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)
    assert torch.equal(quantise_triton(x, rows)[1], expected_scale * rows)


def test_zeros_stay_and_nan_propagates(device):
    x = torch.zeros(3, 8, device=device)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    found = dequantise(*quantise_triton(x))
    assert not found[0].any() and found[1].isnan().any() and not found[2].isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_epilogues_match_the_reference(shape, dtype, device):
    rows, inputs, outputs = shape
    x, weight = numbers(rows, inputs, dtype=dtype, device=device), pack_fp8(numbers(outputs, inputs, device=device))
    bias, scale = numbers(outputs, dtype=dtype, device=device), numbers(rows, device=device).abs()
    other = numbers(rows, outputs, seed=4, dtype=dtype, device=device)
    step = torch.finfo(dtype).eps

    def close(found, expected):
        assert found.dtype == dtype and found.shape == (rows, outputs)
        return ((found.double() - expected.double()).norm() <= step * expected.double().norm()).item()

    product = dequantise(*quantise(x)).double() @ dequantise(*weight).double().T
    exact = scale.double()[:, None] * product + bias.double()
    assert close(linear_fp8_triton(x, weight, bias, row_scale=scale), exact)
    assert close(linear_fp8_triton(x, weight, gate=other), product * other.double())
    added, squares = linear_fp8_triton(x, weight, residual=other, squares=True)
    assert close(added, product + other.double())
    assert torch.allclose(squares.sum(1), added.float().square().sum(1), rtol=1e-4)
    hidden, gate = linear_fp8_triton(x, weight, bias, activation="gelu")
    assert close(hidden, linear_fp8_ref(x.float(), weight, bias, activation="gelu")[0])
    assert gate.dtype == torch.uint8


def test_the_engine_walks_with_eight_bit_operands(device):
    variant = ENGINE["vit"]
    images = variant.images(1)
    walks = {}
    for backend in ("torch", "triton"):
        engine = engine_of(variant.build(), dtype=torch.bfloat16, device=device, backend=backend, narrow="fp8")
        output, saved = engine.forward(patchify(images, engine.plan.patch_size).bfloat16().to(device))
        walks[backend] = output, engine.vjp(saved, torch.eye(output.shape[1], device=device)[[1]]).float()
    for found, expected in zip(walks["triton"], walks["torch"], strict=True):
        # the same operands but for roundings to bfloat16 that fall the other way, and gates in eight bits
        assert (found - expected).norm() < 0.1 * expected.norm()
