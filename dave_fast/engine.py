"""The engine: two walks over a ViTPlan, written once against the ops.

    forward   tokens (R, n, c·p_h·p_w) -> logits (R, K), keeping the operators: P, 1/σ and gates
    vjp       cotangent of the logits (R, K) -> cotangent of the tokens, with those operators held constant

(DAVE, arXiv 2602.06613, Eq. 3-5.) Only values carry a cotangent, so q and k weights never appear in the VJP.
There is no autograd and there are no hooks between the patch embedding and the last block; the tail (final
norm, pooling, any head) is the model's own modules under the frozen route, at the cost of a few percent.

R rows (image, sample) of one micro-batch · n patches · N tokens · C width · A heads·head_dim · M hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.frozen import freeze
from dave_fast.models.timm_vit import Norm
from dave_fast.ops import _registry
from dave_fast.plan import Layer, Projection, ViTPlan, make_plan
from dave_fast.precision import statistics_dtype


@dataclass
class SavedLayer:
    """The operators of one block: rstd (R·N,) of each norm, the attention's P, the MLP's gate (R·N, M)."""

    rstd1: Tensor
    attention: Any
    rstd2: Tensor
    gate: Tensor


@dataclass
class Saved:
    """The operators of one micro-batch."""

    rows: int
    rstd_pre: Tensor | None
    layers: list[SavedLayer]
    tail_input: Tensor
    tail_output: Tensor


class Engine:
    """The two walks over one plan, bound to the ops of one backend."""

    def __init__(self, plan: ViTPlan, backend: str = "auto", *, fp8: bool = False) -> None:
        device = plan.device.type
        self.plan = plan
        linear = "linear_fp8" if fp8 else "linear"
        self._linear: Callable[..., Any] = _registry.bind(linear, backend, device)
        self._assemble: Callable[..., Any] = _registry.bind("assemble", backend, device)
        self._row_rstd: Callable[..., Tensor] = _registry.bind("row_rstd", backend, device)
        self._normalize: Callable[..., tuple[Tensor, Tensor]] = _registry.bind("normalize", backend, device)
        self._normalize_vjp: Callable[..., Tensor] = _registry.bind("normalize_vjp", backend, device)
        self._attention: Callable[..., Any] = _registry.bind("attention", backend, device)
        self._attention_vjp: Callable[..., Any] = _registry.bind("attention_vjp", backend, device)
        # Triton's writers sum squares in their epilogue, so that norms need not read the stream again
        self._squares = _registry.choose(linear, backend, device) == "triton"

    @staticmethod
    def build(
        model: nn.Module,
        *,
        dtype: torch.dtype,
        size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        sibling: ViTPlan | None = None,
        fp8: bool = False,
    ) -> Engine:
        """Plan and engine in one; arguments as `make_plan`. fp8: e4m3 operands in every GEMM (`ops.fp8`)."""
        pack = _registry.bind("pack_weight_fp8" if fp8 else "pack_weight", backend, torch.device(device).type)
        plan = make_plan(model, dtype=dtype, pack=pack, size=size, device=device, sibling=sibling)
        return Engine(plan, backend, fp8=fp8)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> tuple[Tensor, Saved]:
        """tokens (R, n, c·p_h·p_w) in the plan's dtype -> logits (R, K) float32 (float64), operators."""
        plan = self.plan
        rows = tokens.shape[0]
        x, squares, rstd_pre = self._embed(tokens)
        saved = []
        for layer in plan.layers:
            x, squares, operators = self._layer(layer, x, squares, rows)
            saved.append(operators)
        x = x.view(rows, -1, plan.width).to(statistics_dtype(plan.dtype)).requires_grad_()
        with torch.enable_grad(), freeze():
            logits = plan.tail(x)
        return logits.detach(), Saved(rows, rstd_pre, saved, x, logits)

    @torch.no_grad()
    def vjp(self, saved: Saved, cotangent: Tensor) -> Tensor:
        """Cotangent of the logits (R, K) -> cotangent of the tokens (R, n, c·p_h·p_w), the plan's dtype.

        May be called again with another cotangent of the same forward walk.
        """
        plan = self.plan
        (g,) = torch.autograd.grad(saved.tail_output, saved.tail_input, cotangent, retain_graph=True)
        g = g.to(plan.dtype).reshape(-1, plan.width)
        for layer, operators in zip(reversed(plan.layers), reversed(saved.layers), strict=True):
            g = self._layer_vjp(layer, operators, g, saved.rows)
        return self._embed_vjp(g, saved)

    # ---- patch embedding ----

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream (R·N, C), what is known of its squares, and the first norm's 1/σ where there is one."""
        plan = self.plan
        rows, patches, _ = tokens.shape
        embedded = self._linear(tokens.reshape(rows * patches, -1), plan.embed.weight, plan.embed.bias)
        embedded = embedded.view(rows, patches, -1)
        norm = plan.norm_pre
        squares = self._squares and norm is None
        assembled = self._assemble(embedded, plan.prefix, plan.position, squares=squares)
        x, sums = assembled if squares else (assembled, None)
        if norm is None:
            return x, sums, None
        # a real norm ahead of the blocks: the stream starts behind it, centred where the plan is
        x, rstd = self._normalize(x, norm.weight, norm.bias, norm.eps, centres=norm.centres, centred=plan.centred)
        return x, None, rstd

    def _embed_vjp(self, g: Tensor, saved: Saved) -> Tensor:
        plan = self.plan
        norm = plan.norm_pre
        if norm is not None and saved.rstd_pre is not None:
            g = self._normalize_vjp(g, norm.weight, saved.rstd_pre, centres=norm.centres, centred=plan.centred)
        g = g.view(saved.rows, plan.tokens, plan.width)[:, plan.prefix.shape[0] :]
        patches = g.reshape(-1, plan.width)
        return self._linear(patches, plan.embed.transposed).view(saved.rows, g.shape[1], -1)

    # ---- one block ----

    def _layer(
        self, layer: Layer, x: Tensor, squares: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor | None, SavedLayer]:
        """x (R·N, C) and what is known of its squares -> both after one block, (R·read, C) after a trimmed one."""
        rstd1 = self._row_rstd(x, layer.eps1, centred=layer.centred1, squares=squares)
        q, k, v = self._queries_keys_values(layer, x, rstd1, rows)
        out, attention = self._attention(q, k, v, layer.scale)
        x = self._read(layer, x, rows)
        x, squares = self._write(out.view(x.shape[0], -1), layer.proj, x)
        rstd2 = self._row_rstd(x, layer.eps2, centred=layer.centred2, squares=squares)
        hidden, gate = self._linear(x, layer.fc1.weight, layer.fc1.bias, row_scale=rstd2, activation=layer.activation)
        x, squares = self._write(hidden, layer.fc2, x)
        return x, squares, SavedLayer(rstd1, attention, rstd2, gate)

    def _write(self, y: Tensor, projection: Projection, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream x after y was projected into it, and its rows' partial sums of squares."""
        written = self._linear(y, projection.weight, projection.bias, residual=x, squares=self._squares)
        return written if self._squares else (written, None)

    def _queries_keys_values(self, layer: Layer, x: Tensor, rstd: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (R, Q, heads, D), k and v (R, N, heads, D): views of the projections, q- and k-norm applied."""
        shape = (rows, -1, layer.heads, layer.head_dim)
        if layer.qkv is not None:
            qkv = self._linear(x, layer.qkv.weight, layer.qkv.bias, row_scale=rstd)
            q, k, v = (t.unflatten(0, (rows, -1)).view(shape) for t in qkv.chunk(3, dim=-1))
        else:
            assert layer.query is not None and layer.key_value is not None
            read = self._read(layer, x, rows)
            rstd_read = self._read(layer, rstd, rows)
            q = self._linear(read, layer.query.weight, layer.query.bias, row_scale=rstd_read).view(shape)
            kv = self._linear(x, layer.key_value.weight, layer.key_value.bias, row_scale=rstd)
            k, v = (t.unflatten(0, (rows, -1)).view(shape) for t in kv.chunk(2, dim=-1))
        return self._head_norm(layer.q_norm, q), self._head_norm(layer.k_norm, k), v

    def _head_norm(self, norm: Norm | nn.Module | None, heads: Tensor) -> Tensor:
        """Queries or keys (R, tokens, heads, D) through their norm: frozen with P, so nothing of it is kept."""
        if norm is None:
            return heads
        if isinstance(norm, nn.Module):
            normed: Tensor = norm(heads)
            return normed
        return self._normalize(heads, norm.weight, norm.bias, norm.eps, centres=norm.centres)[0]

    def _read(self, layer: Layer, x: Tensor, rows: int) -> Tensor:
        """The tokens of x (R·N, ...) for which the block is computed to its end."""
        if layer.qkv is not None:
            return x
        return x.unflatten(0, (rows, -1))[:, : self.plan.read].flatten(0, 1).contiguous()

    def _layer_vjp(self, layer: Layer, saved: SavedLayer, g: Tensor, rows: int) -> Tensor:
        """Cotangent after the block -> before it, (R·N, C)."""
        d_hidden = self._linear(g, layer.fc2.transposed, row_scale=saved.rstd2, gate=saved.gate)
        g = self._linear(d_hidden, layer.fc1.transposed, residual=g)
        d_out = self._linear(g, layer.proj.transposed).view(rows, -1, layer.heads, layer.head_dim)
        d_v = self._attention_vjp(saved.attention, d_out).view(saved.rstd1.shape[0], -1)
        if layer.qkv is not None:
            return self._linear(d_v, layer.qkv.transposed, row_scale=saved.rstd1, residual=g)
        assert layer.key_value is not None
        whole = self._linear(d_v, layer.key_value.transposed, row_scale=saved.rstd1)
        whole.view(rows, -1, g.shape[1])[:, : self.plan.read] += g.view(rows, -1, g.shape[1])
        return whole
