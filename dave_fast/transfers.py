"""Copies between host and GPU that avoid synchronisation.

A copy from a GPU, or from pageable host memory, waits for all queued kernels. So a call's inputs go to the GPU through
pinned memory, and what the host needs of the results (finiteness, classes, checksums of weights) comes back in a single
copy at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the same tensors on a device, in one copy for each other device that they are on.

    Copies to a GPU are asynchronous; copies to the host are not.
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
    """Return one tensor on a device, as `moved` does."""
    return moved([tensor], device)[0]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return the bytes of tensors of one device in one tensor, widest elements first, so that each stays aligned."""
    tensors = [tensors[place] for place in _order(tensors)]
    return torch.cat([tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in tensors])


def unpacked(data: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors whose bytes `packed` joined, as views; `like` has their dtypes and shapes."""
    order = _order(like)
    parts = dict(zip(order, data.split([like[place].nbytes for place in order]), strict=True))
    return [parts[place].view(tensor.dtype).view(tensor.shape) for place, tensor in enumerate(like)]


def _order(tensors: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda place: -tensors[place].itemsize)


def _copied(data: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and data.device.type == "cpu":
        # PyTorch's allocator does not reuse pinned memory before the copy is done.
        return data.pin_memory().to(device, non_blocking=True)
    return data.to(device)
