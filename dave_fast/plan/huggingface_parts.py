"""The blocks of transformers' ViTs, whose classes differ in names alone.

A block is pre-norm: attention with separate projections, an MLP of two layers or a gated one of three, LayerScales.
Attention goes through transformers' table of implementations, of which PyTorch's own ("sdpa") and products and a
softmax ("eager") are read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor

from dave_fast.plan.installed import is_installed, replaced_by_name
from dave_fast.plan.parts import Bias, activation_name, class_name, pre_norm, read_linear
from dave_fast.plan.reading import Attention, Mlp, NoPlanError, Rotary, Step

_MASKS = "transformers.masking_utils"
# an implementation and the functions that make its masks and compute it; "eager" is a function of each model's file
IMPLEMENTATIONS = {
    "sdpa": ("sdpa_mask", "transformers.integrations.sdpa_attention.sdpa_attention_forward"),
    "eager": ("eager_mask", None),
}


@dataclass(frozen=True)
class Names:
    """Names of what is in the blocks of a kind of models.

    Attributes:
        prefix: of its classes.
        layer: class of a block, behind the prefix.
        attention: attribute of the attention.
        norms: attributes of the norms ahead of attention and MLP.
        scales: attributes of their LayerScales, modules or parameters; none where there are none.
    """

    prefix: str
    layer: str = "Layer"
    attention: str = "attention"
    norms: tuple[str, str] = ("norm1", "norm2")
    scales: tuple[str, str] | None = None


def expect(module: Any, model: Any, *names: str) -> None:
    """Raise NoPlanError unless a module's class is one of these names in the file of the model's class."""
    if class_name(type(module)) not in [f"{type(model).__module__}.{name}" for name in names]:
        raise NoPlanError(f"a {type(module).__name__} is not transformers' own {' or '.join(names)}")


def read_block(
    block: Any, model: Any, names: Names, rotary: Rotary | None = None, bias: Bias | None = None
) -> tuple[Step, ...]:
    """Return the two steps of a block: its attention, then its MLP.

    Args:
        block: of the model.
        model: gives the file of transformers whose classes are expected.
        names: of what is in the block.
        rotary: embedding that turns queries and keys.
        bias: makes what is added to the scores, (heads, N, N).
    """
    expect(block, model, names.prefix + names.layer)
    attn = getattr(block, names.attention)
    expect(attn, model, names.prefix + "Attention")
    attention, mlp = _read_attention(attn, rotary, bias), _read_mlp(block.mlp, model, names.prefix)
    first, second = names.scales or (None, None)
    gammas = _read_gamma(block, first, model, names.prefix), _read_gamma(block, second, model, names.prefix)
    return pre_norm(attention, mlp, (getattr(block, names.norms[0]), getattr(block, names.norms[1])), gammas)


def _read_attention(attn: Any, rotary: Rotary | None, bias: Bias | None) -> Attention:
    check_implementation(attn.config._attn_implementation, type(attn).__module__)
    if attn.is_causal:
        raise NoPlanError("its attention is causal")
    qkv = read_linear(attn.q_proj), read_linear(attn.k_proj), read_linear(attn.v_proj)
    heads = len(qkv[0].bias) // attn.head_dim
    if any(len(part.bias) != heads * attn.head_dim for part in qkv):
        raise NoPlanError("its queries, keys and values have different widths")
    clip = hasattr(attn, "out_proj")
    return Attention(
        qkv=qkv,
        heads=heads,
        head_dim=attn.head_dim,
        scale=attn.scale if clip else attn.scaling,
        proj=read_linear(attn.out_proj if clip else attn.o_proj),
        rotary=rotary,
        bias=bias,
    )


def check_implementation(name: str | None, file: str) -> None:
    """Raise NoPlanError unless attention is computed by the library's own function of this name.

    Args:
        name: `_attn_implementation` of a configuration.
        file: module of the attention's class, which has the tables by name.
    """
    if name not in IMPLEMENTATIONS:
        raise NoPlanError(f"its attention is computed by {name!r}, which is none of {', '.join(IMPLEMENTATIONS)}")
    mask, own = IMPLEMENTATIONS[name]
    tables = (
        (getattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS", {}), own),
        (getattr(sys.modules.get(_MASKS), "ALL_MASK_ATTENTION_FUNCTIONS", {}), f"{_MASKS}.{mask}"),
    )
    for table, expected in tables:
        found: Any = table.get(name)
        known = found is None if expected is None else _full_name(found) == expected and is_installed(found)
        if not known:
            raise NoPlanError(f"transformers' table of attention has another function as {name!r}")
        inner = None if found is None else replaced_by_name(found)
        if inner is not None:
            raise NoPlanError(f"{inner}, which {found.__name__} calls, is not the one that was installed")


def _full_name(function: Any) -> str | None:
    return f"{function.__module__}.{function.__qualname__}" if isinstance(function, FunctionType) else None


def _read_mlp(mlp: Any, model: Any, prefix: str) -> Mlp:
    expect(mlp, model, *(prefix + name for name in ("MLP", "SwiGLUFFN", "GatedMLP")))
    ups = [name for name in ("gate_proj", "up_proj", "fc1") if hasattr(mlp, name)]
    act, last = (mlp.activation_fn, mlp.fc2) if ups == ["fc1"] else (mlp.act_fn, mlp.down_proj)
    first = tuple(read_linear(getattr(mlp, name)) for name in ups)
    return Mlp(first, activation_name(act) + ("_glu" if len(first) == 2 else ""), read_linear(last))


def _read_gamma(block: Any, name: str | None, model: Any, prefix: str) -> Tensor | None:
    """Return LayerScale's γ (D,), the parameter of a module or of the block; None where it is the number 1."""
    if name is None:
        return None
    scale = getattr(block, name)
    if type(scale) is float and scale == 1.0:
        return None
    if not isinstance(scale, Tensor):
        expect(scale, model, prefix + "LayerScale")
        scale = scale.lambda1
    return scale.detach()
