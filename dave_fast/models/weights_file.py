"""Weights from a file: safetensors, or tensors that `torch.save` wrote. Pickled code is not executed.

Training scripts put weights into a dictionary, and prefix their names by those of a wrapper; both are undone. If a file
has an average of weights besides the last ones, the average is taken, as timm does.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, reason_of

# keys under which training scripts put the weights, averages first
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
# prefixes of DistributedDataParallel and torch.compile; no library's own names begin so
_WRAPPERS = ("module.", "_orig_mod.")
# the usual attribute of a LightningModule; some libraries' own names begin so, too
_LIGHTNING = "model."
# indices that old versions of CLIP saved; the model has its own
_NOT_WEIGHTS = "position_ids"
_NAMED = 4


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read weights by name, on the CPU.

    Raises:
        InputError: the file cannot be read, has other objects than tensors, or has no tensor.
    """
    try:
        found = _read(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the weights {path} hold other objects than tensors, and code in pickles is not run: save "
            f"model.state_dict(), best by safetensors.torch.save_file ({reason_of(error)})."
        ) from error
    # readers raise errors of any type for damaged files
    except Exception as error:
        raise InputError(f"cannot read the weights {path}: {reason_of(error)}.") from error
    while isinstance(found, Mapping):
        inner = next((found[key] for key in _KEYS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = {n: t for n, t in found.items() if isinstance(t, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise InputError(f"{path} has no weights; expected names with their tensors, as model.state_dict() gives them.")
    for wrapper in _WRAPPERS:
        tensors = _without(wrapper, tensors)
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] != _NOT_WEIGHTS}


def _read(path: str | os.PathLike[str]) -> Any:
    with open(path, "rb") as file:
        head = file.read(9)
    # safetensors: eight bytes of length, then JSON
    if head[8:] == b"{" and not zipfile.is_zipfile(path):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(model: nn.Module, path: str | os.PathLike[str], name: str) -> None:
    """Load the weights in a file into a model; the file must have all of the model's weights and no others.

    Args:
        model: is changed in place.
        path: of the file.
        name: of the model, for messages.

    Raises:
        InputError: the file cannot be read, or its weights do not fit the model.
    """
    tensors = read_weights(path)
    own = model.state_dict()
    if not any(key.startswith(_LIGHTNING) for key in own):
        tensors = _without(_LIGHTNING, tensors)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in own.items() if key.rpartition(".")[2] != _NOT_WEIGHTS}
    other = [f"{k} is {shapes[k]}, expected {wanted[k]}" for k in wanted if k in shapes and shapes[k] != wanted[k]]
    check_fit(path, name, wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys(), other)
    model.load_state_dict({**own, **tensors})


def check_fit(
    path: str | os.PathLike[str], name: str, missing: Collection[str], extra: Collection[str], other: Collection[str]
) -> None:
    """Raise InputError unless weights fit a model.

    Args:
        path: of the weights.
        name: of the model.
        missing: names that the weights lack.
        extra: names that the model lacks.
        other: descriptions of shapes that differ.
    """
    found = [
        *([f"{len(missing)} are missing ({_some(missing)})"] if missing else []),
        *([f"{len(extra)} have no place in it ({_some(extra)})"] if extra else []),
        *([f"shapes differ ({_some(other)})"] if other else []),
    ]
    if found:
        raise InputError(
            f"the weights in {path} do not fit {name}: {'; '.join(found)}. Is it the architecture that they were "
            "trained as, and the number of classes (--num-classes)?"
        )


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with their names freed of a prefix, if all of them have it."""
    if not all(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more
