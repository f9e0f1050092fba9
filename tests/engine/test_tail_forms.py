"""The forms in C++ of what a tail computes: PyTorch's results and gradients to rounding; what is left to PyTorch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dave_fast.engine.tail_forms import TailForms
from dave_fast.frozen.mode import FrozenMode, freeze, run_frozen
from dave_fast.ops import _ext
from tests.toys import engine_of
from tests.variants import ENGINE

pytestmark = pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))


class Tail(nn.Module):
    """What heads are made of: products with matrices and their parts, attention, GELU, a hidden layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Parameter(torch.randn(1, 1, 24))
        self.attend = nn.MultiheadAttention(24, 3, batch_first=True)
        self.hidden, self.head = nn.Linear(24, 40), nn.Linear(40, 7, bias=False)
        self.projection = nn.Parameter(torch.randn(7, 5))

    def forward(self, x):
        pooled, _ = self.attend(self.query.expand(len(x), -1, -1), x, x)
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (pooled, x, x))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
        return self.head(F.gelu(self.hidden(pooled), approximate="tanh")) @ self.projection


def gradient(tail, x, mode):
    leaf = x.clone().requires_grad_()
    output = run_frozen(tail, leaf, mode(leaf))
    return output.detach(), torch.autograd.grad(output, leaf, torch.ones_like(output).cumsum(1))[0]


def test_results_and_gradients_are_pytorchs_to_rounding():
    tail, x = Tail().eval().requires_grad_(False), torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(1))
    met, forms = [], TailForms(tail).forms

    def told(function):
        def call(*args, **kwargs):
            met.append(function)
            return forms[function](*args, **kwargs)

        return call

    found = gradient(tail, x, lambda leaf: FrozenMode(leaf, forms={f: told(f) for f in forms}))
    # beside them the function that @ calls
    assert {F.linear, F.scaled_dot_product_attention, torch.bmm, F.gelu} < set(met)
    exact = gradient(Tail().eval().requires_grad_(False).double(), x.double(), freeze)
    plain = gradient(tail, x, freeze)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert not torch.equal(ours, theirs)
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm().clamp(min=1e-7 * truth.norm())


def test_a_matrix_that_changes_is_packed_again():
    tail = nn.Linear(6, 5).requires_grad_(False)
    forms, x = TailForms(tail).forms, torch.ones(2, 6)
    before = forms[F.linear](x, tail.weight, tail.bias)
    tail.weight.mul_(2)
    torch.testing.assert_close(forms[F.linear](x, tail.weight, tail.bias) - tail.bias, 2 * (before - tail.bias))


def test_other_operands_are_left_to_pytorch():
    """A matrix that is no parameter, that has a gradient or is float64; a masked, causal or uneven attention; int64."""
    tail, x = nn.Linear(6, 6).requires_grad_(False), torch.randn(2, 6)
    forms, own = TailForms(tail), tail.weight
    other, live = torch.randn(6, 6), tail.weight.clone().requires_grad_()
    for weight in (other, live):
        assert torch.equal(forms.forms[F.linear](x, weight), F.linear(x, weight))
        assert torch.equal(forms.forms[torch.matmul](x, weight), x @ weight)
    assert torch.equal(forms.forms[F.linear](x.double(), own.double()), F.linear(x.double(), own.double()))
    assert torch.equal(forms.forms[torch.matmul](own, x[0]), own @ x[0]) and not forms._packed
    assert forms.forms[F.linear](x[:0], own).shape == (0, 6)
    heads = torch.randn(3, 2, 5, 4).unbind()
    attend = forms.forms[F.scaled_dot_product_attention]
    for settings in ({"is_causal": True}, {"attn_mask": torch.eye(5).bool()}, {"attn_mask": torch.randn(5, 5)}):
        given = [t[None] for t in heads]
        assert torch.equal(attend(*given, **settings), F.scaled_dot_product_attention(*given, **settings))
    wide = heads[0][None], heads[1][None], torch.randn(1, 2, 5, 6)
    assert torch.equal(attend(*wide), F.scaled_dot_product_attention(*wide))
    torch.testing.assert_close(attend(*given, scale=0.1), F.scaled_dot_product_attention(*given, scale=0.1))
    many = torch.randn(2, 9, 5), torch.randn(2, 5, 3)
    assert torch.equal(forms.forms[torch.bmm](*many), torch.bmm(*many))
    assert torch.equal(forms.forms[F.gelu](x.double()), F.gelu(x.double()))
    assert torch.equal(forms.forms[F.gelu](torch.tensor(2.0)), F.gelu(torch.tensor(2.0)))


def test_nan_of_a_row_stays_in_it():
    tail = Tail().eval().requires_grad_(False)
    x = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(1))
    x[2, 3, 5] = torch.nan
    output, slope = gradient(tail, x, lambda leaf: FrozenMode(leaf, forms=TailForms(tail).forms))
    assert output.isnan().any(1).tolist() == slope.flatten(1).isnan().any(1).tolist() == [False, False, True, False]


def test_engines_of_pytorch_have_none():
    engines = {
        backend: engine_of(ENGINE["vit"].build(), dtype=torch.float32, backend=backend) for backend in ("torch", "auto")
    }
    assert not engines["torch"].forward._tail_forms and engines["auto"].forward._tail_forms
