"""The fastest implementation in PyTorch alone, which the engine is compared with.

The frozen VJP by autograd, with every exact optimisation that the library allows, each a switch:

    batched      the S samples of an image are rows of one batch; weights need no gradient; Φ(u) and 1/σ are detached
    compiled     torch.compile (on CUDA max-autotune without its own graphs); on CUDA a graph of forward and gradient
    split        v = n·Wᵥ apart from q, k = n.detach()·W: autograd then never multiplies by the weights of q and k
    sdpa         fused attention with q and k detached; its gradient of v is exactly Pᵀ dO. cuDNN's kernel is preferred
    flex         Pᵀ dO by FlexAttention's *forward*: with queries k, keys q, values dO and scores s − lse it returns
                 the normalised sum and its log-sum-exp l, and dV = e^l times the sum, without dQ and dK
    algebra      LayerNorms folded into the layers that read them, and the last block trimmed to the tokens that the
                 head reads, as in `plan`
    eight_bits   "fp8" or "int8": operands of e4m3 (torch._scaled_mm) or of integers (`peers_int8`) with a scale for
                 each row of x and of the weight; the rest in bf16, or fp32 where a CPU has no bf16

Models: timm's VisionTransformer with LayerNorm or RMSNorm, GELU, and class-token or average pooling.
R rows · n patches · N tokens · D width · A heads · d head dimension · Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from benchmarks.peers_int8 import Integers, packed
from dave_fast.errors import ModelError
from dave_fast.plan import families
from dave_fast.plan import reading as neutral
from dave_fast.plan.folding import fold_gamma
from dave_fast.plan.parts import read_norm
from dave_fast.plan.reading import NoPlanError, Reading
from dave_fast.plan.vit_plan import make_plan

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Tricks:
    """The switches above.

    Attributes:
        compiled: see above.
        split: see above.
        attention: "plain", "sdpa" or "flex".
        algebra: see above.
        eight_bits: see above.
    """

    compiled: bool = False
    split: bool = False
    attention: str = "plain"
    algebra: bool = False
    eight_bits: str | None = None


LADDER = {
    "P1 batched": Tricks(),
    "P2 compiled": Tricks(compiled=True),
    "P3 frozen SDPA, V apart": Tricks(compiled=True, split=True, attention="sdpa"),
    "P3 and folded, trimmed": Tricks(compiled=True, split=True, attention="sdpa", algebra=True),
    "P3 with dV by FlexAttention": Tricks(compiled=True, split=True, attention="flex", algebra=True),
    "P4 in eight bits": Tricks(compiled=True, split=True, attention="sdpa", algebra=True, eight_bits="fp8"),
    "P4 in integers": Tricks(compiled=True, split=True, attention="sdpa", algebra=True, eight_bits="int8"),
}


@dataclass(frozen=True)
class Norm:
    """A norm.

    Attributes:
        weight: None for a folded norm, of which only 1/σ is left.
        bias: None for a folded norm.
        eps: of the variance.
        centres: whether the rows' mean is removed.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centres: bool


@dataclass(frozen=True)
class Weights:
    """The weights of a product x Wᵀ + b.

    Attributes:
        matrix: W.
        bias: b, or None.
        eight: W and Wᵀ in e4m3, each with the scales of its rows; None without.
        integers: the numbers of W and Wᵀ in `peers_int8`; None without.
    """

    matrix: Tensor
    bias: Tensor | None
    eight: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    integers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Block:
    """The weights of a block; `read` is the number of leading tokens that leave it, None for all."""

    norm1: Norm
    query_key: Weights
    value: Weights
    fused: Weights
    proj: Weights
    norm2: Norm
    fc1: Weights
    fc2: Weights
    heads: int
    scale: float
    read: int | None


