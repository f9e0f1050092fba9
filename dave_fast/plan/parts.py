"""Readers of the parts that the transformers of all libraries share: norms, linear layers, activations, residual steps.

Readers take exact types and known attributes; anything else raises `NoPlanError` with its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import RmsNorm
from torch import Tensor, nn

from dave_fast.plan.installed import is_library
from dave_fast.plan.reading import Attention, Linear, Mlp, NoPlanError, Norm, Step

# nn.GELU's name depends on its `approximate`
ACTIVATIONS = {
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "Swish": "silu",
    "ReLU": "relu",
    "QuickGELU": "quick_gelu",
    # transformers' own
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "QuickGELUActivation": "quick_gelu",
}

Bias = Callable[[], Tensor]
# LayerScales of attention and MLP
Gammas = tuple[Tensor | None, Tensor | None]


def class_name(kind: type) -> str:
    """Return the full name of a class, by which those of libraries are known that may not be imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


LAYER_NORMS = {class_name(nn.LayerNorm), class_name(TimmLayerNorm), "open_clip.transformer.LayerNorm"}
RMS_NORMS = {class_name(nn.RMSNorm), class_name(RmsNorm)}


def is_layer_norm(module: Any) -> bool:
    """Return whether a module is a LayerNorm of PyTorch's or of one of the libraries."""
    return class_name(type(module)) in LAYER_NORMS


def pre_norm(
    attention: Attention, mlp: Mlp, norms: tuple[Any, Any], gammas: Gammas = (None, None)
) -> tuple[Step, Step]:
    """Return the two steps of a block with a norm ahead of each branch.

    Args:
        attention: without norm and LayerScale.
        mlp: likewise.
        norms: the modules of their norms.
        gammas: γ of their LayerScales, (D,) each.
    """
    first, second = map(read_norm, norms)
    return (replace(attention, norm=first, gamma=gammas[0]),), (replace(mlp, norm=second, gamma=gammas[1]),)


def read_norm(norm: Any) -> Norm | None:
    """Read a norm, ones and zeros where it has no weight or bias; return None for the identity."""
    if type(norm) is nn.Identity:
        return None
    if class_name(type(norm)) not in LAYER_NORMS | RMS_NORMS:
        raise NoPlanError(f"norm {type(norm).__name__} is neither LayerNorm nor RMSNorm")
    if norm.eps is None:
        raise NoPlanError("its RMSNorm's eps depends on the precision")
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    ones = torch.ones(norm.normalized_shape)
    return Norm(
        is_layer_norm(norm),
        ones if weight is None else weight.detach(),
        torch.zeros_like(ones) if bias is None else bias.detach(),
        norm.eps,
    )


def read_linear(module: Any) -> Linear:
    """Read an nn.Linear that is called, with a bias of zeros where it has none; peft's with its LoRA weights added."""
    # a library that has not been imported has made no module
    if type(module) is getattr(sys.modules.get("peft.tuners.lora"), "Linear", None):
        return _read_lora(module)
    if type(module) is not nn.Linear:
        raise NoPlanError(f"a {type(module).__name__} stands where nn.Linear is expected")
    weight = module.weight.detach()
    return Linear(weight, torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach())


def _read_lora(module: Any) -> Linear:
    """Read peft's linear layer: W + Σ scaling · B · A of its active adapters, in float64."""
    base = read_linear(module.base_layer)
    if module.merged and module.disable_adapters:
        # its forward would take the adapters out of the weights
        raise NoPlanError("its LoRA adapters are merged and disabled")
    if module.merged or module.disable_adapters:
        return base
    weight, bias = base.weight.double(), base.bias.double()
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        # peft before 0.15 has no table of variants
        if name in getattr(module, "lora_variant", (name,)):
            raise NoPlanError(f"its LoRA adapter '{name}' is none of the plain form")
        if type(module.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
            raise NoPlanError(f"a {type(module.lora_dropout[name]).__name__} stands ahead of its LoRA adapter '{name}'")
        down, up = (read_linear(part[name]) for part in (module.lora_A, module.lora_B))
        scaling, up_weight = float(module.scaling[name]), up.weight.double()
        weight = weight + scaling * up_weight @ down.weight.double()
        bias = bias + scaling * (up_weight @ down.bias.double() + up.bias.double())
    return Linear(weight, bias)


def split(packed: Linear) -> tuple[Linear, Linear, Linear]:
    """Return query, key and value of one packed projection."""
    width = len(packed.bias) // 3
    return packed.rows(0, width), packed.rows(width, 2 * width), packed.rows(2 * width, 3 * width)


def activation_name(module: nn.Module) -> str:
    """Return the name that `ops.activation` has for an activation module."""
    name = type(module).__name__
    # another's class of the same name may differ by less than low precision shows
    if not is_library(type(module)) and not type(module).__module__.startswith("torch."):
        raise NoPlanError(f"activation {name} is none of PyTorch's or a library's own")
    if name == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if name not in ACTIVATIONS:
        raise NoPlanError(f"activation {name} is none of GELU, {', '.join(ACTIVATIONS)}")
    # transformers' GELUs hold the function that they call
    held = getattr(module, "act", None)
    if held is not None and not _is_gelu(held, type(module), {"approximate": "tanh"} if name == "GELUTanh" else {}):
        raise NoPlanError(f"activation {name} calls another function than its own")
    return ACTIVATIONS[name]


def _is_gelu(held: Any, kind: type, settings: dict[str, str]) -> bool:
    """Return whether what an activation holds is PyTorch's GELU with these settings, or a method of its class."""
    if isinstance(held, MethodType):
        return type(held.__self__) is kind and held.__func__ in vars(kind).values()
    function, given = (held.func, held.keywords) if isinstance(held, partial) else (held, {})
    return function is torch._C._nn.gelu and given == settings and not getattr(held, "args", ())
