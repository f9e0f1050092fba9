"""The forward walk over a plan: tokens -> output, with the operators that the VJP walk needs.

R rows (image, sample) of one micro-batch · n patches · N tokens · Q tokens that leave a step · D width · M hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.engine.bound_ops import BoundOps, Scale, Stream
from dave_fast.engine.levels import PIXELS, Levels
from dave_fast.engine.tail_forms import TailForms
from dave_fast.frozen.mode import FrozenMode, run_frozen
from dave_fast.ops.fp8 import Codes, wide
from dave_fast.ops.norm import RowSums
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.layers import AttentionLayer, FoldedNorm, Layer, Step
from dave_fast.plan.reading import Norm
from dave_fast.plan.vit_plan import ViTPlan


@dataclass
class SavedLayer:
    """The operators of one layer; those of norms are None where the layer does not have that norm.

    Attributes:
        core: what `attention_vjp` needs, or the MLP's gate (R·Q, M).
        scale: of the norm ahead, 1/σ (R·N,) or the sums of squares from which it is made.
        inner: 1/σ (R·Q,) of the norm inside the branch.
        post: 1/σ (R·Q,) of the norm behind the branch.
    """

    core: Any
    scale: Scale | None
    inner: Tensor | None
    post: Tensor | None


@dataclass
class Saved:
    """The operators of one micro-batch.

    Attributes:
        rows: R.
        rstd_patch: 1/σ (R·n,) of the norm of the patches.
        rstd_pre: 1/σ (R·N,) of the norm ahead of the blocks.
        steps: the layers of each step.
        tail_input: (R, Q, D), a leaf of autograd's graph of the tail.
        tail_output: (R, ...), with that graph.
        entered: number of a block -> the stream that entered it, (R·N, D).
    """

    rows: int
    rstd_patch: Tensor | None
    rstd_pre: Tensor | None
    steps: list[list[SavedLayer]]
    tail_input: Tensor
    tail_output: Tensor
    entered: dict[int, Tensor]


class ForwardWalk:
    """The forward walk over one plan.

    Args:
        plan: the model.
        ops: those of the engine.
    """

    def __init__(self, plan: ViTPlan, ops: BoundOps) -> None:
        self._plan, self._ops = plan, ops
        self._tail_forms = TailForms(plan.tail).forms if ops.native else {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor, levels: Levels = PIXELS) -> tuple[Tensor, Saved]:
        """Walk forward.

        Args:
            tokens: (R, n, C·p_h·p_w) in the plan's dtype.
            levels: the walk back tells evidence at their blocks.

        Returns:
            The output (R, ...) in float32, or float64 for a plan in float64, and the operators.
        """
        plan = self._plan
        rows = tokens.shape[0]
        x, squares, rstd_patch, rstd_pre = self.embed(tokens)
        saved, entered, whole = [], {}, plan.whole_blocks
        for i, step in enumerate(plan.steps):
            codes = self._ops.codes(_readers(plan.steps[i + 1 : i + 2]))
            kept = whole.get(i) in levels.blocks
            if kept:
                entered[whole[i]] = wide(x)
            x, squares, operators = self.step(step, x, squares, rows, codes, overwrite=not kept)
            saved.append(operators)
        stream = wide(x).view(rows, -1, plan.width).to(statistics_dtype(plan.dtype)).requires_grad_()
        with torch.enable_grad():
            output = run_frozen(plan.tail, stream, FrozenMode(stream, forms=self._tail_forms))
        return output.detach(), Saved(rows, rstd_patch, rstd_pre, saved, stream, output, entered)

    def embed(self, tokens: Tensor) -> tuple[Stream, Tensor | None, Tensor | None, Tensor | None]:
        """Return the stream (R·N, D), its partial sums of squares, and 1/σ of the norms of patches and of tokens."""
        plan, ops, rstd_patch = self._plan, self._ops, None
        rows, patches, _ = tokens.shape
        embedded = ops.embed_multiply(tokens.reshape(rows * patches, -1), plan.embed.weight, plan.embed.bias)
        norm = plan.norm_pre
        if plan.patch_norm is not None:
            embedded, rstd_patch = self._normed(plan.patch_norm, embedded, centred=plan.centred and norm is None)
        embedded = embedded.view(rows, patches, -1)
        squares = ops.fused and norm is None
        codes = ops.codes(_readers(plan.steps[:1])) if norm is None else {}
        assembled = ops.assemble(embedded, plan.prefix, plan.position, squares=squares, **codes)
        x, sums = assembled if squares else (assembled, None)
        if norm is None:
            return x, sums, rstd_patch, None
        # the stream starts behind this norm, which is not folded, and is centred where the plan is
        x, rstd = self._normed(norm, x, centred=plan.centred)
        return x, None, rstd_patch, rstd

    def _normed(self, norm: Norm, x: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
        return self._ops.normalize(x, norm.weight, norm.bias, norm.eps, centres=norm.centres, centred=centred)

    def step(
        self,
        step: Step,
        x: Stream,
        squares: Tensor | None,
        rows: int,
        codes: dict[str, Any],
        *,
        overwrite: bool = True,
    ) -> tuple[Stream, Tensor | None, list[SavedLayer]]:
        """Return the stream after a step, its partial sums of squares and the operators of its layers.

        Args:
            step: the step.
            x: (R·N, D), the stream before it.
            squares: partial sums of squares of x where they are known.
            rows: R.
            codes: arguments that store the stream as the next step reads it.
            overwrite: whether the memory of x may be reused.
        """
        read = stream = self._read(step, x, rows)
        norms = dict.fromkeys(layer.norm for layer in step.layers)
        scales = {norm: None if norm is None else self._rstd(norm, x, squares) for norm in norms}
        known, saved = None, []
        for layer in step.layers:
            scale = scales[layer.norm]
            if isinstance(layer, AttentionLayer):
                y, core = self._attend(layer, step, x, read, scale, rows)
            else:
                scale = None if scale is None else self._read(step, scale, rows)
                hidden = self._ops.codes([layer.writer.weight], wide=False) if layer.inner is None else {}
                epilogue = {"row_scale": scale, "activation": layer.activation, **hidden}
                y, core = self._ops.multiply(read, layer.fc1.weight, layer.fc1.bias, **epilogue)
            inner = layer.inner
            rstd = None if inner is None else self._ops.row_rstd(wide(y), inner.eps, centred=inner.centred)
            last = layer is step.layers[-1]
            # the memory that the step read is free once its last layer has read it; leading tokens are a copy of x, but
            # those of one row lie in its memory
            free = stream is not read or (last and (overwrite or (step.trimmed and rows > 1)))
            stream, known, post = self._write(layer, y, rstd, wide(stream), overwrite=free, codes=codes if last else {})
            saved.append(SavedLayer(core, scale, rstd, post))
        return stream, known, saved

    def _rstd(self, norm: FoldedNorm, x: Stream, squares: Tensor | None) -> Scale:
        """Return 1/σ of the rows of x, or the sums of squares from which the next product makes it."""
        if norm.centred and squares is not None:
            return RowSums(squares, x.shape[1], norm.eps)
        return self._ops.row_rstd(wide(x), norm.eps, centred=norm.centred)

    def _read(self, step: Step, x: Any, rows: int) -> Any:
        """Return the tokens of x (R·N, ...) that leave the step; x is a tensor, codes or sums of squares."""
        if not step.trimmed:
            return x

        def leading(t: Tensor) -> Tensor:
            return t.unflatten(0, (rows, -1))[:, : self._plan.read].flatten(0, 1).contiguous()

        if isinstance(x, RowSums):
            return replace(x, sums=leading(x.sums))
        if isinstance(x, Codes):
            return replace(x.map(leading), scale=x.scale.leading())
        return leading(x)

    def _write(
        self, layer: Layer, y: Stream, inner: Tensor | None, x: Tensor, *, overwrite: bool, codes: dict[str, Any]
    ) -> tuple[Stream, Tensor | None, Tensor | None]:
        """Project y into the stream; return the stream, its partial sums of squares and 1/σ of the norm between.

        Args:
            layer: whose result y is.
            y: (R·Q, heads·head_dim or M).
            inner: 1/σ of the norm inside the branch.
            x: (R·Q, D), the stream.
            overwrite: whether the memory of x is free.
            codes: arguments that store the stream as the next step reads it.
        """
        writer, post = layer.writer, layer.post
        if post is None:
            fused = self._ops.fused
            epilogue = {"row_scale": inner, "residual": x, "squares": fused, **codes}
            written = self._ops.add(y, writer.weight, writer.bias, overwrite=overwrite, **epilogue)
            return (*written, None) if fused else (written, None, None)
        projected = self._ops.multiply(y, writer.weight, writer.bias, row_scale=inner)
        normed, rstd = self._normed(post, projected, centred=self._plan.centred)
        return normed.to(x.dtype).add_(x), None, rstd

    def _attend(
        self, layer: AttentionLayer, step: Step, x: Stream, read: Stream, scale: Scale | None, rows: int
    ) -> tuple[Stream, Any]:
        """Return the heads' outputs (R·Q, heads·head_dim) and what `attention_vjp` needs.

        read: the tokens of x that leave the step and have queries.
        """
        q, k, v = self._queries_keys_values(layer, step, x, read, scale, rows)
        bias = () if layer.bias is None else (layer.bias,)
        settings = self._ops.codes([layer.writer.weight]) if layer.inner is None else {}
        # Triton's kernels store codes themselves
        stored = settings if self._ops.fused else {}
        out, saved = self._ops.attention(q, k, v, layer.scale, *bias, **stored)
        return self._ops.rows_of_heads(out, settings), saved

    def _queries_keys_values(
        self, layer: AttentionLayer, step: Step, x: Stream, read: Stream, scale: Scale | None, rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (R, Q, heads, head_dim), k and v (R, N, heads, head_dim), with q and k normed and rotated."""
        shape, multiply = (rows, -1, layer.heads, layer.head_dim), self._ops.multiply
        if layer.qkv is not None:
            qkv = multiply(x, layer.qkv.weight, layer.qkv.bias, row_scale=scale)
            q, k, v = (t.unflatten(0, (rows, -1)).view(shape) for t in qkv.chunk(3, dim=-1))
        else:
            assert layer.query is not None and layer.key_value is not None
            scale_read = None if scale is None else self._read(step, scale, rows)
            q = multiply(read, layer.query.weight, layer.query.bias, row_scale=scale_read).view(shape)
            kv = multiply(x, layer.key_value.weight, layer.key_value.bias, row_scale=scale)
            k, v = (t.unflatten(0, (rows, -1)).view(shape) for t in kv.chunk(2, dim=-1))
        return self._rotated(layer, layer.q_norm, q), self._rotated(layer, layer.k_norm, k), v

    def _rotated(self, layer: AttentionLayer, norm: Norm | nn.Module | None, heads: Tensor) -> Tensor:
        """Return queries or keys (R, tokens, heads, head_dim) normed and rotated.

        They are frozen with P, so that no operator of the norm or the rotation is saved.
        """
        if isinstance(norm, nn.Module):
            heads = norm(heads)
        elif norm is not None:
            heads = self._normed(norm, heads, centred=False)[0]
        if layer.rotation is None:
            return heads
        cos, sin = (table[: heads.shape[1]] for table in (layer.rotation.cos, layer.rotation.sin))
        return self._ops.rotate(heads, cos, sin)


def _readers(steps: Sequence[Step]) -> list[Any]:
    """Return the packed weights with which the stream ahead of these steps is multiplied."""
    return [reader.weight for step in steps for layer in step.layers for reader in layer.readers]
