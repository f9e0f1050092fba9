"""Readers of the parts that timm's transformers share: attention, MLPs, blocks.

Readers take exact types and known attributes; anything else raises `NoPlanError` with its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import GluMlp, LayerScale, SwiGLU
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from dave_fast.plan.parts import Bias, activation_name, pre_norm, read_linear, read_norm, split
from dave_fast.plan.reading import Attention, Linear, Mlp, NoPlanError, Norm, Rotary, Step


def check_block(block: nn.Module, *classes: type[nn.Module]) -> None:
    """Raise NoPlanError for a block that is of none of these classes exactly."""
    if type(block) not in classes:
        known = " or ".join(known.__name__ for known in classes)
        raise NoPlanError(f"a {type(block).__name__} is not timm's own {known}")


def residual_steps(block: Any, attention: Attention, *, post_norm: bool = False) -> tuple[Step, Step]:
    """Return the two steps of a block: its attention, then its MLP, each with its norm and its LayerScale.

    Args:
        block: has `norm1`, `norm2`, `mlp` and, unless post_norm, LayerScales `ls1`, `ls2` or `gamma_1`, `gamma_2`.
        attention: the block's, without norm and LayerScale.
        post_norm: whether the norms stand behind the branches; such blocks have no LayerScale.
    """
    mlp = read_mlp(block.mlp)
    if post_norm:
        return (replace(attention, post=read_norm(block.norm1)),), (replace(mlp, post=read_norm(block.norm2)),)
    first, second = (block.ls1, block.ls2) if hasattr(block, "ls1") else (block.gamma_1, block.gamma_2)
    return pre_norm(attention, mlp, (block.norm1, block.norm2), (read_gamma(first), read_gamma(second)))


def read_gamma(scale: Any) -> Tensor | None:
    """Return LayerScale's γ (D,), given its module or its parameter; None where there is no LayerScale."""
    if scale is None or type(scale) is nn.Identity:
        return None
    if type(scale) is LayerScale:
        scale = scale.gamma
    if not isinstance(scale, Tensor):
        raise NoPlanError(f"a {type(scale).__name__} stands where LayerScale is expected")
    return scale.detach()


def read_attention(
    attn: Any, *classes: type[nn.Module], rotary: Rotary | None = None, bias: Bias | None = None
) -> Attention:
    """Read an attention of one of these classes, without the norm and the LayerScale of its block.

    Args:
        attn: packed or separate projections `qkv` or `q_proj`, `k_proj`, `v_proj`; `num_heads`, `proj`.
        classes: exact types that are known to compute softmax attention of these attributes.
        rotary: embedding that turns queries and keys.
        bias: makes what is added to the scores, (heads, N, N).
    """
    if type(attn) not in classes:
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    if getattr(attn, "gate", None) is not None:
        raise NoPlanError("its attention gates its output")
    return read_heads(attn, _read_projections(attn), read_linear(attn.proj), rotary=rotary, bias=bias)


def read_heads(
    module: Any,
    qkv: tuple[Linear, Linear, Linear],
    proj: Linear,
    *,
    rotary: Rotary | None = None,
    bias: Bias | None = None,
) -> Attention:
    """Return the attention of these projections with a module's heads, scale and inner norms."""
    head_dim = len(qkv[0].bias) // module.num_heads
    # folding reorders a head's components where neighbours turn with each other; only a known norm can follow
    head_norm = read_head_norm if rotary is None or rotary.half else read_norm
    identity = nn.Identity()
    return Attention(
        qkv=qkv,
        heads=module.num_heads,
        head_dim=head_dim,
        # PyTorch's fused attention ignores the module's scale
        scale=head_dim**-0.5 if module.fused_attn else module.scale,
        proj=proj,
        groups=getattr(module, "num_kv_groups", 1),
        q_norm=head_norm(getattr(module, "q_norm", identity)),
        k_norm=head_norm(getattr(module, "k_norm", identity)),
        rotary=rotary,
        bias=bias,
        inner=read_norm(getattr(module, "norm", identity)),
    )


def _read_projections(attn: Any) -> tuple[Linear, Linear, Linear]:
    """Return query, key and value; biases may stand beside a packed projection, as EVA's and BEiT's do."""
    if attn.qkv is None:
        return read_linear(attn.q_proj), read_linear(attn.k_proj), read_linear(attn.v_proj)
    packed = read_linear(attn.qkv)
    if getattr(attn, "q_bias", None) is None:
        return split(packed)
    if attn.qkv.bias is not None:
        raise NoPlanError("its qkv projection has two biases")
    if type(attn.qkv) is not nn.Linear:
        # such an attention takes the layer's weight and may not call it, so that an adapter has no effect
        raise NoPlanError("its qkv projection has separate biases and is not nn.Linear")
    biases = [b.detach() for b in (attn.q_bias, attn.k_bias, attn.v_bias)]
    return split(Linear(packed.weight, torch.cat(biases)))


def read_head_norm(norm: nn.Module) -> Norm | nn.Module | None:
    """Read a norm of queries or keys; return the module itself where it has another form."""
    try:
        return read_norm(norm)
    except NoPlanError:
        return norm


def read_mlp(mlp: Any) -> Mlp:
    """Read timm's Mlp, GluMlp or SwiGLU, without the norm and the LayerScale of its block."""
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU):
        raise NoPlanError(f"its MLP is a {type(mlp).__name__}")
    activation = activation_name(mlp.act)
    if type(mlp) is GluMlp:
        activation += "_glu_last" if mlp.gate_last else "_glu"
    elif type(mlp) is SwiGLU:
        activation += "_glu"
    first = (mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else (mlp.fc1,)
    return Mlp(
        fc1=tuple(read_linear(layer) for layer in first),
        activation=activation,
        fc2=read_linear(mlp.fc2),
        inner=read_norm(mlp.norm),
    )
