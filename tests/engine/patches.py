"""Random changes that users make to a model: at the instance, at its class, in a library's functions, around it.

A patch is `patch(rng, undo) -> change`. It draws its constants from `rng`, makes at once the changes that all models
see (of a class, of a library's function, hooks of every module) and gives `undo` their reversal; `change(model)` makes
the others, and returns the model, which may be another one around it. So a patch makes any number of equal models.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.engine.effects import Effect, applied, effect
from tests.engine.wrappers import WRAPPERS, Change, Own
from tests.variants import CLASSES

Patch = Callable[[Random, ExitStack], Change]

CLASSES_PATCHED = (
    timm.layers.Attention,
    timm.layers.LayerScale,
    timm.layers.Mlp,
    timm.layers.PatchEmbed,
    timm.layers.SwiGLU,
    timm.models.beit.Attention,
    timm.models.beit.Beit,
    timm.models.deit.VisionTransformerDistilled,
    timm.models.eva.Eva,
    timm.models.eva.EvaAttention,
    timm.models.eva.EvaBlock,
    timm.models.vision_transformer.Block,
    timm.models.vision_transformer.VisionTransformer,
    timm.models.vision_transformer_relpos.RelPosAttention,
    nn.GELU,
    nn.LayerNorm,
)
METHODS = ("forward", "forward_features", "forward_head", "_pos_embed", "pool")


def replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `undo` closes."""
    undo.enter_context(mock.patch.object(owner, name, value, create=True))


def called_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if not isinstance(m, nn.ModuleList)]


def site(model: nn.Module, at: float) -> nn.Module:
    """Return the module at a share of the way through the model."""
    modules = called_modules(model)
    return modules[int(at * len(modules))]


def _method(rng: Random) -> tuple[Callable[[nn.Module], nn.Module], str]:
    """Return where to find a module, and the name of one of its methods."""
    if rng.random() < 0.4:
        name = rng.choice(METHODS)
        return lambda model: model, name
    at = rng.random()
    return lambda model: site(model, at), "forward"


def _ways(act: Effect) -> dict[str, Callable[[nn.Module, str], Any]]:
    """Return the ways to wrap a method of one module."""

    def closure(owner: nn.Module, name: str) -> Any:
        before = getattr(owner, name)
        return lambda *args, **kwargs: applied(act, before(*args, **kwargs), args[0] if args else None)

    def bound(owner: nn.Module, name: str) -> Any:
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return applied(act, getattr(type(self), name)(self, *args, **kwargs), args[0] if args else None)

        return types.MethodType(method, owner)

    return {
        "a closure": closure,
        "a bound method": bound,
        "a partial": lambda owner, name: functools.partial(Wrapped.call, getattr(owner, name), act),
        "an object": lambda owner, name: Wrapped(getattr(owner, name), act),
    }


class Wrapped:
    """A callable object that applies an effect to the result of another function."""

    def __init__(self, before: Callable[..., Any], act: Effect) -> None:
        self.before, self.act = before, act

    @staticmethod
    def call(before: Callable[..., Any], act: Effect, *args: Any, **kwargs: Any) -> Any:
        return applied(act, before(*args, **kwargs), args[0] if args else None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.before, self.act, *args, **kwargs)


def instance_method(rng: Random, undo: ExitStack) -> Change:
    where, name = _method(rng)
    ways = _ways(effect(rng))
    way = ways[rng.choice(list(ways))]

    def change(model: nn.Module) -> nn.Module:
        owner = where(model)
        if hasattr(owner, name):
            setattr(owner, name, way(owner, name))
        return model

    return change


