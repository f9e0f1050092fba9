"""A fingerprint of a model's modules, settings and weights, by which changes to the model are noticed.

The structure (replaced modules, parameters and buffers, hooks, replaced forwards, settings such as `eps`, and in-place
updates, by autograd's version counter) is compared on the host. Writes through `.data` do not advance the version
counter; checksums of the weights' bits, computed on the weights' own device, notice them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

from dave_fast.transfers import moved

# types of attributes that are settings; `training` is left out, since explanations are always in evaluation mode
SETTINGS = (bool, int, float, str, tuple, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A tensor's 64-bit words are laid out in rows of COLUMNS words, and summed along both axes. COLUMNS is a prime: the
# same power of two added to each word of a row (the sign of a float64 is its highest bit) does not cancel, as it would
# with an even number, and the columns do not coincide with the tensor's own. Columns are summed in GROUPs of rows
# first, which is faster.
WORD, GROUP, COLUMNS = 8, 7, 509
HOST = torch.device("cpu")


class State:
    """The state of a model at one time.

    Args:
        model: is not changed.
        values: whether to compare the weights' values, too, besides the structure.
    """

    def __init__(self, model: nn.Module, *, values: bool) -> None:
        self._model, self._values = model, values
        self._structure = structure(model)
        self._checksums = moved(self.checksums(), HOST)

    def holds(self, *, values: bool) -> bool:
        """Return whether the model is unchanged; with `values` the weights too, which waits for their devices."""
        if structure(self._model) != self._structure:
            return False
        return not values or self.has(moved(self.checksums(), HOST))

    def checksums(self) -> list[Tensor]:
        """Queue the computation of the model's present checksums on its devices; an empty list without values."""
        return checksums(self._model) if self._values else []

    def has(self, checksums: Sequence[Tensor]) -> bool:
        """Return whether these, read back to the host, are the checksums of the state."""
        return len(checksums) == len(self._checksums) and all(map(torch.equal, checksums, self._checksums))


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Return a value that differs between two calls if the model was changed in between.

    Waits for the devices of the weights. Only writes through `.data` can be missed, those that `checksums` misses.
    """
    return structure(model), tuple(read.numpy().tobytes() for read in moved(checksums(model), HOST))


def structure(model: nn.Module) -> tuple[object, ...]:
    """Return the part of the fingerprint that does not read the weights' values."""
    modules = tuple((name, id(module), *_settings(module)) for name, module in model.named_modules())
    return modules, tuple(map(_identity, _tensors(model)))


def _settings(module: nn.Module) -> tuple[object, ...]:
    own = module.__dict__
    settings = tuple([item for item in own.items() if _is_setting(item[1].__class__) and item[0] != "training"])
    # a new hook may have the address of a removed one, but not the number of its handle
    hooks = tuple([(key, id(hook)) for kind in HOOKS if own.get(kind) for key, hook in own[kind].items()])
    return settings, hooks, id(own.get("forward"))


@lru_cache(maxsize=1024)
def _is_setting(kind: type) -> bool:
    """Return whether an attribute of this type is a setting; cached, since every call checks every attribute."""
    return issubclass(kind, SETTINGS)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, each once."""
    owned = ((*module._parameters.values(), *module._buffers.values()) for module in model.modules())
    return list({id(tensor): tensor for tensor in chain.from_iterable(owned) if tensor is not None}.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # inference tensors have no version counter
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape)


@torch.no_grad()
def checksums(model: nn.Module) -> list[Tensor]:
    """Return checksums of the weights' bits, a tensor of bytes for each device, independent of the number of threads.

    Tensors of less than 28 KiB, and the remainders of larger ones, are copied. The rest are 64-bit words in rows of
    509, of which every row and every column is summed modulo 2⁶⁴; integer sums are exact, and treat NaN like any other
    value. A change of one to three words is always noticed, hence also two words that are swapped, and so is the sign
    of all values in float64. Missed are changes that cancel in every row and every column at once, of four words or
    more: in the simplest case the corners of a rectangle (+a, −a, −a, +a, or the signs of four float64 values). They
    can be constructed; for words replaced by random ones the probability is at most 2⁻⁶⁴, for signs of float64 flipped
    at random 2^-(rows + columns - 1).
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(model):
        # a meta tensor has no values
        if not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append(_bits(tensor))
    return [_checksum(tensors) for tensors in by_device.values()]


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, aligned for 64-bit words: (n,) uint8, the tensor's own memory if possible.

    Tensors whose memory is not the array of their values (sparse, quantised, subclasses) are replaced by their sum.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or type(tensor) is not Tensor:
        tensor = tensor.sum(dtype=torch.float64).reshape(1)
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
    aligned = flat.storage_offset() * flat.itemsize % WORD == 0
    return (flat if aligned else flat.clone()).view(torch.uint8)


def _checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums of tensors of bytes on one device, and the bytes that are not summed, (n,) uint8."""
    sums, exact = [], []
    for tensor in tensors:
        groups = tensor.nbytes // (WORD * GROUP * COLUMNS)
        summed = groups * (WORD * GROUP * COLUMNS)
        if groups:
            words = tensor[:summed].view(torch.int64).view(groups, GROUP, COLUMNS)
            sums += [words.sum(2), words.sum(1).sum(0)]
        exact.append(tensor[summed:])
    return torch.cat([part.view(-1).view(torch.uint8) for part in (*sums, *exact)])
