"""Choose and check devices, precisions and dtypes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.ops import _ext

# The dtype of activations; with "fp8" and "int8" only the operands of GEMMs are narrower.
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
}
PRECISIONS = tuple(DTYPES)
# The precisions whose products have forms of their own: `ops.fp8`, `ops.int8`.
NARROW = ("fp8", "int8")
DEVICES = ("cpu", "cuda")
# The dtypes that pixel ops compute in, and those that they read and write.
COMPUTED = (torch.float32, torch.float64)
STORED = (*COMPUTED, torch.bfloat16, torch.float16)


def resolve_device(device: str | torch.device | None, model: nn.Module, *, named: bool) -> torch.device:
    """Return the device to run on.

    Args:
        device: the requested one, or None.
        model: its parameters' device is the default.
        named: whether the model was given by name; the default is then a GPU where there is one.

    Raises:
        InputError: torch does not know the device, or this machine does not have it.
    """
    if device is None and named:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown to torch; expected 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type not in DEVICES:
        raise InputError(f"device {device!r} is not supported; expected {' or '.join(DEVICES)}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no GPU; use device='cpu'")
    return chosen


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def why_no_fp8(device: torch.device) -> str | None:
    """Return why a device does not multiply e4m3 in hardware; None where it does."""
    if device.type != "cuda":
        return f"a {device.type.upper()} does not multiply e4m3"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"{torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))}) has no e4m3"
    return None


def why_no_int8(device: torch.device) -> str | None:
    """Return why a device does not multiply eight-bit integers in hardware, by our kernels; None where it does."""
    if device.type != "cpu":
        return f"dave-fast multiplies eight-bit integers on CPUs alone, and this is a {device.type.upper()}"
    missing = _ext.unavailable()
    if missing is not None:
        return missing
    if not _ext.multiplies_bytes():
        return "this CPU has neither AVX512-VNNI nor AVX-VNNI nor Arm's dot products"
    return None


def why_no_bf16(device: torch.device) -> str | None:
    """Return why a device does not multiply bfloat16 in hardware; None where it does."""
    if has_bf16(device):
        return None
    return f"this {device.type.upper()} does not multiply bfloat16: it would be emulated, and slower than fp32"


_WHY_NOT = {"bf16": why_no_bf16, "fp8": why_no_fp8, "int8": why_no_int8}


def why_not(precision: str, device: torch.device) -> str | None:
    """Return why a device does not multiply in a precision in hardware; None where it does."""
    return _WHY_NOT[precision](device) if precision in _WHY_NOT else None


def fastest_precision(device: torch.device) -> str:
    """Return the precision whose maps take the least time on a device.

    That is int8 on CPUs that multiply it, unless they multiply bfloat16 in tiles (AMX); elsewhere the default.
    """
    tiles = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return choose_precision(None, device) if tiles or why_no_int8(device) is not None else "int8"


def choose_precision(precision: str | None, device: torch.device, backend: str = "auto") -> str:
    """Return the precision to run in: the requested one, else bf16 where the device has it, else fp32.

    Raises:
        InputError: the precision is unknown, or of eight bits on a device without them (backend "torch" emulates them).
    """
    if precision is None:
        return "bf16" if has_bf16(device) else "fp32"
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    reason = why_not(precision, device) if precision in NARROW else None
    if reason is not None and backend != "torch":
        raise InputError(
            f"precision={precision!r} was asked for, but {reason}: use {choose_precision(None, device)!r}, or "
            f"backend='torch' to see what {precision} does to the maps, at no gain in speed"
        )
    return precision


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Shield the engine's arithmetic from the caller's autocast, inference mode and grad mode."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtype(name: str, given: object, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError where an argument is not an allowed dtype."""
    if given not in allowed:
        *names, last = (str(each).removeprefix("torch.") for each in allowed)
        kind = given.__name__ if isinstance(given, type) else str(given)
        raise TypeError(f"{name} must be {', '.join(names)} or {last}; got {kind.removeprefix('torch.')}")


def check_tensor(name: str, given: object, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError where an argument is not a dense tensor of an allowed dtype."""
    check_dtype(name, given.dtype if isinstance(given, Tensor) else type(given), allowed)
    assert isinstance(given, Tensor)
    if given.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got one of layout {given.layout}: call its to_dense()")


def check_images(name: str, given: object) -> None:
    """Raise TypeError or InputError where an argument is not (B, C, H, W) of a dtype that pixel ops compute in."""
    check_tensor(name, given, COMPUTED)
    assert isinstance(given, Tensor)
    if given.ndim != 4 or 0 in given.shape[1:]:
        raise InputError(f"{name} must have the shape (B, C, H, W), C, H and W ≥ 1; got {tuple(given.shape)}")
    check_pixels(*given.shape[2:])


def check_pixels(height: int, width: int) -> None:
    """Raise InputError where an image has too many pixels: kernels number them, and a border, in 30 bits."""
    if (height + 4) * (width + 4) >= 1 << 30:
        raise InputError(f"images must have fewer than 2³⁰ pixels; got {height}×{width}: resize or crop them")