class Peer:
    """A model in PyTorch with these switches.

    Args:
        model: a timm VisionTransformer.
        tricks: the switches.
        dtype: of weights and activations.
        device: to run on.
        mode: of torch.compile, in place of the above.

    Raises:
        ModelError: the model is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        tricks: Tricks,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        mode: str | None = None,
    ) -> None:
        check(model)
        vit: Any = model
        self.tricks, self.dtype, self.device = tricks, dtype, torch.device(device)
        self.patch = tuple(vit.patch_embed.patch_size)
        self.embed, self.position, self.prefix, self.blocks = self._read(vit)
        self.final, self.head_norm = (self._norm(read_norm(norm)) for norm in (vit.norm, vit.fc_norm))
        self.head = Weights(self._cast(vit.head.weight), self._cast(vit.head.bias))
        self.pool = vit.global_pool
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor, Tensor]] = {}
        self._logits: Callable[[Tensor], Tensor] = self.logits
        if tricks.compiled:
            # every precision and micro-batch is compiled for itself, and counts against the limit of this one function
            torch._dynamo.config.recompile_limit = 256
            own = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else "default"
            self._logits = torch.compile(self.logits, mode=mode or own, dynamic=False, fullgraph=True)

    def cotangents(self, tokens: Tensor, target: int) -> Tensor:
        """Return the frozen gradient of the target's logit with respect to the patches, (R, n, C·p_h·p_w)."""
        if not (self.tricks.compiled and self.device.type == "cuda"):
            return self._gradient(tokens, target)
        key = (len(tokens), target)
        if key not in self._graphs:
            self._graphs[key] = self._captured(tokens, target)
        graph, given, made = self._graphs[key]
        given.copy_(tokens)
        graph.replay()
        return made.clone()

    def _gradient(self, tokens: Tensor, target: int) -> Tensor:
        leaf = tokens.detach().requires_grad_()
        with self._kernels():
            score = self._logits(leaf)[:, target].sum()
            (gradient,) = torch.autograd.grad(score, leaf)
        return gradient

    def _captured(self, tokens: Tensor, target: int) -> tuple[Any, Tensor, Tensor]:
        """Capture a graph of forward and gradient over static buffers, once everything is compiled and tuned."""
        given = tokens.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._gradient(given, target)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = self._gradient(given, target)
        return graph, given, made

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Prefer cuDNN's attention on CUDA; leave the choice to PyTorch on a CPU."""
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        with sdpa_kernel(order, set_priority=True) if self.device.type == "cuda" else nullcontext():
            yield

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits (R, K) whose gradient is the effective transformation."""
        x = self._product(tokens, self.embed) + self.position
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = self._block(block, x)
        if self.final is not None:
            x = normed(x, self.final)
        x = x[:, 0] if self.pool == "token" else x[:, self.prefix.shape[0] :].mean(1)
        if self.head_norm is not None:
            x = normed(x, self.head_norm)
        return F.linear(x, self.head.matrix, self.head.bias)

    def _block(self, block: Block, x: Tensor) -> Tensor:
        n = normed(x, block.norm1)
        q, k, v = self._heads(block, n)
        mixed = self._attend(q, k, v, block.scale).transpose(1, 2).flatten(2)
        x = x if block.read is None else x[:, : block.read]
        x = x + self._product(mixed, block.proj)
        u = self._product(normed(x, block.norm2), block.fc1)
        gate = 0.5 * (1 + torch.erf(u * 0.5**0.5))
        return x + self._product(u * gate.detach(), block.fc2)

    def _heads(self, block: Block, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (R, A, Q, d), k and v (R, A, N, d)."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (block.heads, -1)).transpose(1, 2)

        if not self.tricks.split:
            q, k, v = self._product(n, block.fused).chunk(3, dim=-1)
        else:
            q, k = self._product(n.detach(), block.query_key).chunk(2, dim=-1)
            v = self._product(n, block.value)
        return split(q if block.read is None else q[:, : block.read]), split(k), split(v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.tricks.attention == "flex":
            mixed: Tensor = FlexFrozen.apply(q.detach(), k.detach(), v, scale)
            return mixed
        if self.tricks.attention == "sdpa":
            return F.scaled_dot_product_attention(q.detach(), k.detach(), v, scale=scale)
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1).detach() @ v

    def _product(self, x: Tensor, weights: Weights) -> Tensor:
        if weights.eight is not None:
            made: Tensor = EightBits.apply(x.flatten(0, -2), weights.bias, *weights.eight)
        elif weights.integers is not None:
            made = Integers.apply(x.flatten(0, -2), weights.bias, *weights.integers)
        else:
            return F.linear(x, weights.matrix, weights.bias)
        return made.unflatten(0, x.shape[:-1])

    def _read(self, vit: Any) -> tuple[Weights, Tensor, Tensor, list[Block]]:
        if self.tricks.algebra:
            return self._read_plan(vit)
        reading = families.read(vit)
        blocks = []
        for attention, mlp in _pairs(reading):
            writers = (fold_gamma(attention.proj, attention.gamma), fold_gamma(mlp.fc2, mlp.gamma))
            proj, fc2 = ((w.weight, w.bias) for w in writers)
            blocks.append(
                self._made(
                    (torch.cat([p.weight for p in attention.qkv]), torch.cat([p.bias for p in attention.qkv])),
                    *(proj, (mlp.fc1[0].weight, mlp.fc1[0].bias), fc2),
                    norms=(self._norm(attention.norm), self._norm(mlp.norm)),
                    heads=attention.heads,
                    scale=attention.scale,
                )
            )
        embed, position, prefix = reading.projection.weight, reading.position, reading.prefix
        return Weights(self._cast(embed), None), self._cast(position), self._cast(prefix), blocks

    def _read_plan(self, vit: Any) -> tuple[Weights, Tensor, Tensor, list[Block]]:
        """Read the folded and trimmed weights in float64, and cast them once."""
        plan = make_plan(families.read(vit), dtype=torch.float64, pack=lambda matrix: matrix)
        blocks = []
        for first, second in zip(plan.steps[::2], plan.steps[1::2], strict=True):
            (attention,), (mlp,) = first.layers, second.layers
            *parts, proj = attention.projections
            blocks.append(
                self._made(
                    (torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
                    *((p.weight, p.bias) for p in (proj, *mlp.projections)),
                    norms=tuple(Norm(None, None, n.eps, not n.centred) for n in (attention.norm, mlp.norm)),
                    heads=attention.heads,
                    scale=attention.scale,
                    read=plan.read if first.trimmed else None,
                )
            )
        return Weights(self._cast(plan.embed.weight), None), self._cast(plan.position), self._cast(plan.prefix), blocks

    def _made(self, qkv: Any, proj: Any, fc1: Any, fc2: Any, *, norms: tuple[Norm, Norm], **settings: Any) -> Block:
        matrix, bias = qkv
        two = 2 * matrix.shape[0] // 3
        return Block(
            norm1=norms[0],
            query_key=self._weights(matrix[:two], bias[:two]),
            value=self._weights(matrix[two:], bias[two:]),
            fused=self._weights(matrix, bias),
            proj=self._weights(*proj),
            norm2=norms[1],
            fc1=self._weights(*fc1),
            fc2=self._weights(*fc2),
            **{"read": None, **settings},
        )

    def _weights(self, matrix: Tensor, bias: Tensor) -> Weights:
        made = Weights(self._cast(matrix), self._cast(bias))
        if self.tricks.eight_bits is None:
            return made
        forward, back = (m.detach().float().to(self.device) for m in (matrix, matrix.T.contiguous()))
        if self.tricks.eight_bits == "int8":
            return replace(made, integers=(packed(forward), packed(back)))
        return replace(made, eight=(*quantised(forward), *quantised(back)))

    def _norm(self, norm: neutral.Norm | None) -> Norm | None:
        return None if norm is None else Norm(self._cast(norm.weight), self._cast(norm.bias), norm.eps, norm.centres)

    def _cast(self, t: Tensor) -> Tensor:
        return t.detach().to(device=self.device, dtype=self.dtype).contiguous()


def check(model: Any) -> None:
    """Raise ModelError for a model that the peers do not support."""
    try:
        reading = families.read(model)
        pairs = _pairs(reading)
        if any(m.activation != "gelu" or a.q_norm is not None or a.k_norm is not None for a, m in pairs):
            raise NoPlanError("its activation is no exact GELU, or it normalises q and k")
        if reading.norm_pre is not None or reading.patch_norm is not None or model.global_pool not in ("token", "avg"):
            raise NoPlanError("it normalises before the first block, or pools by attention")
        if type(model.head) is not nn.Linear or hasattr(model, "head_dist"):
            raise NoPlanError("its head is not one linear layer")
    except NoPlanError as reason:
        raise ModelError(f"the PyTorch peers have no form of this model: {reason}") from None


def _pairs(reading: Reading) -> list[tuple[neutral.Attention, neutral.Mlp]]:
    """Return attention and MLP of each block; raise NoPlanError if a block has another form."""
    pairs = []
    for block in reading.blocks:
        (attention, *beside), *rest = block
        if beside or len(rest) != 1 or len(rest[0]) != 1 or not isinstance(rest[0][0], neutral.Mlp):
            raise NoPlanError("its blocks are no attention with an MLP behind it")
        mlp = rest[0][0]
        assert isinstance(attention, neutral.Attention)
        if any(b.norm is None or b.inner is not None or b.post is not None for b in (attention, mlp)):
            raise NoPlanError("its norms stand elsewhere than ahead of attention and MLP")
        if attention.rotary is not None or attention.bias is not None or attention.groups > 1:
            raise NoPlanError("its attention has rotations, biases or shared heads")
        pairs.append((attention, mlp))
    return pairs


def normed(x: Tensor, norm: Norm) -> Tensor:
    """Apply a norm with 1/σ detached, statistics in float32 (float64 for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    if norm.centres:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps).detach()
    if norm.weight is not None and norm.bias is not None:
        y = y * norm.weight + norm.bias
    return y.to(x.dtype)


