"""Count the operations with which Python reads a tensor's values, and so waits for a device.

On the CPU none of them waits, but on a GPU the same operations do: they are counted on any tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# operations whose result the host must know, by the name that the dispatcher gives them
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")
# those that read a CPU tensor's memory without the dispatcher
METHODS = ("tolist", "numpy", "cpu", "__array__")


class _Looks(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        if name in LOOKS or masks:
            self._found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def looks() -> Iterator[Counter[str]]:
    """Count reads by operation within the block."""
    found: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch, _Looks(found):
        for name in METHODS:
            patch.setattr(torch.Tensor, name, _counted(getattr(torch.Tensor, name), name, found))
        yield found


def _counted(method: Any, name: str, found: Counter[str]) -> Any:
    def counting(*args: Any, **settings: Any) -> Any:
        found[name] += 1
        return method(*args, **settings)

    return counting
