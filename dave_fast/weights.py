"""Has the user changed the model? A fingerprint of its modules and weights that costs next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# values of each tensor that are summed: writes through `.data` leave no other trace
PROBED = 256


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Equal for two calls between which nothing was changed.

    Notices replaced modules, parameters and buffers, in-place updates (by autograd's version counter) and
    wholesale writes through `.data` (by a sum over a few values of each tensor).
    """
    modules = tuple((name, id(module)) for name, module in model.named_modules())
    tensors = [*model.parameters(), *model.buffers()]
    return modules, tuple(_identity(t) for t in tensors), _probe(tensors)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # inference tensors keep no version
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape)


@torch.no_grad()
def _probe(tensors: list[Tensor]) -> tuple[float, ...]:
    sums = []
    for tensor in tensors:
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // PROBED)
        sums.append(flat[::step].double().sum())
    return tuple(torch.stack(sums).tolist()) if sums else ()
