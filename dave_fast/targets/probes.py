"""Weights of linear probes, read from files. Pickles, which can run code, are not read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dave_fast.errors import InputError, reason_of
from dave_fast.files import check_file
from dave_fast.numbers import shown

# Of a file; 21,841 classes by 4,096 features take 358 MB.
MOST_BYTES = 2**30


def load_probe(path: str | os.PathLike[str], row: int | None = None) -> Tensor:
    """Read the weights of a linear layer over tokens.

    Biases are ignored: they do not change an attribution.

    Args:
        path: a .safetensors file with one matrix, or with one whose name ends in "weight"; or a .npy file. The weight
            (K, D, 1, 1) of a 1×1 convolution is a matrix, too; a vector (D,) is a layer of one class.
        row: the row to return; None for all.

    Returns:
        (K, D) float32, or (D,) for one row.

    Raises:
        InputError: the file cannot be read, does not hold such a matrix, or has no such row.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".safetensors"):
        raise InputError(
            f"the probe is {shown(str(path))}; expected a .safetensors or .npy file. Save a layer with "
            "safetensors.torch.save_file(layer.state_dict(), path)"
        )
    try:
        check_file(path)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise InputError(f"it has {size} bytes; expected at most {MOST_BYTES}")
        tensors = _read(path)
    # readers raise errors of any type for damaged files
    except Exception as error:
        raise InputError(f"cannot read the probe {path}: {reason_of(error)}.") from error
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1} or tensors
    named = {name: tensor for name, tensor in matrices.items() if name.endswith("weight")}
    found = list((matrices if len(matrices) == 1 else named).values())
    if len(found) != 1:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise InputError(f"the probe {path} holds {held}; expected one weight matrix")
    matrix, shape = found[0], tuple(found[0].shape)
    matrix = matrix[None] if matrix.dim() == 1 else matrix
    if matrix.dim() < 2 or any(side != 1 for side in matrix.shape[2:]) or not matrix.is_floating_point():
        raise InputError(f"the probe {path} holds {shape} of {matrix.dtype}; expected floating point, (classes, D)")
    matrix = matrix.flatten(1).float()
    if not bool(torch.isfinite(matrix).all()):
        raise InputError(f"the probe {path} holds NaN or infinity; expected finite weights")
    if row is None:
        return matrix
    if not 0 <= row < len(matrix):
        raise InputError(f"row {row} is out of range: the probe {path} has the rows 0 to {len(matrix) - 1}")
    return matrix[row]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npy":
        return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
    from safetensors.torch import load_file

    return load_file(path)
