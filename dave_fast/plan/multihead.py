"""PyTorch's nn.MultiheadAttention, and the blocks that torchvision's and open_clip's ViTs make of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from dave_fast.plan.parts import activation_name, class_name, read_linear, split
from dave_fast.plan.reading import Attention, Linear, Mlp, NoPlanError


def expect(module: Any, *names: str) -> None:
    """Raise NoPlanError unless a module's class has one of these full names."""
    if class_name(type(module)) not in names:
        library, short = names[0].partition(".")[0], " or ".join(name.rpartition(".")[2] for name in names)
        raise NoPlanError(f"a {type(module).__name__} is not {library}'s own {short}")


def read_attention(attn: Any, *, batch_first: bool = True) -> Attention:
    """Read the attention of tokens to themselves, without the norm and the LayerScale of its block.

    Args:
        attn: nn.MultiheadAttention.
        batch_first: what its caller expects of it.
    """
    if type(attn) is not nn.MultiheadAttention:
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        raise NoPlanError("its attention has keys and values besides those of its tokens, or of other widths")
    if attn.batch_first is not batch_first:
        raise NoPlanError("its attention takes another order of images and tokens")
    # its layer is not called, so that only the weights count
    out = attn.out_proj
    if type(out) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise NoPlanError(f"a {type(out).__name__} stands where its attention's own layer is expected")
    weight = attn.in_proj_weight.detach()
    bias = weight.new_zeros(len(weight)) if attn.in_proj_bias is None else attn.in_proj_bias.detach()
    last = out.weight.detach()
    return Attention(
        qkv=split(Linear(weight, bias)),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.head_dim**-0.5,
        proj=Linear(last, last.new_zeros(len(last)) if out.bias is None else out.bias.detach()),
    )


def read_mlp(mlp: nn.Module) -> Mlp:
    """Read an MLP that applies a linear layer, an activation and another linear layer, with dropout or without."""
    parts = [part for part in mlp.children() if type(part) is not nn.Dropout]
    if len(parts) != 3:
        raise NoPlanError(f"its MLP has {len(parts)} layers")
    return Mlp((read_linear(parts[0]),), activation_name(parts[1]), read_linear(parts[2]))
