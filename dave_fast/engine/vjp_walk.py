"""The VJP walk over a plan: cotangent of the output -> cotangent of the tokens, with operators held constant.

Only values carry a cotangent, so that the weights of q and k never appear here.

R rows (image, sample) of one micro-batch · n patches · N tokens · Q tokens that leave a step · D width · M hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.bound_ops import BoundOps, Stream
from dave_fast.engine.forward_walk import Saved, SavedLayer
from dave_fast.engine.levels import PIXELS, Levels, Pulled
from dave_fast.ops.fp8 import Codes, encode, wide
from dave_fast.ops.norm import RowSums
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.layers import AttentionLayer, Layer, MlpLayer, Projection, Step
from dave_fast.plan.vit_plan import ViTPlan


class VjpWalk:
    """The VJP walk over one plan.

    Args:
        plan: the model.
        ops: those of the engine.
    """

    def __init__(self, plan: ViTPlan, ops: BoundOps) -> None:
        self._plan, self._ops = plan, ops

    @torch.no_grad()
    def __call__(self, saved: Saved, cotangent: Tensor) -> Tensor:
        """Walk back; may be called again with another cotangent of the same forward walk.

        Args:
            saved: the operators of a forward walk.
            cotangent: of its output, (R, ...).

        Returns:
            The cotangent of the tokens, (R, n, C·p_h·p_w) in the plan's dtype.
        """
        tokens = self.pull(saved, cotangent, PIXELS).pixels
        assert tokens is not None
        return tokens

    @torch.no_grad()
    def pull(self, saved: Saved, cotangent: Tensor, levels: Levels) -> Pulled:
        """Walk back as far as the first of the levels, and return what each of them tells.

        Args:
            saved: the operators of a forward walk over the same levels.
            cotangent: of its output, (R, ...).
            levels: pixels, blocks.
        """
        plan = self._plan
        (g,) = torch.autograd.grad(saved.tail_output, saved.tail_input, cotangent, retain_graph=True)
        # a tail may return a view of any strides
        g = g.to(plan.stream).reshape(-1, plan.width).contiguous()
        if g.data_ptr() == cotangent.data_ptr():
            # the tail is the identity: the walk writes into g, and the cotangent is the caller's
            g = g.clone()
        size = None
        if self._ops.fp8:
            g, size = _unit_rows(g, saved.rows)
        flow: Stream = g
        evidence: dict[int, Tensor] = {}
        whole = plan.whole_blocks
        for i in reversed(range(len(plan.steps))):
            if not levels.pixels and len(evidence) == len(levels.blocks):
                break
            codes = self._ops.codes(_readers(plan.steps[i - 1 : i] if i else ()))
            flow = self._step(plan.steps[i], saved.steps[i], flow, saved.rows, codes)
            block = whole.get(i)
            if block is not None and block in levels.blocks:
                evidence[block] = self._evidence(saved.entered[block], wide(flow), size)
        tokens = self._embed(wide(flow), saved, size) if levels.pixels else None
        return Pulled(tokens, tuple(evidence[block] for block in levels.blocks))

    def _evidence(self, entered: Tensor, g: Tensor, size: Tensor | None) -> Tensor:
        """Return Σ_channels of the stream ⊙ its cotangent (R·N, D) times its row's `size` (R,) if given; (R, N)."""
        dtype = statistics_dtype(self._plan.dtype)
        of_tokens = (entered.to(dtype) * g.to(dtype)).sum(-1).view(-1, self._plan.tokens)
        return of_tokens if size is None else of_tokens * size[:, None]

    def _embed(self, g: Tensor, saved: Saved, size: Tensor | None) -> Tensor:
        """Return the cotangent of the tokens for that of the stream (R·N, D), times its row's `size` (R,) if given."""
        plan, ops = self._plan, self._ops
        norm = plan.norm_pre
        if norm is not None and saved.rstd_pre is not None:
            g = ops.normalize_vjp(g, norm.weight, saved.rstd_pre, centres=norm.centres, centred=plan.centred)
        g = g.view(saved.rows, plan.tokens, plan.width)[:, plan.prefix.shape[0] :]
        patches, first = g.reshape(-1, plan.width), plan.patch_norm
        if first is not None:
            centred = plan.centred and norm is None
            patches = ops.normalize_vjp(patches, first.weight, saved.rstd_patch, centres=first.centres, centred=centred)
        scale = None if size is None else size.repeat_interleave(g.shape[1])
        tokens = ops.embed_multiply(patches, plan.embed.transposed, row_scale=scale)
        return tokens.view(saved.rows, g.shape[1], -1)

    def _step(self, step: Step, saved: list[SavedLayer], g: Stream, rows: int, codes: dict[str, Any]) -> Stream:
        """Return the cotangent before a step, (R·N, D).

        Args:
            step: the step.
            saved: operators of its layers.
            g: (R·Q, D), the cotangent after it.
            rows: R.
            codes: arguments that store the result as the step before reads it.
        """
        # of the tokens that leave the step, and of all tokens where these are more
        left, whole = g, None
        # the layer whose product is the step's result
        of_all = [layer for layer in step.layers if isinstance(layer, AttentionLayer)] if step.trimmed else step.layers
        final = of_all[-1]
        for layer, operators in zip(step.layers, saved, strict=True):
            free, stored = layer is step.layers[-1] or left is not g, codes if layer is final else {}
            if isinstance(layer, MlpLayer):
                left = self._mlp(layer, operators, g, wide(left), overwrite=free, codes=stored)
                continue
            d_v = self._attend(layer, operators, g, rows)
            total = self._ops.add(
                *(d_v, _values(layer).transposed),
                row_scale=operators.scale,
                residual=(None if whole is None else wide(whole)) if step.trimmed else wide(left),
                overwrite=free or step.trimmed,
                **stored,
            )
            left, whole = (left, total) if step.trimmed else (total, None)
        return left if whole is None else self._joined(whole, wide(left), rows)

    def _joined(self, whole: Stream, left: Tensor, rows: int) -> Stream:
        """Add `left` (R·Q, D) to the leading tokens of `whole` (R·N, D), in its memory."""

        def leading(t: Tensor) -> Tensor:
            return t.view(rows, -1, t.shape[1])[:, : self._plan.read]

        added = leading(wide(whole))
        added += left.view_as(added)
        if isinstance(whole, Codes):
            codes = encode(added.flatten(0, 1), whole.scale.leading())
            leading(whole.values).copy_(codes.view_as(added))
        return whole

    def _post(self, layer: Layer, saved: SavedLayer, g: Stream) -> Stream:
        """Return the cotangent ahead of the norm behind a branch."""
        post = layer.post
        if post is None:
            return g
        centred = self._plan.centred
        return self._ops.normalize_vjp(wide(g), post.weight, saved.post, centres=post.centres, centred=centred)

    def _mlp(
        self, layer: MlpLayer, saved: SavedLayer, g: Stream, total: Tensor, *, overwrite: bool, codes: dict[str, Any]
    ) -> Stream:
        """Return `total` plus the branch's share of the cotangent before it.

        Args:
            layer: the branch.
            saved: its operators.
            g: (R·Q, D), the cotangent of its result.
            total: (R·Q, D), the cotangent before the step so far.
            overwrite: whether the memory of `total` is free.
            codes: arguments that store the result as the step before reads it.
        """
        g = self._post(layer, saved, g)
        scale = saved.scale
        if saved.inner is not None:
            # both 1/σ scale rows, so that their product does
            ahead = scale.rstd() if isinstance(scale, RowSums) else scale
            scale = saved.inner if ahead is None else ahead * saved.inner
        hidden = self._ops.codes([layer.fc1.transposed], wide=False)
        d_hidden = self._ops.multiply(g, layer.writer.transposed, row_scale=scale, gate=saved.core, **hidden)
        before: Stream = self._ops.add(*(d_hidden, layer.fc1.transposed), residual=total, overwrite=overwrite, **codes)
        return before

    def _attend(self, layer: AttentionLayer, saved: SavedLayer, g: Stream, rows: int) -> Stream:
        """Return the cotangent of the values (R·N, heads·head_dim) for that of the branch's result."""
        g = self._post(layer, saved, g)
        d_out = self._ops.multiply(g, layer.writer.transposed, row_scale=saved.inner)
        settings = self._ops.codes([_values(layer).transposed])
        heads = d_out.view(rows, -1, layer.heads, layer.head_dim)
        d_v = self._ops.attention_vjp(saved.core, heads, **(settings if self._ops.fused else {}))
        return self._ops.rows_of_heads(d_v, settings)


def _unit_rows(g: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Divide each row of a micro-batch by a power of two, so that its largest number lies between a half and one.

    Static scales fit cotangents of this size only. Returns the quotients and the divisors (R,).
    """
    largest = g.view(rows, -1).abs().amax(1).float().clamp(min=torch.finfo(torch.float32).tiny)
    size = torch.exp2(largest.log2().ceil().clamp(max=127.0))
    return (g.view(rows, -1) / size[:, None]).view_as(g).to(g.dtype), size


def _values(layer: AttentionLayer) -> Projection:
    """Return the projection whose transposed weight is that of the values."""
    values = layer.qkv or layer.key_value
    assert values is not None
    return values


def _readers(steps: Sequence[Step]) -> list[Any]:
    """Return the packed weights with which the cotangent behind these steps is multiplied; empty if a norm reads it."""
    layers = [layer for step in steps for layer in step.layers]
    return [] if any(layer.post for layer in layers) else [layer.writer.transposed for layer in layers]
