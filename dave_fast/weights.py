"""Has the user changed the model? A fingerprint of its modules, settings and weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# what a module's settings are made of; `training` is no setting, since explanations are always in evaluation mode
SETTINGS = (bool, int, float, str, tuple, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Differs between two calls when the model was changed in between.

    Notices replaced modules, parameters and buffers, hooks, replaced forwards, and settings such as `eps`; in-place
    updates, by autograd's version counter; and writes through `.data`, which leave no other trace, by the sum of each
    tensor: one read of the weights. Writes through `.data` that keep every sum are missed.
    """
    modules = tuple((name, id(module), *_settings(module)) for name, module in model.named_modules())
    tensors = [*model.parameters(), *model.buffers()]
    return modules, tuple(_identity(t) for t in tensors), _sums(tensors)


def _settings(module: nn.Module) -> tuple[object, ...]:
    own = module.__dict__
    settings = tuple((k, v) for k, v in own.items() if k != "training" and isinstance(v, SETTINGS))
    hooks = tuple(id(hook) for kind in HOOKS for hook in own.get(kind, {}).values())
    return settings, hooks, id(own.get("forward"))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # inference tensors keep no version
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape)


@torch.no_grad()
def _sums(tensors: list[Tensor]) -> tuple[float, ...]:
    sums = [tensor.detach().sum(dtype=torch.float64).cpu() for tensor in tensors if not tensor.is_complex()]
    return tuple(torch.stack(sums).tolist()) if sums else ()
