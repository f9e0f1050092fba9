"""The engine: two walks over a ViTPlan, written once against the ops.

    forward   tokens (R, n, c·p_h·p_w) -> logits (R, K), keeping the operators: P, 1/σ and gates
    vjp       cotangent of the logits (R, K) -> cotangent of the tokens, with those operators held constant

(DAVE, arXiv 2602.06613, Eq. 3-5.) Only values carry a cotangent, so q and k weights never appear in the VJP.
There is no autograd and there are no hooks between the patch embedding and the last block; the tail (final
norm, pooling, any head) is the model's own modules under the frozen route, at the cost of a few percent.

R rows (image, sample) of one micro-batch · n patches · N tokens · C width · A heads·head_dim · M hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.frozen.mode import freeze
from dave_fast.ops import _registry
from dave_fast.ops.fp8 import Codes, Scales, coded, encode, wide
from dave_fast.ops.norm import RowSums
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.layers import AttentionLayer, FoldedNorm, Layer, MlpLayer, Step
from dave_fast.plan.reading import Norm
from dave_fast.plan.vit_plan import ViTPlan

Scale = Tensor | RowSums
# rows of the residual stream, or of its cotangent
Stream = Tensor | Codes


@dataclass
class SavedLayer:
    """The operators of one layer.

    core: the attention's P, or the MLP's gate (R·N, M) · scale: 1/σ (R·N,) of the norm ahead, or what it is made of,
    inner: of the one inside, post: of the one behind; None where there is none.
    """

    core: Any
    scale: Scale | None
    inner: Tensor | None
    post: Tensor | None


@dataclass
class Saved:
    """The operators of one micro-batch, step by step."""

    rows: int
    rstd_patch: Tensor | None
    rstd_pre: Tensor | None
    steps: list[list[SavedLayer]]
    tail_input: Tensor
    tail_output: Tensor


class Engine:
    """The two walks over one plan, bound to the ops of one backend."""

    def __init__(
        self, plan: ViTPlan, backend: str = "auto", *, fp8: bool = False, scales: Scales | None = None
    ) -> None:
        device = plan.device.type
        self.plan = plan
        linear = "linear_fp8" if fp8 else "linear"
        self.multiply: Callable[..., Any] = _registry.bind(linear, backend, device)
        # eight bits are too few for pixels, and a hundredth of the work is little to save
        self._embed_multiply: Callable[..., Any] = _registry.bind("linear", backend, device)
        self._assemble: Callable[..., Any] = _registry.bind("assemble", backend, device)
        self._row_rstd: Callable[..., Tensor] = _registry.bind("row_rstd", backend, device)
        self._normalize: Callable[..., tuple[Tensor, Tensor]] = _registry.bind("normalize", backend, device)
        self._normalize_vjp: Callable[..., Tensor] = _registry.bind("normalize_vjp", backend, device)
        self._rotate: Callable[..., Tensor] = _registry.bind("rotate", backend, device)
        self._attention: Callable[..., Any] = _registry.bind("attention", backend, device)
        self._attention_vjp: Callable[..., Any] = _registry.bind("attention_vjp", backend, device)
        # Triton's products sum squares, of which readers make 1/σ, and write into residuals; its attention stores codes
        self._fused = _registry.choose(linear, backend, device) == "triton"
        self._fp8 = fp8
        self._scales = scales or Scales({})

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> tuple[Tensor, Saved]:
        """tokens (R, n, c·p_h·p_w) in the plan's dtype -> logits (R, K) float32 (float64), operators."""
        plan = self.plan
        rows = tokens.shape[0]
        x, squares, rstd_patch, rstd_pre = self._embed(tokens)
        saved = []
        for i, step in enumerate(plan.steps):
            x, squares, operators = self._step(step, x, squares, rows, self._codes(_readers(plan.steps[i + 1 : i + 2])))
            saved.append(operators)
        stream = wide(x).view(rows, -1, plan.width).to(statistics_dtype(plan.dtype)).requires_grad_()
        with torch.enable_grad(), freeze():
            logits = plan.tail(stream)
        return logits.detach(), Saved(rows, rstd_patch, rstd_pre, saved, stream, logits)

    @torch.no_grad()
    def vjp(self, saved: Saved, cotangent: Tensor) -> Tensor:
        """Cotangent of the logits (R, K) -> cotangent of the tokens (R, n, c·p_h·p_w), the plan's dtype.

        May be called again with another cotangent of the same forward walk.
        """
        plan = self.plan
        (g,) = torch.autograd.grad(saved.tail_output, saved.tail_input, cotangent, retain_graph=True)
        # a tail may hand back a view of any strides
        g = g.to(plan.dtype).reshape(-1, plan.width).contiguous()
        if g.data_ptr() == cotangent.data_ptr():
            # a tail that hands its input on: the walk writes into g, and the cotangent is the caller's
            g = g.clone()
        size = None
        if self._fp8:
            # static scales fit cotangents of one size: every row's largest number lies between a half and one
            largest = g.view(saved.rows, -1).abs().amax(1).float().clamp(min=torch.finfo(torch.float32).tiny)
            size = torch.exp2(largest.log2().ceil().clamp(max=127.0))
            g = (g.view(saved.rows, -1) / size[:, None]).view_as(g).to(g.dtype)
        flow: Stream = g
        for i in reversed(range(len(plan.steps))):
            codes = self._codes(_vjp_readers(plan.steps[i - 1 : i] if i else ()))
            flow = self._step_vjp(plan.steps[i], saved.steps[i], flow, saved.rows, codes)
        return self._embed_vjp(wide(flow), saved, size)

    def _codes(self, weights: list[Any], **settings: Any) -> dict[str, Any]:
        """What tells a product to store its result in e4m3 for those who read it; nothing where that has no scale."""
        scale = self._scales.of(*weights)
        return {} if scale is None else {"code_scale": scale, **settings}

    # ---- patch embedding ----

    def _embed(self, tokens: Tensor) -> tuple[Stream, Tensor | None, Tensor | None, Tensor | None]:
        """The stream (R·N, C), what is known of its squares, and 1/σ of the norms of patches and of all tokens."""
        plan, rstd_patch = self.plan, None
        rows, patches, _ = tokens.shape
        embedded = self._embed_multiply(tokens.reshape(rows * patches, -1), plan.embed.weight, plan.embed.bias)
        norm = plan.norm_pre
        if plan.patch_norm is not None:
            embedded, rstd_patch = self._normed(plan.patch_norm, embedded, centred=plan.centred and norm is None)
        embedded = embedded.view(rows, patches, -1)
        squares = self._fused and norm is None
        codes = self._codes(_readers(plan.steps[:1])) if norm is None else {}
        assembled = self._assemble(embedded, plan.prefix, plan.position, squares=squares, **codes)
        x, sums = assembled if squares else (assembled, None)
        if norm is None:
            return x, sums, rstd_patch, None
        # a real norm ahead of the blocks: the stream starts behind it, centred where the plan is
        x, rstd = self._normed(norm, x, centred=plan.centred)
        return x, None, rstd_patch, rstd

    def _normed(self, norm: Norm, x: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
        return self._normalize(x, norm.weight, norm.bias, norm.eps, centres=norm.centres, centred=centred)

    def _embed_vjp(self, g: Tensor, saved: Saved, size: Tensor | None) -> Tensor:
        """g (R·N, C) -> cotangent of the tokens, multiplied by its row's `size` where there is one."""
        plan = self.plan
        norm = plan.norm_pre
        if norm is not None and saved.rstd_pre is not None:
            g = self._normalize_vjp(g, norm.weight, saved.rstd_pre, centres=norm.centres, centred=plan.centred)
        g = g.view(saved.rows, plan.tokens, plan.width)[:, plan.prefix.shape[0] :]
        patches, first = g.reshape(-1, plan.width), plan.patch_norm
        if first is not None:
            centred = plan.centred and norm is None
            patches = self._normalize_vjp(
                patches, first.weight, saved.rstd_patch, centres=first.centres, centred=centred
            )
        scale = None if size is None else size.repeat_interleave(g.shape[1])
        tokens = self._embed_multiply(patches, plan.embed.transposed, row_scale=scale)
        return tokens.view(saved.rows, g.shape[1], -1)

    # ---- one step ----

    def _step(
        self, step: Step, x: Stream, squares: Tensor | None, rows: int, codes: dict[str, Any]
    ) -> tuple[Stream, Tensor | None, list[SavedLayer]]:
        """x (R·N, C) and what is known of its squares -> both after the step, (R·read, C) after a trimmed one.

        codes: how the next step wants the stream.
        """
        read = stream = self._read(step, x, rows)
        scales: dict[FoldedNorm, Scale] = {}
        known, saved = None, []
        for layer in step.layers:
            scale = None
            if layer.norm is not None:
                if layer.norm not in scales:
                    scales[layer.norm] = self._rstd(layer.norm, x, squares)
                scale = scales[layer.norm]
            if isinstance(layer, AttentionLayer):
                y, core = self._attend(layer, step, x, read, scale, rows)
            else:
                scale = None if scale is None else self._read(step, scale, rows)
                hidden = self._codes([layer.writer.weight], wide=False) if layer.inner is None else {}
                y, core = self.multiply(
                    *(read, layer.fc1.weight, layer.fc1.bias),
                    row_scale=scale,
                    activation=layer.activation,
                    **hidden,
                )
            inner = layer.inner
            rstd = None if inner is None else self._row_rstd(wide(y), inner.eps, centred=inner.centred)
            last = layer is step.layers[-1]
            # what the step read is free once its last layer has read it
            free = last or stream is not read
            stream, known, post = self._write(layer, y, rstd, wide(stream), overwrite=free, codes=codes if last else {})
            saved.append(SavedLayer(core, scale, rstd, post))
        return stream, known, saved

    def _rstd(self, norm: FoldedNorm, x: Stream, squares: Tensor | None) -> Scale:
        """1/σ of the rows of x, or the sums of squares that the product that reads x makes it of."""
        if norm.centred and squares is not None:
            return RowSums(squares, x.shape[1], norm.eps)
        return self._row_rstd(wide(x), norm.eps, centred=norm.centred)

    def _read(self, step: Step, x: Any, rows: int) -> Any:
        """The tokens of x (R·N, ...) that leave the step: of a tensor, of a stream in codes, or of sums of squares."""
        if not step.trimmed:
            return x

        def leading(t: Tensor) -> Tensor:
            return t.unflatten(0, (rows, -1))[:, : self.plan.read].flatten(0, 1).contiguous()

        if isinstance(x, RowSums):
            return replace(x, sums=leading(x.sums))
        if isinstance(x, Codes):
            return replace(x.map(leading), scale=x.scale.leading())
        return leading(x)

    def _write(
        self, layer: Layer, y: Stream, inner: Tensor | None, x: Tensor, *, overwrite: bool, codes: dict[str, Any]
    ) -> tuple[Stream, Tensor | None, Tensor | None]:
        """The stream x after y was projected into it, its rows' partial sums of squares, 1/σ of the norm between.

        overwrite: whether nobody reads x any more · codes: how the stream is wanted.
        """
        writer, post = layer.writer, layer.post
        if post is None:
            written = self._add(
                *(y, writer.weight, writer.bias),
                row_scale=inner,
                residual=x,
                overwrite=overwrite,
                squares=self._fused,
                **codes,
            )
            return (*written, None) if self._fused else (written, None, None)
        projected = self.multiply(y, writer.weight, writer.bias, row_scale=inner)
        normed, rstd = self._normed(post, projected, centred=self.plan.centred)
        return normed.add_(x), None, rstd

    def _add(self, x: Stream, weight: Any, bias: Tensor | None = None, *, overwrite: bool, **epilogue: Any) -> Any:
        """A product that is added to the residual, in its memory where that is free and the backend can."""
        if self._fused:
            epilogue["overwrite"] = overwrite
        return self.multiply(x, weight, bias, **epilogue)

    def _attend(
        self, layer: AttentionLayer, step: Step, x: Stream, read: Stream, scale: Scale | None, rows: int
    ) -> tuple[Stream, Any]:
        """The heads' outputs (R·Q, heads·D), and what attention's VJP needs; read: of x, the tokens with queries."""
        q, k, v = self._queries_keys_values(layer, step, x, read, scale, rows)
        bias = () if layer.bias is None else (layer.bias,)
        settings = self._codes([layer.writer.weight]) if layer.inner is None else {}
        # Triton's kernels store codes themselves
        stored = settings if self._fused else {}
        out, saved = self._attention(q, k, v, layer.scale, *bias, **stored)
        return self._rows_of_heads(out, settings), saved

    def _rows_of_heads(self, heads: Stream, settings: dict[str, Any]) -> Stream:
        """An attention's result (R, tokens, heads, D) as the product that reads it wants it, (R·tokens, heads·D)."""
        if isinstance(heads, Codes):
            return heads.map(lambda t: t.view(t.shape[0] * t.shape[1], -1))
        return coded(heads.view(heads.shape[0] * heads.shape[1], -1), settings.get("code_scale"))

    def _queries_keys_values(
        self, layer: AttentionLayer, step: Step, x: Stream, read: Stream, scale: Scale | None, rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (R, Q, heads, D), k and v (R, N, heads, D): of the projections, q and k normed and rotated."""
        shape = (rows, -1, layer.heads, layer.head_dim)
        if layer.qkv is not None:
            qkv = self.multiply(x, layer.qkv.weight, layer.qkv.bias, row_scale=scale)
            q, k, v = (t.unflatten(0, (rows, -1)).view(shape) for t in qkv.chunk(3, dim=-1))
        else:
            assert layer.query is not None and layer.key_value is not None
            scale_read = None if scale is None else self._read(step, scale, rows)
            q = self.multiply(read, layer.query.weight, layer.query.bias, row_scale=scale_read).view(shape)
            kv = self.multiply(x, layer.key_value.weight, layer.key_value.bias, row_scale=scale)
            k, v = (t.unflatten(0, (rows, -1)).view(shape) for t in kv.chunk(2, dim=-1))
        return self._turned(layer, layer.q_norm, q), self._turned(layer, layer.k_norm, k), v

    def _turned(self, layer: AttentionLayer, norm: Norm | nn.Module | None, heads: Tensor) -> Tensor:
        """Queries or keys (R, tokens, heads, D) normed and rotated: frozen with P, so nothing of it is kept."""
        if isinstance(norm, nn.Module):
            heads = norm(heads)
        elif norm is not None:
            heads = self._normed(norm, heads, centred=False)[0]
        if layer.rotation is None:
            return heads
        cos, sin = (table[: heads.shape[1]] for table in (layer.rotation.cos, layer.rotation.sin))
        return self._rotate(heads, cos, sin)

    def _step_vjp(self, step: Step, saved: list[SavedLayer], g: Stream, rows: int, codes: dict[str, Any]) -> Stream:
        """Cotangent after the step -> before it, (R·N, C); codes: how the step before wants it."""
        # of the tokens that leave the step, and of all of them where these are more
        left, whole = g, None
        # the layer whose product is what leaves the step
        of_all = [layer for layer in step.layers if isinstance(layer, AttentionLayer)] if step.trimmed else step.layers
        final = of_all[-1]
        for layer, operators in zip(step.layers, saved, strict=True):
            free, stored = layer is step.layers[-1] or left is not g, codes if layer is final else {}
            if isinstance(layer, MlpLayer):
                left = self._mlp_vjp(layer, operators, g, wide(left), overwrite=free, codes=stored)
                continue
            d_v = self._attend_vjp(layer, operators, g, rows)
            values = layer.qkv or layer.key_value
            assert values is not None
            total = self._add(
                *(d_v, values.transposed),
                row_scale=operators.scale,
                residual=(None if whole is None else wide(whole)) if step.trimmed else wide(left),
                overwrite=free or step.trimmed,
                **stored,
            )
            left, whole = (left, total) if step.trimmed else (total, None)
        return left if whole is None else self._joined(whole, wide(left), rows)

    def _joined(self, whole: Stream, left: Tensor, rows: int) -> Stream:
        """whole (R·N, C) + left (R·read, C), in the memory of whole."""

        def leading(t: Tensor) -> Tensor:
            return t.view(rows, -1, t.shape[1])[:, : self.plan.read]

        added = leading(wide(whole))
        added += left.view_as(added)
        if isinstance(whole, Codes):
            codes = encode(added.flatten(0, 1), whole.scale.leading())
            leading(whole.values).copy_(codes.view_as(added))
        return whole

    def _post_vjp(self, layer: Layer, saved: SavedLayer, g: Stream) -> Stream:
        post = layer.post
        if post is None:
            return g
        return self._normalize_vjp(wide(g), post.weight, saved.post, centres=post.centres, centred=self.plan.centred)

    def _mlp_vjp(
        self,
        layer: MlpLayer,
        saved: SavedLayer,
        g: Stream,
        total: Tensor,
        *,
        overwrite: bool,
        codes: dict[str, Any],
    ) -> Stream:
        """total + the branch's share of the cotangent before it; overwrite, codes: as `_write`'s."""
        g = self._post_vjp(layer, saved, g)
        scale = saved.scale
        if saved.inner is not None:
            # both 1/σ scale rows, and so do they in one product
            ahead = scale.rstd() if isinstance(scale, RowSums) else scale
            scale = saved.inner if ahead is None else ahead * saved.inner
        hidden = self._codes([layer.fc1.transposed], wide=False)
        d_hidden = self.multiply(g, layer.writer.transposed, row_scale=scale, gate=saved.core, **hidden)
        return self._add(d_hidden, layer.fc1.transposed, residual=total, overwrite=overwrite, **codes)

    def _attend_vjp(self, layer: AttentionLayer, saved: SavedLayer, g: Stream, rows: int) -> Stream:
        """Cotangent of the branch's result -> of its values (R·N, heads·D)."""
        g = self._post_vjp(layer, saved, g)
        d_out = self.multiply(g, layer.writer.transposed, row_scale=saved.inner)
        values = layer.qkv or layer.key_value
        assert values is not None
        settings = self._codes([values.transposed])
        heads = d_out.view(rows, -1, layer.heads, layer.head_dim)
        d_v = self._attention_vjp(saved.core, heads, **(settings if self._fused else {}))
        return self._rows_of_heads(d_v, settings)


def _readers(steps: Sequence[Step]) -> list[Any]:
    """The packed weights that the stream ahead of these steps is multiplied with, forward."""
    layers = [layer for step in steps for layer in step.layers]
    return [
        projection.weight
        for layer in layers
        for projection in ([layer.fc1] if isinstance(layer, MlpLayer) else [layer.qkv, layer.query, layer.key_value])
        if projection is not None
    ]


def _vjp_readers(steps: Sequence[Step]) -> list[Any]:
    """The packed weights that the cotangent behind these steps is multiplied with; none where a norm reads it too."""
    layers = [layer for step in steps for layer in step.layers]
    return [] if any(layer.post for layer in layers) else [layer.writer.transposed for layer in layers]
