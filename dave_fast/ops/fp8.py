"""linear with e4m3 operands: the operands of a GEMM have eight bits a number, all else is bfloat16 or float32.

    x̂ = s_x · e4m3(x / s_x)     s_x: max|x| / 448, one a row (token)
    ŵ = s_w · e4m3(w / s_w)     s_w: max|w| / 448, one an output channel
    y = row_scale ⊙ (x̂ ŵᵀ) + bias, and the epilogues of `ops.linear`, in float32, rounded once to x's dtype

e4m3 has four exponent and three mantissa bits: the largest number is 448, a normal one is off by at most 2⁻⁴ of itself.
The dynamic scale of a row depends on that row alone, and takes one more read of it. Where calibration has fixed the
scales (`engine.calibration`), the producer of x stores the codes itself: `Codes`. docs/gpu.md compares the two.

T rows (tokens) · I in-features · O out-features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dave_fast.ops.linear import linear_ref, row_squares
from dave_fast.ops.norm import RowSums
from dave_fast.ops.precision import statistics_dtype

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


class Fp8Weight(NamedTuple):
    """A weight in e4m3.

    Attributes:
        codes: (O, I) e4m3.
        scale: (O,) float32, multiplies each row of the codes.
    """

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class TokenScales:
    """Static scales of an operand's rows, which are the tokens of images one after the other.

    Attributes:
        lead: scale of an image's first `read` tokens, a power of two.
        rest: scale of the other tokens, a power of two.
        tokens: rows of an image.
        read: number of leading tokens.
    """

    lead: float
    rest: float
    tokens: int
    read: int

    @staticmethod
    def uniform(scale: float) -> TokenScales:
        """Return scales that are the same for all rows."""
        return TokenScales(scale, scale, 1, 1)

    def leading(self) -> TokenScales:
        """Return the scales of an operand that only has the leading tokens."""
        return TokenScales.uniform(self.lead)

    def rows(self, like: Tensor) -> Tensor:
        """Return (T, 1), a scale for each row of `like` (T, ...), in its dtype."""
        of_image = like.new_full((self.tokens, 1), self.rest)
        of_image[: self.read] = self.lead
        return of_image.repeat(len(like) // self.tokens, 1)


@dataclass(frozen=True)
class Scales:
    """Static scales of all calibrated operands.

    Attributes:
        operands: id of a packed weight -> the scales of the operand that it multiplies.
    """

    operands: dict[int, TokenScales]

    def of(self, *weights: Any) -> TokenScales | None:
        """Return the scales of an operand that all of these packed weights read; None where one is not calibrated."""
        found = [self.operands[id(weight)] for weight in weights if id(weight) in self.operands]
        if not found or len(found) < len(weights):
            return None
        lead, rest = max(each.lead for each in found), max(each.rest for each in found)
        # A weight that reads only the leading tokens reads them from the operand that has all tokens: its layout holds.
        return replace(max(found, key=lambda each: each.tokens), lead=lead, rest=rest)


@dataclass(frozen=True)
class Codes:
    """A product's result encoded for the next product: values·scale, with static scales.

    Attributes:
        values: (T, O) e4m3; NaN where a number lies beyond 448·scale.
        scale: of its rows.
        dtype: of the result before it was encoded.
        wide: (T, O) the result itself; None where it is not needed.
    """

    values: Tensor
    scale: TokenScales
    dtype: torch.dtype
    wide: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """Shape of the result."""
        return self.values.shape

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """Return these codes with a change of shape made to values and wide."""
        return replace(self, values=change(self.values), wide=None if self.wide is None else change(self.wide))


def wide(x: Tensor | Codes) -> Tensor:
    """Return a result in the engine's dtype; of codes, `wide` must be there."""
    if isinstance(x, Tensor):
        return x
    assert x.wide is not None
    return x.wide


def encode(x: Tensor, scale: TokenScales) -> Tensor:
    """Return e4m3 codes of x/scale for x (T, I); NaN beyond e4m3's range, so that nothing is clipped silently."""
    exact = x.to(statistics_dtype(x.dtype))
    wide = exact / scale.rows(exact)
    return wide.where(wide.abs() <= LARGEST, torch.nan).to(E4M3)


def coded(x: Tensor, code_scale: TokenScales | None) -> Tensor | Codes:
    """Return `Codes` of x (T, I) with the given scales, or x itself where they are None."""
    return x if code_scale is None else Codes(encode(x, code_scale), code_scale, x.dtype, None)


def pack_fp8(matrix: Tensor) -> Fp8Weight:
    """Return matrix (O, I) of any floating dtype in e4m3, with one scale an output channel."""
    return Fp8Weight(*quantise(matrix))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes (T, I) and scales (T,) float32 of x (T, I), with codes·scale near x; NaN rows stay NaN."""
    wide = x.float()
    # Division by a tensor: on a GPU PyTorch multiplies by the reciprocal of a Python number, which rounds differently.
    scale = (wide.abs().amax(-1) / wide.new_full((), LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3)
    return codes, scale


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return codes·scale in float32 or wider."""
    return codes.to(dtype) * scale.to(dtype)[:, None]


def linear_fp8_ref(
    x: Tensor | Codes,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | RowSums | None = None,
    code_scale: TokenScales | None = None,
    wide: bool = True,
    overwrite: bool = False,
    **epilogue: Any,
) -> Any:
    """Return `linear_ref` with e4m3 operands; without fp8 hardware it emulates the precision, not the speed.

    Args:
        x: (T, I) bfloat16 or float32, or float64, for which the same codes are multiplied in float64; or codes.
        weight: what `pack_fp8` returned.
        bias: (O,) as `linear_ref`'s.
        row_scale: (T,) as `linear_ref`'s.
        code_scale: scales with which the result is returned as `Codes`; None for the result itself.
        wide: with code_scale, whether the codes keep the result itself too.
        overwrite: ignored here; kernels may then write into the residual's memory.
        **epilogue: the other arguments of `linear_ref`.

    Returns:
        As `linear_ref`, in x's dtype.
    """
    exact = statistics_dtype(x.dtype)
    if isinstance(x, Codes):
        values = x.values.to(exact)
        operand = values * x.scale.rows(values)
    else:
        operand = dequantise(*quantise(x), exact)
    squares = epilogue.pop("squares", False)
    scale = row_scale.rstd() if isinstance(row_scale, RowSums) else row_scale
    widened: dict[str, Any] = {
        k: v.to(exact) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in (epilogue | {"bias": bias, "row_scale": scale}).items()
    }
    result = linear_ref(operand, dequantise(*weight, exact), **widened)
    result, *gate = result if isinstance(result, tuple) else (result,)
    stored = first = result.to(x.dtype)
    if code_scale is not None:
        first = Codes(encode(result, code_scale), code_scale, x.dtype, stored if wide else None)
    if gate:
        return first, gate[0].to(x.dtype)
    return (first, row_squares(stored)) if squares else first
