"""The identity of a run: everything that its maps depend on, so that a run is continued only by an equal one.

`run.json` in the run's folder, and the metadata of every shard, hold:

    format · version of dave-fast · weights: hash · configuration: every setting that changes a map · source: digest

To resume a run all of it must be equal. Device, runner, batch size, number of workers and the path of the source are
no part of it: they change a map by rounding at most. The names of the classes change nothing in a map, and have a file
of their own, `labels.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dave_fast._version import __version__
from dave_fast.errors import InputError
from dave_fast.explain.depth import PIXELS
from dave_fast.files import atomically, read_json
from dave_fast.models.labels import Labels

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
RUN_FILE = "run.json"
NAMES_FILE = "labels.json"
METADATA_KEY = b"dave_fast"


def make_identity(configuration: dict[str, Any], weights: str, source: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a run, as plain JSON values.

    Args:
        configuration: every setting that changes a map.
        weights: hash of the model's weights, see `weights_hash`.
        source: identity of the source, see `RecordSource`.
    """
    identity = {
        "format": FORMAT,
        "version": __version__,
        "weights": weights,
        "configuration": configuration,
        "source": source,
    }
    # Tuples become lists, so that the identity equals the one read back from JSON.
    return json.loads(json.dumps(identity))


def weights_hash(model: nn.Module) -> str:
    """Return the BLAKE2b hash of name, dtype, shape and bytes of all parameters and buffers, 32 hexadecimal digits."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def load_identity(folder: Path) -> dict[str, Any] | None:
    """Return the content of `run.json`, None if the folder holds no run.

    Runs of earlier versions say neither whether their maps are shrunk nor their depth: they are not shrunk, and of the
    pixels, and the identity says so.

    Raises:
        InputError: the file cannot be read or is of another format.
    """
    if not os.path.lexists(folder / RUN_FILE):
        return None
    try:
        identity = read_json(folder / RUN_FILE)
    except InputError as error:
        raise InputError(f"{error} Choose another --out, or mend it.") from error
    known = isinstance(identity, dict) and identity.get("format") == FORMAT
    if not known or not isinstance(identity.get("configuration"), dict):
        raise InputError(f"{folder / RUN_FILE} is of no format that this version of dave-fast reads ({FORMAT}).")
    identity["configuration"].setdefault("shrink", False)
    identity["configuration"].setdefault("depth", PIXELS)
    return identity


def save_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write `run.json`."""
    with atomically(folder / RUN_FILE, durable=True) as file:
        file.write(json.dumps(identity, indent=2, ensure_ascii=False).encode() + b"\n")


def save_names(folder: Path, names: Sequence[str]) -> None:
    """Write the names of the classes."""
    plain = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    with atomically(folder / NAMES_FILE) as file:
        file.write(json.dumps(plain, indent=0, ensure_ascii=False).encode() + b"\n")


def load_labels(folder: Path, identity: dict[str, Any]) -> Labels:
    """Return the classes of a run; those of earlier versions, and of models without names, have numbers alone.

    Raises:
        InputError: the file of names is none, or does not have one for each class.
    """
    count, path = identity["configuration"].get("classes"), folder / NAMES_FILE
    if not os.path.lexists(path):
        return Labels(count)
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or count != len(names):
        raise InputError(f"{path} is no list of {count} class names: mend it, or delete it.")
    return Labels(count, tuple(names))


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, value of one, value of the other) where two trees of settings differ; names have dots."""
    first, second = _flat(one), _flat(other)
    pairs = ((name, first.get(name, "nothing"), second.get(name, "nothing")) for name in first | second)
    return [(name, a, b) for name, a, b in pairs if a != b]


def refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError with the differences if the folder's run is not the one that is being started."""
    if found := differences(before, now):
        words = "; ".join(f"{name}: {old} before, {new} now" for name, old, new in found)
        raise InputError(
            f"{folder} holds another run; {words}. Resume it with what it was begun with, or choose another --out."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
