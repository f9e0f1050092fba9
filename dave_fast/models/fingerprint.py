"""Has the user changed the model? A fingerprint of its modules, settings and weights.

The structure (replaced modules, parameters and buffers, hooks, replaced forwards, settings such as `eps`, and in-place
updates, by autograd's version counter) is compared on the host. Writes through `.data` leave no trace there; they are
noticed by checksums of the weights' bits, made on the weights' own device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from dave_fast.transfers import moved

# what a module's settings are made of; `training` is no setting, since explanations are always in evaluation mode
SETTINGS = (bool, int, float, str, tuple, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A tensor's 64-bit words are laid out in rows of COLUMNS words, and summed along both. COLUMNS is a prime: the same
# power of two added to each word of a row (in float64 a sign is the highest bit) does not cancel, as it would in an
# even number, and the columns are none of the tensor's own. Columns are summed in groups of rows first: faster.
WORD, GROUP, COLUMNS = 8, 7, 509
HOST = torch.device("cpu")


class State:
    """What a model was at one time.

    Args:
        model: is only read.
        values: whether the weights' values count beside the structure.
    """

    def __init__(self, model: nn.Module, *, values: bool) -> None:
        self._model, self._values = model, values
        self._structure = structure(model)
        self._checksums = moved(self.checksums(), HOST)

    def holds(self, *, values: bool) -> bool:
        """Whether the model is still what it was: its structure, and its values where asked (which waits for them)."""
        if structure(self._model) != self._structure:
            return False
        return not values or self.has(moved(self.checksums(), HOST))

    def checksums(self) -> list[Tensor]:
        """The model's checksums now, queued on its devices; none where values do not count."""
        return checksums(self._model) if self._values else []

    def has(self, checksums: Sequence[Tensor]) -> bool:
        """Whether these, read back to the host, are the checksums of that time."""
        return len(checksums) == len(self._checksums) and all(map(torch.equal, checksums, self._checksums))


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Differs between two calls when the model was changed in between; waits for the devices of its weights.

    Misses only writes through `.data` that `checksums` misses.
    """
    return structure(model), tuple(read.numpy().tobytes() for read in moved(checksums(model), HOST))


def structure(model: nn.Module) -> tuple[object, ...]:
    """What can be compared without a look at the weights' values."""
    modules = tuple((name, id(module), *_settings(module)) for name, module in model.named_modules())
    return modules, tuple(map(_identity, _tensors(model)))


def _settings(module: nn.Module) -> tuple[object, ...]:
    own = module.__dict__
    settings = tuple([item for item in own.items() if _is_setting(item[1].__class__) and item[0] != "training"])
    # a new hook may have the address of a removed one, but never the number of its handle
    hooks = tuple([(key, id(hook)) for kind in HOOKS if own.get(kind) for key, hook in own[kind].items()])
    return settings, hooks, id(own.get("forward"))


@lru_cache(maxsize=1024)
def _is_setting(kind: type) -> bool:
    """Asked of every attribute of every module at every call, so remembered."""
    return issubclass(kind, SETTINGS)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    found = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # inference tensors keep no version
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape)


@torch.no_grad()
def checksums(model: nn.Module) -> list[Tensor]:
    """For each device of the weights a tensor of bytes on it, the same for the same bits whatever the threads.

    A tensor of less than 28 KiB, and what a larger one has left over, stands there itself. The rest are 64-bit words in
    rows of 509, of which there are the sums of every row and of every column, modulo 2⁶⁴: exact, so that NaN is a value
    as any other. A change of one to three words is always noticed, so also any two words that change places, and so is
    the sign of all values in float64. What is missed cancels in every row and every column at once: four words or more,
    in the simplest case the corners of a rectangle (+a, −a, −a, +a, or the signs of four float64 values). That can be
    made on purpose; for words that become random ones it has a probability of at most 2⁻⁶⁴, for signs of float64 that
    are flipped at random 2^-(rows + columns - 1).
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(model):
        # a meta tensor has no values
        if not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append(_bits(tensor))
    return [_checksum(tensors) for tensors in by_device.values()]


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes as flat 64-bit words can be viewed: (n,) uint8, the tensor's own memory where that is possible.

    Of tensors whose memory is not their values alone (sparse, quantised, subclasses of other libraries) their sum.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or type(tensor) is not Tensor:
        tensor = tensor.sum(dtype=torch.float64).reshape(1)
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
    aligned = flat.storage_offset() * flat.itemsize % WORD == 0
    return (flat if aligned else flat.clone()).view(torch.uint8)


def _checksum(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of tensors of bytes on one device, and the bytes that are not summed: (n,) uint8."""
    sums, exact = [], []
    for tensor in tensors:
        groups = tensor.nbytes // (WORD * GROUP * COLUMNS)
        summed = groups * (WORD * GROUP * COLUMNS)
        if groups:
            words = tensor[:summed].view(torch.int64).view(groups, GROUP, COLUMNS)
            sums += [words.sum(2), words.sum(1).sum(0)]
        exact.append(tensor[summed:])
    return torch.cat([part.view(-1).view(torch.uint8) for part in (*sums, *exact)])
