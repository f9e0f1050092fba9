"""Frozen SwiGLU, attention pooling, rotary and relative-bias attention, each against autograd written out by hand.

Every truth is the module's formula on its own weights with `detach()` on the operator and nothing of dave_fast: what
autograd then returns is the row of the table of frozen operators (DAVE, arXiv 2602.06613, Eq. 3-5).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, GluMlp, RelPosBias, RelPosMlp, RotaryEmbeddingCat, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from dave_fast.frozen.proof import affine_replay
from tests.tolerances import EXACT
from tests.toys import normal, relative, slope
from tests.variants import randomise

DIM, HEADS, SIDE = 32, 2, 4
Function = Callable[[Tensor], Tensor]


def made(module: nn.Module) -> nn.Module:
    """Return the module in float64 with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        randomise(module)
    return module.double().eval()


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm with its scale a constant; the mean stays linear."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt().detach()
    return centred / scale * norm.weight + norm.bias


def heads(x: Tensor) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def mixed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """P·v with P a constant, heads side by side again: (B, N, D)."""
    p = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1).detach()
    return (p @ v).transpose(1, 2).flatten(2)


def swiglu() -> tuple[Function, Function]:
    m = made(SwiGLU(DIM, 48, norm_layer=nn.LayerNorm))
    return m, lambda x: m.fc2(normed(m.norm, F.silu(m.fc1_g(x)).detach() * m.fc1_x(x)))


def swiglu_packed() -> tuple[Function, Function]:
    m = made(GluMlp(DIM, 96, act_layer=nn.SiLU, gate_last=False))
    gate, value = slice(0, 48), slice(48, 96)

    def truth(x: Tensor) -> Tensor:
        u = m.fc1(x)
        return m.fc2(F.silu(u[..., gate]).detach() * u[..., value])

    return m, truth


def geglu_gate_last() -> tuple[Function, Function]:
    m = made(GluMlp(DIM, 96, act_layer=nn.GELU))

    def truth(x: Tensor) -> Tensor:
        u = m.fc1(x)
        return m.fc2(u[..., :48] * F.gelu(u[..., 48:]).detach())

    return m, truth


def attention_pooling() -> tuple[Function, Function]:
    m = made(AttentionPoolLatent(DIM, num_heads=HEADS, norm_layer=nn.LayerNorm, qk_norm=True))

    def truth(x: Tensor) -> Tensor:
        k, v = (heads(part) for part in m.kv(x).chunk(2, -1))
        q = heads(m.q(m.latent).expand(len(x), -1, -1))
        pooled = m.proj(mixed(m.q_norm(q), m.k_norm(k), v))
        u = m.mlp.fc1(normed(m.norm, pooled))
        return (pooled + m.mlp.fc2(u * torch.special.ndtr(u).detach()))[:, 0]

    return m, truth


def rotated(x: Tensor, emb: Tensor) -> Tensor:
    """Rotary embedding as multiplication by e^{iθ} of the pairs (x₀, x₁), (x₂, x₃) …, except the class token's."""
    sin, cos = emb.chunk(2, -1)
    turn = torch.complex(cos[..., ::2], sin[..., ::2])
    pairs = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([x[:, :, :1], torch.view_as_real(pairs * turn).flatten(-2)], 2)


def rotary(**settings: object) -> tuple[Function, Function]:
    m = made(EvaAttention(DIM, HEADS, norm_layer=nn.LayerNorm, **settings))
    emb = RotaryEmbeddingCat(DIM // HEADS, in_pixels=False, feat_shape=[SIDE, SIDE]).get_embed().double()

    def truth(x: Tensor) -> Tensor:
        if m.qkv is None:
            q, k, v = (heads(f(x)) for f in (m.q_proj, m.k_proj, m.v_proj))
        else:
            parts = F.linear(x, m.qkv.weight, torch.cat([m.q_bias, m.k_bias, m.v_bias])).chunk(3, -1)
            q, k, v = (heads(part) for part in parts)
        y = mixed(rotated(m.q_norm(q), emb), rotated(m.k_norm(k), emb), v)
        y = normed(m.norm, y) if isinstance(m.norm, nn.LayerNorm) else y
        return m.proj(y if m.gate is None else y * m.gate(x).sigmoid().detach())

    return lambda x: m(x, rope=emb), truth


def beit() -> tuple[Function, Function]:
    m = made(BeitAttention(DIM, HEADS, qkv_bias=True, window_size=(SIDE, SIDE)))

    def truth(x: Tensor) -> Tensor:
        parts = F.linear(x, m.qkv.weight, torch.cat([m.q_bias, m.k_bias, m.v_bias])).chunk(3, -1)
        bias = m.relative_position_bias_table[m.relative_position_index].permute(2, 0, 1)
        return m.proj(mixed(*(heads(part) for part in parts), bias))

    return m, truth


def relative_bias(kind: Callable[..., nn.Module]) -> tuple[Function, Function]:
    m = made(
        RelPosAttention(
            DIM,
            HEADS,
            qkv_bias=True,
            qk_norm=True,
            rel_pos_cls=lambda **given: kind(window_size=(SIDE, SIDE), prefix_tokens=1, **given),
        )
    )

    def truth(x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in m.qkv(x).chunk(3, -1))
        return m.proj(mixed(m.q_norm(q), m.k_norm(k), v, m.rel_pos.get_bias()))

    return m, truth


TRUTHS: dict[str, Callable[[], tuple[Function, Function]]] = {
    "swiglu-with-norm": swiglu,
    "swiglu-packed": swiglu_packed,
    "geglu-gate-last": geglu_gate_last,
    "attention-pooling": attention_pooling,
    "rotary": lambda: rotary(scale_norm=False),
    "rotary-inner-norm-qk-norm": lambda: rotary(qk_norm=True, qkv_fused=False),
    "rotary-gated": lambda: rotary(gated=True),
    "beit-relative-bias": beit,
    "relative-bias-table": lambda: relative_bias(RelPosBias),
    "relative-bias-mlp": lambda: relative_bias(RelPosMlp),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("name", TRUTHS)
def test_a_module_against_autograd_by_hand(name: str, fused: bool) -> None:
    function, truth = TRUTHS[name]()
    module = function if isinstance(function, nn.Module) else None
    for m in _parts(function):
        if hasattr(m, "fused_attn"):
            m.fused_attn = fused
    x = normal(2, SIDE * SIDE + 1, DIM).requires_grad_()
    expected_output = truth(x)
    cotangent = normal(*expected_output.shape, seed=1)
    (expected,) = torch.autograd.grad(expected_output, x, cotangent)
    (full,) = torch.autograd.grad(function(x), x, cotangent)
    assert relative(function(x), expected_output) < EXACT
    assert relative(slope(function, x.detach(), cotangent), expected) < EXACT
    # what the method drops is no small correction, so agreement means something
    assert relative(full, expected) > 0.05
    if module is not None:
        assert affine_replay(module, x.detach()).passed


def _parts(function: Function) -> list[nn.Module]:
    """The modules of a function, which may be a module or close over one."""
    if isinstance(function, nn.Module):
        return list(function.modules())
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [m for cell in cells if isinstance(cell, nn.Module) for m in cell.modules()]
