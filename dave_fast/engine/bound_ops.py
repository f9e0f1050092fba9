"""The ops of one backend, bound once: those of the walks, and those between images and the walks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dave_fast.ops import _registry
from dave_fast.ops.fp8 import Codes, Scales, coded
from dave_fast.ops.norm import RowSums

# 1/σ of rows, or the sums of squares from which a product makes it
Scale = Tensor | RowSums
# rows of the residual stream, or of its cotangent
Stream = Tensor | Codes


class PixelOps:
    """The ops between images and the walks.

    Args:
        backend: a name of `ops._registry`, or "auto".
        device: on which they run.

    Attributes:
        capturable: whether a CUDA graph can record them; PyTorch's own forms wait for the device.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        def bind(op: str) -> Callable[..., Any]:
            return _registry.bind(op, backend, device.type)

        self.perturb: Callable[..., Tensor] = bind("perturb")
        self.pull_back: Callable[..., Tensor] = bind("pull_back")
        self.pull_back_mean: Callable[..., Tensor] = bind("pull_back_mean")
        self.pull_back_mean_variance: Callable[..., tuple[Tensor, Tensor]] = bind("pull_back_mean_variance")
        self.spread_mean_variance: Callable[..., tuple[Tensor, Tensor]] = bind("spread_mean_variance")
        self.robust_mean: Callable[..., Tensor] = bind("robust_mean")
        self.robust_mean_variance: Callable[..., tuple[Tensor, Tensor]] = bind("robust_mean_variance")
        self.shrink: Callable[..., Tensor] = bind("shrink")
        self.smooth: Callable[..., Tensor] = bind("smooth")
        self.capturable = _registry.choose("perturb", backend, device.type) != "torch"


class BoundOps:
    """The ops that the walks call.

    Args:
        backend: a name of `ops._registry`, or "auto".
        device: on which they run.
        narrow: "fp8" or "int8" where products of blocks take operands of eight bits.
        scales: static scales of e4m3 operands; operands without one get scales of their rows.

    Attributes:
        multiply: the products of blocks, `linear`, `linear_fp8` or `linear_int8`.
        embed_multiply: the products of the patch embedding. They are wider: eight bits are too few for pixels,
            and these products are a hundredth of the work.
        native: whether products are those of C++, whose rows have the same bits in any batch.
        fused: whether the backend is Triton, whose products sum squares for the next norm and write into residuals,
            and whose attention stores e4m3 codes.
        overwrites: whether products may be written over their residuals.
    """

    def __init__(
        self, backend: str, device: torch.device, *, narrow: str | None = None, scales: Scales | None = None
    ) -> None:
        linear = "linear" if narrow is None else f"linear_{narrow}"
        self.fp8 = narrow == "fp8"
        self.scales = scales or Scales({})
        form = _registry.choose(linear, backend, device.type)
        self.native, self.fused = form == "native", form == "triton"
        self.overwrites = self.native or self.fused

        def bind(op: str) -> Callable[..., Any]:
            return _registry.bind(op, backend, device.type)

        self.multiply = bind(linear)
        self.embed_multiply: Callable[..., Tensor] = bind("linear")
        self.assemble = bind("assemble")
        self.row_rstd: Callable[..., Tensor] = bind("row_rstd")
        self.normalize: Callable[..., tuple[Tensor, Tensor]] = bind("normalize")
        self.normalize_vjp: Callable[..., Tensor] = bind("normalize_vjp")
        self.rotate: Callable[..., Tensor] = bind("rotate")
        self.attention = bind("attention")
        self.attention_vjp = bind("attention_vjp")

    def add(self, x: Stream, weight: Any, bias: Tensor | None = None, *, overwrite: bool, **epilogue: Any) -> Any:
        """Multiply and add to the residual, in its memory where `overwrite` allows it and the backend can."""
        if self.overwrites:
            epilogue["overwrite"] = overwrite
        return self.multiply(x, weight, bias, **epilogue)

    def codes(self, weights: list[Any], **settings: Any) -> dict[str, Any]:
        """Return the arguments that make a product store its result in e4m3 for these packed weights.

        Empty where the operand of these weights has no static scale. settings: further arguments for that case.
        """
        scale = self.scales.of(*weights)
        return {} if scale is None else {"code_scale": scale, **settings}

    def rows_of_heads(self, heads: Stream, settings: dict[str, Any]) -> Stream:
        """Return an attention's result (R, tokens, heads, head_dim) as rows (R·tokens, heads·head_dim).

        settings: of `codes` for the product that reads it; the rows are in e4m3 where they have a scale.
        """
        if isinstance(heads, Codes):
            return heads.map(lambda t: t.view(t.shape[0] * t.shape[1], -1))
        return coded(heads.view(heads.shape[0] * heads.shape[1], -1), settings.get("code_scale"))
