"""Test rotate against multiplication by e^{iθ}, and the tables of a plan."""

import pytest
import torch

from dave_fast.ops.rotary import rotate_ref
from tests.tolerances import EXACT


def case(rows, tokens, count, dim, shared, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(rows, tokens, 3, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    angles = 3 * torch.randn(tokens, 1 if shared else count, dim // 2, generator=generator, dtype=torch.float64)
    return packed[:, :, 1], angles


@pytest.mark.parametrize("shared", [True, False], ids=["all heads alike", "each head its own"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 16), (3, 50, 2, 20)], ids=str)
def test_halves_turn_as_complex_numbers(shape, shared):
    heads, angles = case(*shape, shared)
    found = rotate_ref(heads, angles.cos(), angles.sin())
    half = shape[-1] // 2
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    assert found.shape == heads.shape and found.is_contiguous()
    assert (found - torch.cat([turned.real, turned.imag], -1)).norm() < EXACT * found.norm()


def test_tables_may_be_finer_than_heads():
    heads, angles = case(2, 9, 2, 8, True, torch.bfloat16)
    found = rotate_ref(heads, angles.cos().float(), angles.sin().float())
    expected = rotate_ref(heads.double(), angles.cos(), angles.sin())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.to(torch.bfloat16))


def test_tokens_of_angle_zero_stay_bit_for_bit():
    heads, angles = case(2, 9, 2, 8, True, torch.float32)
    angles[:3] = 0
    found = rotate_ref(heads, angles.cos().float(), angles.sin().float())
    assert torch.equal(found[:, :3], heads[:, :3]) and not torch.equal(found[:, 3:], heads[:, 3:])
