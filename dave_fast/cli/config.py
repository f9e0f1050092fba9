"""The file of a model's settings, which `dave-fast tune` writes and other commands take as --config.

It is a TOML file in which every key is optional; paths are relative to its folder:

    model = "vit_base_patch16_224"
    weights = "mine.safetensors"
    num_classes = 12
    labels = "names.txt"
    image_size = 224
    noise_alpha = 0.3
    n_samples = 50

The command line comes before the file.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import asdict, dataclass, fields
from typing import Any

from dave_fast.errors import InputError, reason_of
from dave_fast.files import atomically

_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "noise_alpha": (float, int),
    "n_samples": (int,),
    "weights": (str,),
    "num_classes": (int,),
    "labels": (str,),
    "image_size": (int,),
}
_FILES = ("weights", "labels")


@dataclass(frozen=True)
class Config:
    """The settings of one model; None where the file does not have one.

    Attributes:
        model: its name (see `dave_fast.models.spec`).
        noise_alpha: largest noise level, in [0, 1].
        n_samples: perturbed samples of an image.
        weights: a file of weights.
        num_classes: of the weights.
        labels: a file of class names.
        image_size: pixels a side.
    """

    model: str | None = None
    noise_alpha: float | None = None
    n_samples: int | None = None
    weights: str | None = None
    num_classes: int | None = None
    labels: str | None = None
    image_size: int | None = None


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration.

    Raises:
        InputError: the file cannot be read or is not TOML, or a key or value is not one of a configuration.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {reason_of(error)}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML file: {error}.") from error
    known = [field.name for field in fields(Config)]
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path} has the key {key!r}; expected only {', '.join(known)}.")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise InputError(f"{path}: {key} is {value!r}; expected {' or '.join(k.__name__ for k in _KINDS[key])}.")
    alpha = values.get("noise_alpha")
    if alpha is not None and not 0 <= alpha <= 1:
        raise InputError(f"{path}: noise_alpha is {alpha}; expected 0 ≤ noise_alpha ≤ 1.")
    for key in ("n_samples", "num_classes", "image_size"):
        if key in values and values[key] < 1:
            raise InputError(f"{path}: {key} is {values[key]}; expected an integer ≥ 1.")
    folder = os.path.dirname(os.path.abspath(path))
    values |= {key: os.path.join(folder, values[key]) for key in _FILES if key in values}
    return Config(**values | ({} if alpha is None else {"noise_alpha": float(alpha)}))


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a configuration, whole or not at all, without settings that are None."""
    with atomically(path) as file:
        for key, value in asdict(config).items():
            if value is not None:
                file.write(f"{key} = {_toml(value)}\n".encode())


def _toml(value: Any) -> str:
    # JSON's strings and numbers are TOML's, except for one control character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
