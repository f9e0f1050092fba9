"""DAVE written plainly with autograd, one sample after the other.

It is the baseline of the speed comparison, and a second implementation to agree with. It follows the authors'
description (arXiv 2602.06613) without optimisations: float32; attention probabilities in memory; LayerNorm's centring
as a D×D matrix product; operators held constant by `detach`, so that autograd still differentiates the whole qkv
projection and every token of the last block; warp, noise, model, pull-back and median as separate passes.

    python -m benchmarks.plain [--model vit_base_patch16_224]      counts its arithmetic

It supports timm's VisionTransformer with softmax attention, LayerNorm and a GELU MLP. N tokens · D width.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dave_fast.sampling import Draws, draw


def explain_plain(
    model: Any, image: Tensor, target: int, draws: Draws, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Explain one image.

    Args:
        model: a timm VisionTransformer.
        image: (C, H, W).
        target: a class.
        draws: S rows.
        noise: (S, C, H, W), to compare results at equal draws; None to draw it here.

    Returns:
        The raw attribution (C, H, W) and the map (H, W).
    """
    contributions = []
    for s in range(len(draws)):
        x = image[None].clone().requires_grad_()
        warped = warp(x, draws.matrices[s])
        epsilon = torch.randn_like(warped) if noise is None else noise[s : s + 1]
        perturbed = float(draws.signal[s]) * warped + float(draws.noise[s]) * epsilon
        score = logits(model, perturbed)[0, target]
        (gradient,) = torch.autograd.grad(score, x)
        contributions.append(gradient[0] * image)
    raw = masked_mean(torch.stack(contributions))
    return raw, smooth(raw)


def logits(model: Any, images: Tensor) -> Tensor:
    """Return logits (B, K) whose gradient is the effective transformation."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        x = x + block.ls1(attention(block.attn, layer_norm(block.norm1, x)))
        x = x + block.ls2(mlp(block.mlp, layer_norm(block.norm2, x)))
    x = model.pool(layer_norm(model.norm, x))
    return model.head(layer_norm(model.fc_norm, x))


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply LayerNorm to x (..., D) with 1/σ held constant and centring as a matrix product; an Identity returns x."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    centred = x @ centring(x.shape[-1], x.dtype, x.device)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    return centred * rstd.detach() * norm.weight + norm.bias


@cache
def centring(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the D×D matrix that subtracts a token's mean."""
    return torch.eye(width, dtype=dtype, device=device) - 1 / width


def attention(attn: Any, x: Tensor) -> Tensor:
    """Apply self-attention to x (B, N, D) with the probabilities held constant."""
    batch, tokens, width = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    probabilities = ((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
    mixed = (probabilities.detach() @ v).transpose(1, 2).reshape(batch, tokens, width)
    return attn.proj(mixed)


def mlp(module: Any, x: Tensor) -> Tensor:
    """Apply the MLP with the gate of its GELU, Φ(u), held constant."""
    u = module.fc1(x)
    gate = 0.5 * (1 + torch.erf(u * 0.5**0.5))
    return module.fc2(u * gate.detach())


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Warp images (B, C, H, W) by a destination → source pixel matrix (2, 3), bilinearly, with zeros outside."""
    height, width = images.shape[-2:]
    to_pixels = torch.tensor([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
    to_pixels = to_pixels.double()
    pixel_map = torch.cat([matrix.double(), torch.tensor([[0.0, 0.0, 1.0]]).double()])
    theta = (torch.linalg.inv(to_pixels) @ pixel_map @ to_pixels)[:2].to(images)
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def masked_mean(contributions: Tensor) -> Tensor:
    """Return the mean over S of the values within 2.5 scaled MADs of the lower median: (S, ...) to (...)."""
    deviations = (contributions - contributions.median(dim=0).values).abs()
    kept = deviations <= 2.5 * (1.4826 * deviations.median(dim=0).values + 1e-8)
    return (contributions * kept).sum(0) / kept.sum(0).clamp(min=1)


def smooth(raw: Tensor) -> Tensor:
    """Return the map (H, W) of raw (C, H, W): positive part, Gaussian blend, bilateral filter, ÷ maximum."""
    height, width = raw.shape[-2:]
    positive = raw.sum(0).relu()[None, None]
    blended = (positive + F.conv2d(positive, _gaussian(11, 7.0, raw)[None, None], padding=5)) / 2
    neighbours = F.unfold(blended, 5, padding=2)
    closeness = torch.exp(-((neighbours - blended.reshape(1, 1, -1)) ** 2) / (2 * 0.05**2))
    weights = closeness * _gaussian(5, 0.5, raw).reshape(1, -1, 1)
    filtered = ((weights * neighbours).sum(1) / weights.sum(1)).reshape(height, width)
    return filtered / filtered.max().clamp(min=torch.finfo(raw.dtype).tiny)


def _gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = torch.outer(window, window)
    return (window / window.sum()).to(like)


def gigaflops_a_sample(model: Any, image: Tensor) -> float:
    """Count the GFLOP of one sample by PyTorch's counter of matrix products (a multiply-add is 2)."""
    with FlopCounterMode(display=False) as counter:
        explain_plain(model, image, 0, draw(1, height=image.shape[1], width=image.shape[2]))
    return counter.get_total_flops() / 1e9


def main() -> None:
    """Print the arithmetic of a model."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm VisionTransformer; random weights")
    args = parser.parse_args()
    model = timm.create_model(args.model).eval().requires_grad_(False)
    image = torch.randn(model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    print(f"{args.model}: {gigaflops_a_sample(model, image):.1f} GFLOP a sample")


if __name__ == "__main__":
    main()
