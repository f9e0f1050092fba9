"""The machine's instruction sets, each measured in a process of its own, since a process chooses once.

On x86 libraries are held to the same instructions (`variables`), so that a lesser set shows what a machine with no more
would: our kernels beside PyTorch's there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

from dave_fast.errors import BackendError, InputError
from dave_fast.ops import _ext

ALL = "all"
# an instruction set of ours -> those of oneDNN, of PyTorch's own kernels and of MKL
LIBRARIES = {
    "avx512bf16": ("AVX512_CORE_BF16", "avx512", "AVX512"),
    "avx512vnni": ("AVX512_CORE_VNNI", "avx512", "AVX512"),
    "avx512": ("AVX512_CORE", "avx512", "AVX512"),
    "avx2vnni": ("AVX2_VNNI", "avx2", "AVX2"),
    "avx2": ("AVX2", "avx2", "AVX2"),
    "baseline": ("SSE41", "default", "SSE4_2"),
}
NAMES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def chosen(text: str) -> list[str]:
    """Return the instruction sets that a text names, "all" or names with commas between; the best first.

    Raises:
        InputError: this machine lacks one.
        BackendError: there is no native core, which alone has several.
    """
    usable = list(_ext.module().usable_isas())
    names = usable if text == ALL else text.split(",")
    for name in names:
        if name not in usable:
            raise InputError(f"--isa is {text!r}; expected {ALL}, or of {', '.join(usable)}, with commas between")
    return [name for name in usable if name in names]


def variables(isa: str) -> dict[str, str]:
    """Return the environment of a process that uses an instruction set; beside our best, libraries keep theirs."""
    best = _ext.module().usable_isas()[0]
    more = zip(NAMES, LIBRARIES[isa], strict=True) if isa != best and isa in LIBRARIES else ()
    return {"DAVE_FAST_ISA": isa, **dict(more)}


def why_not(precision: str, device: str) -> str | None:
    """Return why a precision is not measured with the instruction set in use, or None.

    Where DAVE_FAST_ISA leaves out what a CPU multiplies bfloat16 or bytes by, they would be emulated.
    """
    if precision not in ("bf16", "int8") or device != "cpu" or _ext.unavailable() is not None:
        return None
    native = _ext.module()
    if native.isa() == native.usable_isas()[0]:
        return None
    operand, has = (
        ("bfloat16", native.multiplies_bfloat16()) if precision == "bf16" else ("bytes", native.multiplies_bytes(False))
    )
    return None if has else f"{native.isa()} does not multiply {operand}: it would be emulated, and slower than fp32"


def each(isas: Sequence[str], measure: Callable[..., Any], *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Return by instruction set what `measure` returned in a process that uses it.

    Args:
        isas: of `chosen`.
        measure: a function of a module, whose arguments and result can be pickled.
        *arguments: its arguments.
        **settings: its keywords.

    Raises:
        BackendError: a process ended without a result.
    """
    found = {}
    for isa in isas:
        pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent)
        with patch.dict(os.environ, variables(isa)), pool:
            try:
                found[isa] = pool.submit(measure, *arguments, **settings).result()
            except BrokenProcessPool as error:
                raise BackendError(f"the process that measured {isa} ended without a result") from error
    return found


def _end_with_parent() -> None:
    """End this process when its parent does, even if that is killed: it would go on measuring for many minutes."""

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def named(path: Path, isa: str) -> Path:
    """Return the path of the results of one instruction set: linear.json becomes linear_avx2.json."""
    return path.with_name(f"{path.stem}_{isa}{path.suffix}")
