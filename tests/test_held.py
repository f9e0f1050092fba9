"""The truth that other tests are held to, against the models written out by hand and functions known on paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.frozen.oracle import oracle_vjp
from tests.held import truth
from tests.tolerances import EXACT
from tests.toys import Calls, normal, relative
from tests.variants import PLAIN

CLASSES = torch.tensor([2, 5])
X, WEIGHT = normal(2, 3, 4, 4), normal(7, 48, seed=1).float().double()


@pytest.mark.parametrize("name", PLAIN)
def test_the_truth_is_that_of_the_model_written_out_by_hand(name: str):
    model, images = PLAIN[name].build(torch.float64), PLAIN[name].images(dtype=torch.float64)
    expected = oracle_vjp(model, images, lambda y: y.gather(1, CLASSES[:, None])[:, 0])[1]
    assert relative(truth(model, images, CLASSES), expected) < EXACT


def linear(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT.T


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (linear, 1.0),
        (lambda x: linear(x) / 4, 0.25),
        (lambda x: linear(x + x.detach() * 0), 1.0),
        (lambda x: linear(x) * torch.tensor(0.5, requires_grad=True), 0.5),
        (lambda x: linear(x) + torch.tensor(0.5, requires_grad=True), 1.0),
        (lambda x: linear(x.float()), 1.0),
        (lambda x: F.conv2d(x, WEIGHT.view(7, 3, 4, 4).float()).flatten(1), 1.0),
        (lambda x: linear(torch.view_as_real(torch.complex(x, 0 * x) * 0.5j)[..., 1]), 0.5),
        (lambda x: linear(torch.where(x == x, x, 0)), 1.0),
    ],
)
def test_a_linear_function_has_its_own_slope(function: Callable[[Tensor], Tensor], scale: float):
    expected = scale * WEIGHT[CLASSES].view_as(X)
    assert relative(truth(Calls(function), X, CLASSES), expected) < EXACT


@pytest.mark.parametrize(
    ("function", "gate"),
    [
        (F.silu, torch.sigmoid),
        (lambda u: u * torch.sigmoid(u), torch.sigmoid),
        (F.relu, lambda u: (u > 0).double()),
        (torch.tanh, lambda u: torch.tanh(u) / u),
        (torch.abs, torch.sign),
        (lambda u: u.clamp(-10, 5), lambda u: ((u >= -10) & (u <= 5)).double()),
        (lambda u: F.silu(u) * u, lambda u: u * torch.sigmoid(u)),
        (lambda u: 2 * F.silu(u).view(2, 7) * u, lambda u: 2 * u * torch.sigmoid(u)),
        (lambda u: F.normalize(u, dim=1), lambda u: (1 / u.norm(dim=1, keepdim=True)).expand_as(u)),
        (lambda u: torch.maximum(u, 0.5 * u), lambda u: torch.where(u > 0.5 * u, 1.0, 0.5)),
        (lambda u: torch.stack([u, 2 * u]).amax(0), lambda u: torch.where(2 * u > u, 2.0, 1.0)),
        (lambda u: torch.stack([u, 2 * u], 1).max(1).values, lambda u: torch.where(2 * u > u, 2.0, 1.0)),
    ],
)
def test_a_gate_is_held(function: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]):
    expected = gate(linear(X)).gather(1, CLASSES[:, None])[:, :, None, None] * WEIGHT[CLASSES].view_as(X)
    assert relative(truth(Calls(lambda x: function(linear(x))), X, CLASSES), expected) < EXACT


@pytest.mark.parametrize(
    "function",
    [
        lambda u: u * u,
        lambda u: u**2,
        lambda u: u * u.detach(),
        lambda u: u + u.detach(),
        lambda u: u.detach(),
        lambda u: F.silu(u) * F.silu(u),
        lambda u: u.softmax(-1),
        lambda u: u + torch.no_grad()(torch.clone)(u),
        lambda u: torch.zeros_like(u),
    ],
)
def test_a_function_that_is_not_affine_with_held_operators_has_no_truth(function: Callable[[Tensor], Tensor]):
    assert truth(Calls(lambda x: function(linear(x))), X, CLASSES) is None