def class_method(rng: Random, undo: ExitStack) -> Change:
    owner = rng.choice(CLASSES_PATCHED)
    name = rng.choice([name for name in METHODS if hasattr(owner, name)])
    act, before = effect(rng), getattr(owner, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return applied(act, before(self, *args, **kwargs), args[0] if args else None)

    replace(undo, owner, name, rng.choice([method, functools.partialmethod(method)]))
    return lambda model: model


def subclass(rng: Random, undo: ExitStack) -> Change:
    at, act = rng.random(), effect(rng)

    def change(model: nn.Module) -> nn.Module:
        module = site(model, at)
        known = type(module)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return applied(act, known.forward(self, *args, **kwargs), args[0] if args else None)

        module.__class__ = type(known.__name__, (known,), {"forward": forward})
        return model

    return change


def hook(rng: Random, undo: ExitStack) -> Change:
    """A hook or a pre-hook of one module, or one for all modules that acts at modules of one class."""
    at, act = rng.random(), effect(rng)
    before, everywhere = rng.random() < 0.4, rng.random() < 0.3
    name = rng.choice(["Attention", "Mlp", "Linear", "LayerNorm", "VisionTransformer"])

    def forward_hook(module: nn.Module, args: Any, result: Any) -> Any:
        if not everywhere or type(module).__name__ == name:
            return applied(act, result, args[0] if args else None)
        return None

    def pre_hook(module: nn.Module, args: Any) -> Any:
        if args and (not everywhere or type(module).__name__ == name):
            return (act(args[0], None), *args[1:])
        return None

    if everywhere:
        register = nn.modules.module.register_module_forward_pre_hook if before else None
        register = register or nn.modules.module.register_module_forward_hook
        undo.callback(register(pre_hook if before else forward_hook).remove)
        return lambda model: model

    def change(model: nn.Module) -> nn.Module:
        module = site(model, at)
        module.register_forward_pre_hook(pre_hook) if before else module.register_forward_hook(forward_hook)
        return model

    return change


def own_norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def module_replaced(rng: Random, undo: ExitStack) -> Change:
    """Another module, or one of the user's around the one that was there."""
    at, act = rng.random(), effect(rng)
    kind = rng.choice(["around", "activation", "norm", "scale", "head", "nothing in its place"])
    seed = rng.randrange(1000)

    def change(model: nn.Module) -> nn.Module:
        parents = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(getattr(parent, name, None), nn.Module)
            and not isinstance(child, nn.ModuleList | nn.Sequential)
        ]
        wanted = {
            "activation": lambda name, m: "act" in name,
            "norm": lambda name, m: "norm" in name,
            "scale": lambda name, m: name.startswith("ls") or "drop" in name,
            "head": lambda name, m: name.startswith("head") and isinstance(m, nn.Linear),
            "nothing in its place": lambda name, m: "norm" in name or "drop" in name or "ls" in name,
            "around": lambda name, m: True,
        }[kind]
        found = [each for each in parents if wanted(each[1], each[2])]
        if not found:
            return model
        parent, name, child = found[int(at * len(found))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new = {
                "around": lambda: Own(lambda x: act(x, None), child),
                "activation": lambda: [nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.GELU("tanh"), nn.Softplus(), nn.LeakyReLU()][
                    seed % 6
                ],
                "norm": lambda: [Own(own_norm), nn.Identity(), Own(lambda x: F.layer_norm(x, x.shape[-1:]))][seed % 3],
                "scale": lambda: Own(lambda x: act(x, None)),
                "head": lambda: nn.Sequential(
                    nn.Linear(child.in_features, 16),
                    [nn.GELU(), nn.ReLU(), nn.LayerNorm(16), nn.Dropout(0.5)][seed % 4],
                    nn.Linear(16, CLASSES),
                ).eval(),
                "nothing in its place": nn.Identity,
            }[kind]()
        setattr(parent, name, new)
        return model

    return change


def attribute(rng: Random, undo: ExitStack) -> Change:
    """A setting changed after the model was built."""
    values = {
        "scale": [0.1, 0.7],
        "eps": [0.5, 1e-2],
        "num_heads": [1, 4, 3],
        "head_dim": [8],
        "fused_attn": [True, False],
        "global_pool": ["avg", "token", "max", "avgmax", ""],
        "num_prefix_tokens": [0, 1, 2],
        "pool_include_prefix": [True],
        "no_embed_class": [True, False],
        "dynamic_img_size": [True, False],
        "grad_checkpointing": [True],
        "approximate": ["tanh", "none"],
        "negative_slope": [0.3],
        "p": [0.5],
        "rotate_half": [True, False],
        "stride": [(4, 4)],
        "padding": [(1, 1)],
        "has_class_token": [False],
    }
    name = rng.choice(list(values))
    value, at = rng.choice(values[name]), rng.random()

    def change(model: nn.Module) -> nn.Module:
        owners = [m for m in model.modules() if name in vars(m)]
        if owners:
            setattr(owners[int(at * len(owners))], name, value)
        return model

    return change


def tensor(rng: Random, undo: ExitStack) -> Change:
    """A weight that is another object: changed, a plain attribute, a leaf with a gradient, a buffer, a view."""
    at, kind = rng.random(), rng.choice(["changed", "plain", "leaf", "buffer", "no gradient", "shared", "computed"])

    def change(model: nn.Module) -> nn.Module:
        owned = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        module, name, parameter = owned[int(at * len(owned))]
        value = parameter.detach().clone()
        if kind == "changed":
            parameter.data = 0.5 * value + 0.1
        elif kind == "no gradient":
            parameter.requires_grad_(False)
        elif kind == "shared":
            same = [(m, n) for m, n, p in owned if p.shape == parameter.shape]
            setattr(same[0][0], same[0][1], parameter)
        else:
            del module._parameters[name]
            if kind == "buffer":
                module.register_buffer(name, value)
            elif kind == "computed":
                # as own normalisations of weights leave it: not a leaf
                module.__dict__[name] = 0.5 * value.requires_grad_()
            else:
                module.__dict__[name] = value.requires_grad_(kind == "leaf")
        return model

    return change


class Damped(nn.Module):
    """A parametrisation: half of the weight and a little of its mean."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight + 0.1 * weight.mean()


def parametrised(rng: Random, undo: ExitStack) -> Change:
    at, kind = rng.random(), rng.choice(["weight_norm", "old weight_norm", "spectral_norm", "own"])

    def change(model: nn.Module) -> nn.Module:
        linears = [m for m in model.modules() if type(m) is nn.Linear and "weight" in m._parameters]
        if not linears:
            return model
        layer = linears[int(at * len(linears))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind == "weight_norm":
                parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(0.7)
            elif kind == "old weight_norm":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    nn.utils.weight_norm(layer).weight_g.data.mul_(0.7)
            elif kind == "spectral_norm":
                parametrizations.spectral_norm(layer)
            else:
                parametrize.register_parametrization(layer, "weight", Damped())
        return model.eval()

    return change


def library(rng: Random, undo: ExitStack) -> Change:
    """A function of timm's or of PyTorch's that is replaced for the whole process."""
    act = effect(rng)
    owner, name = rng.choice(
        [
            (F, "scaled_dot_product_attention"),
            (F, "gelu"),
            (F, "silu"),
            (F, "layer_norm"),
            (F, "linear"),
            (timm.models.vision_transformer, "resample_abs_pos_embed"),
            (timm.models.vision_transformer, "global_pool_nlc"),
            (timm.models.eva, "apply_rot_embed_cat"),
            (timm.layers.attention, "maybe_add_mask"),
            (timm.models.beit, "gen_relative_position_index"),
        ]
    )
    before = getattr(owner, name, None)
    if before is None:
        return lambda model: model

    @functools.wraps(before)
    def function(*args: Any, **kwargs: Any) -> Any:
        return applied(act, before(*args, **kwargs), args[0] if args else None)

    replace(undo, owner, name, function)
    return lambda model: model


def wrapper(rng: Random, undo: ExitStack) -> Change:
    return WRAPPERS[rng.choice(list(WRAPPERS))]


def mode(rng: Random, undo: ExitStack) -> Change:
    """Odd states: calls with gradients before, checkpointing, gradients and views left behind, training of a part."""
    kind, at = rng.choice(["called", "checkpointed", "trained", "frozen", "a part in training"]), rng.random()

    def change(model: nn.Module) -> nn.Module:
        if kind == "checkpointed" and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)
        elif kind == "frozen":
            model.requires_grad_(at < 0.5)
        elif kind == "a part in training":
            site(model, at).train()
        elif kind in ("called", "trained"):
            dtype = next((p.dtype for p in model.parameters()), torch.float32)
            # a model that fails here is given to the explainer as it is
            with contextlib.suppress(Exception):
                score = model(torch.ones(1, 3, *model.patch_embed.img_size, dtype=dtype)).sum()
                if kind == "trained":
                    score.backward()
        return model

    return change


INNER: dict[str, Patch] = {
    "instance": instance_method,
    "class": class_method,
    "subclass": subclass,
    "hook": hook,
    "module": module_replaced,
    "attribute": attribute,
    "tensor": tensor,
    "parametrised": parametrised,
    "library": library,
    "mode": mode,
}
