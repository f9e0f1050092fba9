"""Copies between host and GPU: those that nothing waits for, and the one at a call's end that the host waits for.

A copy from a GPU, and one from the host's ordinary memory, waits for all that is queued. So what a call needs on the
GPU goes through pinned memory, and what the host must know of the results (is anything not finite, the classes, the
weights' checksums) is read at the end, all of it in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on a device, in one copy for each other device that they are on.

    Copies to a GPU are queued and not waited for; copies to the host are.
    """
    found = list(tensors)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    for source in {tensor.device for tensor in tensors} - {device}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == source]
        some = [tensors[place] for place in places]
        for place, tensor in zip(places, unpacked(_copied(packed(some), device), some), strict=True):
            found[place] = tensor
    return found


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """One tensor on a device, as `moved` does it."""
    return moved([tensor], device)[0]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors of one device, one after the other, widest elements first so that each stays aligned."""
    tensors = [tensors[place] for place in _order(tensors)]
    return torch.cat([tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in tensors])


def unpacked(data: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the bytes that `packed` made of tensors with the dtypes and shapes of `like`."""
    order = _order(like)
    parts = dict(zip(order, data.split([like[place].nbytes for place in order]), strict=True))
    return [parts[place].view(tensor.dtype).view(tensor.shape) for place, tensor in enumerate(like)]


def _order(tensors: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda place: -tensors[place].itemsize)


def _copied(data: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and data.device.type == "cpu":
        # pinned memory is used again only when the copy is done: PyTorch's allocator sees to it
        return data.pin_memory().to(device, non_blocking=True)
    return data.to(device)
