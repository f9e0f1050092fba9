"""The table of ops and backends, and the rule that chooses between them.

Every op has a plain-PyTorch reference (`torch`). Other backends are faster forms of the same function with the same
signature. `backend="auto"` chooses the first available one in the device's order of preference. A backend requested by
name is used for every op that has it, and raises `BackendError` with the reason where it cannot be used; ops that lack
it use their default.

A backend's function passes what its kernels do not cover (float64 in linear and attention, bfloat16 in linear on a CPU
with AMX) to PyTorch: the same result at another speed. The choice is made once an engine (`bind`), not at each
call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from dave_fast.errors import BackendError
from dave_fast.ops import _ext


def _onednn_unavailable() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no packed oneDNN linear"
    return None


def _triton_unavailable() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if find_spec("dave_fast.kernels") is None:
        return f"the Triton kernels are not in this folder ({_ext.build_command()} finds them)"
    if _interprets():
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1, set before the start, runs the kernels on a CPU, slowly)"
    if torch.cuda.get_device_capability()[0] < 8:
        return "the kernels need a GPU of compute capability 8.0 or higher"
    return None


def _interprets() -> bool:
    """Return whether this process interprets Triton kernels on the CPU instead of compiling them for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True)
class Backend:
    """A way to run ops.

    Attributes:
        name: as users write it.
        devices: types of the devices that it runs on.
        unavailable: returns why it cannot run, or None.
    """

    name: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None]


BACKENDS: dict[str, Backend] = {
    "torch": Backend("torch", ("cpu", "cuda", "mps", "xpu"), lambda: None),
    "native": Backend("native", ("cpu",), cache(_ext.unavailable)),
    "onednn": Backend("onednn", ("cpu",), cache(_onednn_unavailable)),
    "triton": Backend("triton", ("cpu", "cuda") if _interprets() else ("cuda",), cache(_triton_unavailable)),
    "cuda": Backend("cuda", ("cuda",), cache(_ext.cuda_unavailable)),
}

# Backends for "auto", best first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "onednn", "torch"),
    "cuda": ("cuda", "triton", "torch"),
}


def _forms(module: str, op: str, *backends: str) -> dict[str, str]:
    """Return backend -> "module:function" of an op whose functions are named by the rule `<op>_<backend>`."""
    forms = {"torch": f"dave_fast.ops.{module}:{op}_ref"}
    for backend in backends:
        forms[backend] = f"dave_fast.{'kernels' if backend == 'triton' else 'ops'}.{module}:{op}_{backend}"
    return forms


# op -> backend -> "module:function"
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    op: _forms(op, op, "native", "cuda")
    for op in ("perturb", "pull_back", "robust_mean", "pull_back_mean", "shrink", "smooth")
} | {
    "robust_mean_variance": _forms("robust_mean", "robust_mean_variance", "native", "cuda"),
    "pull_back_mean_variance": _forms("pull_back_mean", "pull_back_mean_variance", "native", "cuda"),
    "spread_mean_variance": _forms("spread_mean", "spread_mean_variance", "native", "cuda"),
    "pack_weight": _forms("linear", "pack", "onednn", "native") | {"triton": "dave_fast.ops.linear:pack_ref"},
    "linear": _forms("linear", "linear", "onednn", "native", "triton"),
    "pack_weight_fp8": dict.fromkeys(("torch", "triton"), "dave_fast.ops.fp8:pack_fp8"),
    "linear_fp8": _forms("fp8", "linear_fp8", "triton"),
    "pack_weight_int8": _forms("int8", "pack_int8", "native"),
    "linear_int8": _forms("int8", "linear_int8", "native"),
    "attention": _forms("attention", "attention", "native", "triton"),
    "attention_vjp": _forms("attention", "attention_vjp", "native", "triton"),
    "rotate": _forms("rotary", "rotate", "triton"),
    "row_rstd": _forms("norm", "row_rstd", "native", "triton"),
    "normalize": _forms("norm", "normalize", "triton"),
    "normalize_vjp": _forms("norm", "normalize_vjp", "triton"),
    "assemble": _forms("tokens", "assemble", "triton"),
}


def why_not(op: str, backend: str, device: str) -> str | None:
    """Return why `backend` cannot run `op` on `device`; None when it can."""
    if backend not in IMPLEMENTATIONS[op]:
        return f"op {op!r} has no {backend!r} form"
    if device not in BACKENDS[backend].devices:
        return f"backend {backend!r} runs on {'/'.join(BACKENDS[backend].devices)}, not on {device}"
    return BACKENDS[backend].unavailable()


def choose(op: str, backend: str = "auto", device: str = "cpu") -> str:
    """Return the name of the backend that runs `op` on `device`.

    Raises:
        BackendError: the backend requested by name is unknown, or has this op and cannot be used; none runs on the
            device.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise BackendError(f"backend {backend!r} is unknown; choose 'auto' or one of {', '.join(BACKENDS)}")
        if backend in IMPLEMENTATIONS[op]:
            reason = why_not(op, backend, device)
            if reason is not None:
                raise BackendError(
                    f"backend {backend!r} was asked for and cannot run {op!r}: {reason}. "
                    "Use backend='auto', or see `dave-fast info`."
                )
            return backend
    for name in PREFERENCE.get(device, ("torch",)):
        if why_not(op, name, device) is None:
            return name
    raise BackendError(f"no backend runs {op!r} on {device}; move the tensors to cpu or cuda")


def load(op: str, backend: str) -> Callable[..., Any]:
    """Return the function of one op in one backend."""
    module, function = IMPLEMENTATIONS[op][backend].split(":")
    return getattr(import_module(module), function)


def bind(op: str, backend: str = "auto", device: str = "cpu") -> Callable[..., Any]:
    """Return the function that runs `op` on `device`."""
    return load(op, choose(op, backend, device))


def run(op: str, backend: str, *arguments: Any, **options: Any) -> Any:
    """Return what `op` makes of the arguments on the device of the first of them, a tensor."""
    return bind(op, backend, arguments[0].device.type)(*arguments, **options)
