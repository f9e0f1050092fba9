"""What the files of a model from somebody else may ask for, checked before a library reads them or takes memory.

A configuration is a small JSON object with sizes that some model has; a folder holds plain files, whose indices name
files beside them; and a model that is built needs not many more numbers than its files have bytes.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dave_fast.errors import InputError, ModelError, reason_of
from dave_fast.files import read_json
from dave_fast.models.spec import MOST_PIXELS
from dave_fast.numbers import shown

# of any number of a configuration, of layers in all, and of objects in objects
_MOST, _MOST_LAYERS, _DEEPEST = 2**20, 1000, 50
_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks?)($|_)|num_hidden_layers")
_PIXELS = ("size", "height", "width", "shortest_edge", "crop_size", "image_size", "img_size", "input_size")
# frequencies of position encodings, numbers of bytes or of letters that nothing is built by
_FREE = re.compile(r"theta|base|max_length|max_pixels|longest_edge|seed")
_READ = (".json", ".safetensors", ".bin", ".pt", ".pth", ".tar", ".txt", ".model", ".npz")
# numbers that a model may be built with beside those of its files, and without files
_SPARE, _WITHOUT_FILES = 2**26, 2**31


def check_configuration(values: Any, where: str) -> dict[str, Any]:
    """Return a configuration; raise ModelError unless it is an object whose numbers some model may have."""
    if not isinstance(values, dict):
        raise ModelError(f"{where} holds a {type(values).__name__}; expected a JSON object with settings of a model.")
    waiting: list[tuple[str, Any, int]] = [("", values, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ModelError(f"{where} has objects inside of objects, {depth} deep; expected settings of a model.")
        if isinstance(value, Mapping):
            waiting += [(str(name), each, depth + 1) for name, each in value.items()]
        elif isinstance(value, list):
            numbers = [each for each in value if isinstance(each, int | float)]
            waiting += [(key, each, depth + 1) for each in (value if len(numbers) < len(value) else ())]
            of_layers = "dices" not in key and _LAYERS.search(key) is not None
            for each in [sum(map(abs, numbers))] if of_layers else numbers:
                _check_number(key, each, where)
        elif isinstance(value, int | float):
            _check_number(key, value, where)
    if "configuration_files" in values:
        raise ModelError(
            f"{where} names other files in place of itself (configuration_files), which are not read: expected all "
            "settings in this one; delete that entry."
        )
    name = values.get("transformers_weights")
    if name is not None:
        _check_name(name, where)
    return values


def _check_number(key: str, value: float, where: str) -> None:
    most = _MOST_LAYERS if _LAYERS.search(key) else MOST_PIXELS if key in _PIXELS else _MOST
    # NaN and infinity are sizes of nothing, and libraries refuse them
    if not _FREE.search(key) and most < abs(value) < float("inf"):
        raise ModelError(f"{where}: {shown(key)} is {shown(value)}; expected at most {most}.")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ModelError for a folder with a file that a library would hang at, or read outside of the folder."""
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() not in _READ:
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise ModelError(f"cannot read {path}: {reason_of(error)}.") from error
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise ModelError(f"{path} is no regular file, but a pipe, a socket or a device: copy its content here.")
        if path.name.endswith(".index.json"):
            _check_index(path)
        elif path.suffix.lower() in (".bin", ".pt", ".pth", ".tar"):
            check_archive(path)


def _check_index(path: Path) -> None:
    try:
        values = read_json(path)
    except InputError as error:
        raise ModelError(str(error)) from error
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict):
        raise ModelError(f"{path} has no object weight_map; expected names of weights with the files that hold them.")
    for name in set(map(str, files.values())):
        _check_name(name, str(path))


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\x00]", name):
        raise ModelError(f"{where} names the file {shown(name)}; expected the name of a file in the same folder.")


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise InputError for an archive whose content is larger than its file, as none of `torch.save` is."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            held, size = sum(each.file_size for each in archive.infolist()), os.path.getsize(path)
        if held > size:
            raise InputError(
                f"{path} holds {held} bytes in a file of {size}: it is compressed, or its parts overlap, and "
                "torch.save does neither; save the state dict again."
            )


@contextmanager
def limited_memory(folder: str | os.PathLike[str] | None, *files: str | None) -> Iterator[None]:
    """Refuse, within this context, to make tensors of many more numbers than there are bytes in a model's files.

    Args:
        folder: with the model's files; None for a model of a library or of the hub, which is not limited.
        files: with further weights.

    Raises:
        ModelError: the model is larger than its files.
    """
    if folder is None:
        yield
        return
    paths = [str(each) for each in Path(folder).iterdir() if each.suffix.lower() in _READ[1:] and each.is_file()]
    held = sum(map(os.path.getsize, [*paths, *(each for each in files if each is not None)]))
    with _Limit(4 * held + _SPARE if held else _WITHOUT_FILES, str(folder)):
        yield


class _Limit(TorchDispatchMode):
    """Counts the numbers of the tensors that are made, by making them without memory first."""

    def __init__(self, most: int, name: str) -> None:
        super().__init__()
        self._left, self._name = most, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name = func.__name__
        fresh = "device" in given and getattr(given["device"], "type", "") != "meta" and not name.startswith("_to_copy")
        if fresh:
            self._left -= func(*args, **{**given, "device": "meta", "pin_memory": False}).numel()
            if self._left < 0:
                raise ModelError(
                    f"the configuration of {self._name} describes a model that is far larger than its weights: correct "
                    "its sizes, or copy the files again."
                )
        return func(*args, **given)
