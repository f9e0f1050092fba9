"""`dave-fast doctor`: say what would make maps faster on this machine, or what else could be installed."""

from __future__ import annotations

import json as jsonlib
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from dave_fast.cli.info import EXTRAS, missing_of
from dave_fast.cli.terminal import console
from dave_fast.defaults import DEFAULT_MODEL
from dave_fast.errors import installing

OK, SLOW, ABSENT = "ok", "could be faster", "not installed"
_STYLES = {OK: "green", SLOW: "yellow", ABSENT: "dim"}


@dataclass(frozen=True)
class Finding:
    """What was looked at, and how it is.

    Attributes:
        name: of what was looked at.
        state: `OK`, `SLOW` or `ABSENT`.
        text: how it is.
        todo: what to do about it; empty where there is nothing.
    """

    name: str
    state: str
    text: str
    todo: str = ""


def examine() -> list[Finding]:
    """Look the machine over, without a network and without a model."""
    with warnings.catch_warnings():
        # a core that is not built is a finding
        warnings.simplefilter("ignore")
        return [_core(), _bfloat16(), *_int8(), _threads(), *_libraries(), *_gpu(), _models(), *_extras()]


def _core() -> Finding:
    from dave_fast.ops import _ext

    name = "native core"
    if (reason := _ext.unavailable()) is not None:
        build = _ext.build_command() or "DAVE_FAST_BUILD_EXT=1 pip install . in a checkout, with a C++ compiler"
        return Finding(name, SLOW, f"maps on a CPU are PyTorch's, several times slower: {reason}", build)
    best = _ext.module().usable_isas()[0]
    if _ext.isa() != best:
        return Finding(name, SLOW, f"it uses {_ext.isa()}, and this CPU has {best}", "unset DAVE_FAST_ISA")
    return Finding(name, OK, f"it uses {best}")


def _bfloat16() -> Finding:
    import torch

    from dave_fast.ops.precision import has_bf16

    if has_bf16(torch.device("cpu")):
        return Finding("bfloat16", OK, "this CPU multiplies it: --precision bf16 is the default")
    # no setting helps: another CPU does
    return Finding("bfloat16", SLOW, "this CPU does not multiply it: --precision fp32 is the default here")


def _int8() -> list[Finding]:
    import torch

    from dave_fast.ops.precision import fastest_precision

    if fastest_precision(torch.device("cpu")) != "int8":
        return []
    text = "this CPU multiplies eight-bit integers: --precision int8 is the fastest, at more rounding than bf16's"
    return [Finding("int8", OK, text)]


def _threads() -> Finding:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, every = torch.get_num_threads(), os.cpu_count() or 1
    text = f"{threads} of {allowed} cores" + (f" that this process may use of {every}" if allowed < every else "")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if threads < allowed and os.environ.get(variable) == str(threads):
            return Finding("threads", SLOW, f"{text}, by {variable}={threads}", f"unset {variable}")
    if allowed < every:
        return Finding("threads", SLOW, text, "start it without taskset, or ask the scheduler for more cores")
    # PyTorch takes the physical cores, of which the system may count each twice
    return Finding("threads", SLOW if threads == 1 < allowed else OK, text)


def _libraries() -> Iterator[Finding]:
    import torch

    # MKL is for x86 alone
    libraries = {"oneDNN": torch.backends.mkldnn.is_available()}
    if platform.machine() in ("x86_64", "AMD64"):
        libraries["MKL"] = torch.backends.mkl.is_available()
    lacking = [name for name, there in libraries.items() if not there]
    if lacking:
        text = f"this PyTorch ({torch.__version__}) was built without {' and '.join(lacking)}"
        yield Finding("PyTorch", SLOW, text, "install a build of pytorch.org")
    else:
        yield Finding("PyTorch", OK, f"{torch.__version__}, with {' and '.join(libraries)}")


def _gpu() -> Iterator[Finding]:
    import torch

    from dave_fast.ops import _ext, _registry
    from dave_fast.ops.choices import Choices

    if not torch.cuda.is_available():
        there = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        if not there:
            yield Finding("GPU", OK, "none is here")
        elif torch.version.cuda is None:
            text = f"one is here, and this PyTorch ({torch.__version__}) is for CPUs"
            yield Finding("GPU", SLOW, text, "install a build of PyTorch with CUDA, as pytorch.org says")
        else:
            text = f"one is here, and PyTorch for CUDA {torch.version.cuda} cannot use it"
            yield Finding("GPU", SLOW, text, "look at nvidia-smi: the driver may be older than this CUDA")
        return
    chip = torch.cuda.get_device_name()
    yield Finding("GPU", OK, chip)
    build = f"{_ext.build_command() or 'DAVE_FAST_BUILD_EXT=1 pip install . in a checkout'}, with nvcc on PATH"
    for name, reason, todo in (
        ("CUDA kernels", _ext.cuda_unavailable(), build),
        ("Triton kernels", _registry.BACKENDS["triton"].unavailable(), "pip install triton"),
    ):
        yield Finding(name, OK, "they run") if reason is None else Finding(name, SLOW, reason, todo)
    kept = Choices.of(chip)
    if kept.all():
        yield Finding("kernels' candidates", OK, f"measured here: {kept.path}")
    else:
        text = "none was measured on this GPU: they are chosen by rule"
        yield Finding("kernels' candidates", SLOW, text, "DAVE_FAST_AUTOTUNE=1 times them once, at the first calls")


def _models() -> Finding:
    """Look for the default model in the cache of the hub, which is not asked itself."""
    from huggingface_hub import constants, try_to_load_from_cache

    there = isinstance(try_to_load_from_cache(f"timm/{DEFAULT_MODEL}", "model.safetensors"), str)
    if there:
        return Finding("default model", OK, f"{DEFAULT_MODEL} is on this machine")
    text = f"{DEFAULT_MODEL} is not in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Finding("default model", ABSENT, f"{text}, and the hub is switched off", "unset HF_HUB_OFFLINE")
    return Finding("default model", OK, f"{text}: the first use downloads it; --model demo needs no network")


def _extras() -> Iterator[Finding]:
    for extra in EXTRAS:
        missing = missing_of(extra)
        if missing:
            yield Finding(f"extra {extra}", ABSENT, f"without {', '.join(missing)}", installing(extra))
        else:
            yield Finding(f"extra {extra}", OK, "installed")


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what would make maps faster on this machine, and how to get it; and which extras are not installed.

    Nothing is downloaded or changed, and no hub is asked. Exit code 0 whatever is found.
    """
    from rich.table import Table
    from rich.text import Text

    findings = examine()
    if json:
        typer.echo(jsonlib.dumps([asdict(each) for each in findings], indent=2))
        return
    table = Table("", "state", "", box=None, pad_edge=False, show_header=False)
    for each in findings:
        text = Text(each.text, overflow="fold")
        if each.todo:
            text.append(f"\n→ {each.todo}", "bold" if each.state == SLOW else "")
        table.add_row(Text(each.name), Text(each.state, _STYLES[each.state]), text)
    console(stderr=False).print(table)
