"""What this machine's matrix products reach, and how many of them a sample takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dave_fast.ops.linear import linear_onednn, pack_onednn


@dataclass(frozen=True)
class Ceiling:
    """Matrix products of a block, ready to run: their arithmetic in GFLOP, and the call."""

    gigaflops: float
    run: Callable[[], None]


def ceiling(kind: str, rows: int, width: int, hidden: int, *, at_least: float = 60.0) -> Ceiling:
    """The four products of a block (qkv, proj, fc1, fc2) for `rows` tokens, repeated to `at_least` GFLOP.

    kind: "mkl-fp32" is `F.linear`; "packed-fp32" and "packed-bf16" are oneDNN with weights laid out beforehand (as
    they are where this CPU's oneDNN does not pack the type).
    """
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    calls = []
    gigaflops = 0.0
    for inner, outer in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        x = torch.randn(rows, inner).to(dtype)
        weight, bias = torch.randn(outer, inner).to(dtype), torch.randn(outer).to(dtype)
        calls.append(_linear(x, weight, bias) if kind == "mkl-fp32" else _packed(x, weight, bias))
        gigaflops += 2e-9 * rows * inner * outer
    times = max(1, round(at_least / gigaflops))

    def run() -> None:
        for _ in range(times):
            for call in calls:
                call()

    return Ceiling(gigaflops * times, run)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, weight, bias)


def _packed(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    packed = pack_onednn(weight)
    return lambda: linear_onednn(x, packed, bias)


def engine_gigaflops(model: Any) -> float:
    """Arithmetic of one sample by the engine: forward walk, frozen VJP walk, probabilities made twice.

    For timm's VisionTransformer read by its class token: the last block then makes only keys and values of all
    tokens. 60.0 for ViT-B/16 at 224 px; a multiply-add is 2.
    """
    width, patches = model.embed_dim, model.patch_embed.num_patches
    tokens, blocks = patches + model.num_prefix_tokens, len(model.blocks)
    hidden = model.blocks[0].mlp.fc1.out_features
    channels = model.patch_embed.proj.weight[0].numel()
    square, mlp, scores = tokens * width**2, tokens * width * hidden, tokens**2 * width
    # forward: qkv, proj, fc1, fc2; back: fc2, fc1, proj, the value third of qkv
    whole = (3 + 1 + 1 + 1) * square + 4 * mlp + 4 * scores
    last = (2 + 1) * square
    embed = 2 * patches * channels * width
    return 2e-9 * ((blocks - 1) * whole + last + embed)
