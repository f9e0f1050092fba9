"""The file of a model's settings, which `dave-fast tune` writes and other commands take as --config.

It is a TOML file in which every key is optional; paths are relative to its folder:

    model = "vit_base_patch16_224"
    weights = "mine.safetensors"
    num_classes = 12
    labels = "names.txt"
    image_size = 224
    link = "sigmoid"
    noise_alpha = 0.3
    n_samples = 50
    shrink = true

The command line comes before the file.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

from dave_fast.errors import InputError, reason_of
from dave_fast.files import atomically, read_plain
from dave_fast.numbers import check_integer, parse_number, shown

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
        link: "softmax", "sigmoid" or "none" (see `dave_fast.models.spec`).
        shrink: whether maps are shrunk (see `dave_fast.DAVE`).
    """

    model: str | None = None
    noise_alpha: float | None = None
    n_samples: int | None = None
    weights: str | None = None
    num_classes: int | None = None
    labels: str | None = None
    image_size: int | None = None
    link: str | None = None
    shrink: bool | None = None


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration.

    Raises:
        InputError: the file cannot be read or is not TOML, or a key or value is not one of a configuration.
    """
    try:
        values = tomllib.loads(read_plain(path).decode())
    except InputError as error:
        raise InputError(f"cannot read the configuration {path}: {reason_of(error)}.") from error
    # not TOML or UTF-8, a number of more than 4,300 digits, or brackets in brackets without end
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no TOML file: {reason_of(error)}.") from error
    # The type T of each annotation T | None.
    kinds = {name: get_args(annotation)[0] for name, annotation in get_type_hints(Config).items()}
    for key, value in values.items():
        if key not in kinds:
            raise InputError(f"{path} has the key {key!r}; expected only {', '.join(map(repr, kinds))}.")
        if kinds[key] is float and type(value) is int:
            values[key] = parse_number(value, f"{path}: {key!r}")
        if type(values[key]) is not kinds[key]:
            raise InputError(f"{path}: {key!r} is {shown(value)}; expected {kinds[key].__name__}.")
        if kinds[key] is int:
            check_integer(value, f"{path}: {key!r}", 1)
    if not 0 <= values.get("noise_alpha", 0) <= 1:
        raise InputError(f"{path}: 'noise_alpha' is {values['noise_alpha']}; expected 0 to 1.")
    folder = os.path.dirname(os.path.abspath(path))
    return Config(**values | {key: os.path.join(folder, values[key]) for key in _FILES if key in values})


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a configuration, whole or not at all, without settings that are None."""
    with atomically(path) as file:
        for key, value in asdict(config).items():
            if value is not None:
                file.write(f"{key} = {_toml(value)}\n".encode())


def _toml(value: Any) -> str:
    # JSON's strings and numbers are TOML's, except for one control character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
