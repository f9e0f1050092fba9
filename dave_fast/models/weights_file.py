"""Weights from a file: safetensors, or tensors that `torch.save` wrote. Pickled code is not executed.

Which of a checkpoint's tensors are the weights, and by which names, `dave_fast.models.checkpoint` says.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, reason_of
from dave_fast.files import read_json
from dave_fast.models.checkpoint import NOT_WEIGHTS, Candidate, Tensors, choose, likeliest
from dave_fast.models.limits import check_archive

# of layers that adapters of peft add
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_down", "lora_up")
# the end of the name of a file of several, as "-00001-of-00002"
_SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.")
_NAMED = 4
# bytes in which other files than weights show what they are
_HEAD = 4096


def read_weights(path: str | os.PathLike[str], wanted: Tensors | None = None) -> dict[str, Tensor]:
    """Read weights by name, on the CPU.

    Args:
        path: of the file.
        wanted: the model's own weights by name, if they are known: the file's are then taken by these names if they
            fit.

    Raises:
        InputError: the file cannot be read, has other objects than tensors, or has no tensor.
    """
    found = _read(path)
    weights = None if wanted is None else choose(found, wanted, str(path))
    if weights is None or wanted is None or weights.tensors.keys() != wanted.keys():
        weights = _given(likeliest(found, str(path)), path)
    return dict(weights.tensors)


def load_weights(model: nn.Module, path: str | os.PathLike[str], name: str) -> None:
    """Load the weights in a file into a model; the file must have all of the model's weights and no others.

    Args:
        model: is changed in place.
        path: of the file.
        name: of the model, for messages.

    Raises:
        InputError: the file cannot be read, or its weights do not fit the model.
    """
    own = {key: each for key, each in model.state_dict().items() if isinstance(each, Tensor)}
    wanted = {key: each for key, each in own.items() if key.rpartition(".")[2] != NOT_WEIGHTS}
    found = _given(choose(_read(path), wanted, str(path)), path)
    tensors, where = found.tensors, f"{path} ({found.place})" if found.keys else path
    other = [
        f"{key} is {of}, expected {to}"
        for key in wanted
        if key in tensors
        for of, to in _differ(tensors[key], own[key])
    ]
    check_fit(where, name, wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys(), other)
    model.load_state_dict({**model.state_dict(), **tensors})


def _given(found: Candidate | None, path: str | os.PathLike[str]) -> Candidate:
    if found is None:
        raise InputError(f"{path} has no weights; expected names with their tensors, as model.state_dict() gives them.")
    return found


def _differ(tensor: Tensor, own: Tensor) -> list[tuple[str, str]]:
    """Return what a tensor is and should be, as the only item, where a model cannot take it; else no item."""
    if tensor.shape != own.shape:
        return [(str(tuple(tensor.shape)), str(tuple(own.shape)))]
    # other kinds would lose their imaginary part or their fraction, or lack their scale
    kinds = (Tensor.is_complex, Tensor.is_floating_point)
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain or any(kind(tensor) != kind(own) for kind in kinds):
        form = "without values" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
        return [(form if tensor.layout == torch.strided else f"sparse {form}", str(own.dtype).removeprefix("torch."))]
    return []


def _read(path: str | os.PathLike[str]) -> Any:
    """Return what a file holds: names with tensors, or a checkpoint around them.

    Raises:
        InputError: it is no file of weights, it is damaged, or it holds other objects.
    """
    if not os.path.isfile(path):
        raise InputError(f"cannot read the weights {path}: expected a regular file.")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        _refuse_others(path, head)
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {reason_of(error)}.") from error
    try:
        return _tensors_of(path, head)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # the reader names what it does not know among advice on how to run it
        names = re.findall(r"(?:GLOBAL|type|class|module) '?([\w.]+\.\w+)'?", str(error))
        if not names:
            raise InputError(
                f"cannot read the weights {path}: it is no file of torch.save or safetensors, or it is damaged."
            ) from error
        raise InputError(
            f"the weights {path} hold other objects than tensors ({names[0]}), and code in pickles is not run: in the "
            "program that wrote the file save model.state_dict() alone, best by safetensors.torch.save_file."
        ) from error
    # readers raise errors of any type for damaged files
    except Exception as error:
        reason = reason_of(error).partition(". ")[0]
        raise InputError(
            f"cannot read the weights {path}: the file is damaged or cut short, compare its size and copy it again "
            f"({reason})."
        ) from error


def _tensors_of(path: str | os.PathLike[str], head: bytes) -> Any:
    if zipfile.is_zipfile(path):
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise InputError(f"{path} is a TorchScript archive: save model.state_dict() of the loaded module.")
    # safetensors: eight bytes of length, then JSON
    elif head[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _refuse_others(path: str | os.PathLike[str], head: bytes) -> None:
    """Raise InputError for files that often stand in the place of weights, by their first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    what = None
    if not head:
        what = "is empty: copy it again"
    elif text.startswith(b"version https://git-lfs.github.com/"):
        size = re.search(rb"size (\d+)", text)
        of = f" of {int(size[1])} bytes" if size else ""
        what = f"is a Git LFS pointer{of}, not the weights: run git lfs pull"
    elif text[:9].lower() == b"<!doctype" or text[:5].lower() in (b"<html", b"<head", b"<?xml"):
        what = "is a web page, not weights: the download was answered by a page; fetch the file itself"
    elif head[:2] == b"\x1f\x8b":
        what = "is compressed by gzip: unpack it"
    elif text[:1] in (b"{", b"["):
        what = _json_file(path)
    if what is not None:
        raise InputError(f"{path} {what}.")


def _json_file(path: str | os.PathLike[str]) -> str | None:
    """Return what a JSON file is that was given as weights; None where it is no JSON."""
    try:
        values = read_json(path)
    except InputError:
        return None
    if isinstance(values, dict) and "weight_map" in values:
        return (
            "is the index of weights in several files: give the folder as the model (hf:FOLDER), or save the whole "
            "state dict in one file"
        )
    return "is JSON, not weights: give a .safetensors file or one of torch.save"


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
    if any(part in _LORA for key in extra for part in key.split(".")):
        raise InputError(
            f"{path} holds LoRA adapters, which {name} has no place for: load base model and adapter with peft, and "
            "give that module or save the state dict of its merge_and_unload()."
        )
    shard = _SHARD.search(str(path))
    if missing and shard is not None:
        raise InputError(
            f"{path} is file {shard[1]} of {shard[2]}, and {len(missing)} weights of {name} are not in it: give the "
            "folder as the model (hf:FOLDER), or save the whole state dict in one file."
        )
    if found:
        raise InputError(
            f"the weights in {path} do not fit {name}: {'; '.join(found)}. Is it the architecture that they were "
            "trained as, and the number of classes (--num-classes)?"
        )


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more