class FlexFrozen(torch.autograd.Function):
    """softmax(scale·q kᵀ) v with the probabilities frozen; dV = Pᵀ dO by FlexAttention's forward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return the attention's output."""
        out, aux = flex_attention(q, k, v.detach(), scale=scale, return_aux=AuxRequest(lse=True))
        ctx.save_for_backward(q, k, aux.lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, Tensor, None]:
        """Return the gradient of v."""
        q, k, lse = ctx.saved_tensors

        def minus_lse(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - lse[b, h, j]

        settings = {"scale": ctx.scale, "return_aux": AuxRequest(lse=True)}
        mean, aux = flex_attention(k, q, d_out, score_mod=minus_lse, **settings)
        return None, None, (mean * aux.lse.exp()[..., None]).to(d_out.dtype), None


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows (tokens, inner) to e4m3, each by its largest value; return codes and float32 scales (tokens, 1)."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (rows / scale).to(torch.float8_e4m3fn), scale


class EightBits(torch.autograd.Function):
    """The product x Wᵀ + b and its gradient g W, both with e4m3 operands and float32 sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, scale: Tensor, back: Tensor, back_scale: Tensor
    ) -> Tensor:
        """Return x Wᵀ + b."""
        ctx.save_for_backward(back, back_scale)
        return _eight_bit_product(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient of x."""
        return _eight_bit_product(g, *ctx.saved_tensors, None), None, None, None, None, None


def _eight_bit_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, row_scale = quantised(x)
    return torch._scaled_mm(
        *(rows, weight.T),
        scale_a=row_scale,
        scale_b=scale.T,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
