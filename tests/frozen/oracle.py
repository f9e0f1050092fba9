"""A second, independent implementation of the frozen gradient: timm's VisionTransformer, written out by hand.

Every sub-layer is the line of the table of frozen operators (DAVE, arXiv 2602.06613, Eq. 3-5), with `detach()` on the
operator: slow, plain, and without anything of dave_fast, so that it can be the truth for every route.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timm.layers import AttentionPoolLatent, GluMlp
from torch import Tensor, nn


def oracle_vjp(model: nn.Module, images: Tensor, target_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Output (B,K) and frozen gradient (B,C,H,W) of the scores target_fn(output) -> (B,)."""
    leaf = images.detach().clone().requires_grad_()
    output = oracle_forward(model, leaf)
    (gradient,) = torch.autograd.grad(target_fn(output).sum(), leaf)
    return output.detach(), gradient


def oracle_forward(model: nn.Module, images: Tensor, entered: list[Tensor] | None = None) -> Tensor:
    """The output (B,K), every operator detached; the tokens that enter each block (B,N,D) are added to `entered`."""
    x = norm(model.norm_pre, embed(model, images))
    for block in model.blocks:
        if entered is not None:
            entered.append(x)
        x = x + scaled(block.ls1, attention(block.attn, norm(block.norm1, x)))
        x = x + scaled(block.ls2, mlp(block.mlp, norm(block.norm2, x)))
    x = norm(model.norm, x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    return model.head(norm(model.fc_norm, pool(model, x)))


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Patches, prefix tokens, position embedding: (B, N, D). Linear."""
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    prefix = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [p.expand(len(images), -1, -1) for p in prefix if p is not None]
    if model.no_embed_class:
        return torch.cat([*tokens, patches + model.pos_embed], dim=1)
    return torch.cat([*tokens, patches], dim=1) + model.pos_embed


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm: w ⊙ (x − mean x)·r + b; RMSNorm: w ⊙ x·r; r frozen."""
    if isinstance(layer, nn.Identity):
        return x
    if "rms" in type(layer).__name__.lower():
        return x * (x.pow(2).mean(-1, keepdim=True) + layer.eps).rsqrt().detach() * layer.weight
    centred = x - x.mean(-1, keepdim=True)
    r = (x.var(-1, correction=0, keepdim=True) + layer.eps).rsqrt().detach()
    return centred * r * layer.weight + layer.bias


def scaled(scale: nn.Module, x: Tensor) -> Tensor:
    """LayerScale. Linear."""
    return x if isinstance(scale, nn.Identity) else x * scale.gamma


def heads(x: Tensor, n: int) -> Tensor:
    """(B, N, D) -> (B, n, N, D / n)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """P v per head with P frozen, heads joined: (B, N, D)."""
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1).detach()
    return (p @ v).transpose(1, 2).flatten(2)


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    """Self-attention, q and k normalised where the layer does."""
    q, k, v = (heads(part, layer.num_heads) for part in layer.qkv(x).chunk(3, dim=-1))
    return layer.proj(attend(norm(layer.q_norm, q), norm(layer.k_norm, k), v))


def gate(act: nn.Module, u: Tensor) -> Tensor:
    """act(u)/u in closed form."""
    name = type(act).__name__.lower()
    if "quickgelu" in name:
        return torch.sigmoid(1.702 * u)
    if "gelu" in name and ("tanh" in name or getattr(act, "approximate", "none") == "tanh"):
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) / 2
    if "gelu" in name:
        return (1 + torch.erf(u / math.sqrt(2))) / 2
    if "silu" in name:
        return torch.sigmoid(u)
    if "relu" in name:
        return (u > 0).to(u.dtype)
    raise NotImplementedError(name)


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """gate(u) ⊙ u, or act(a) ⊙ b, between two linear layers."""
    u = layer.fc1(x)
    if isinstance(layer, GluMlp):
        a, b = u.chunk(2, dim=-1)
        a, b = (b, a) if layer.gate_last else (a, b)
        return layer.fc2((gate(layer.act, a) * a).detach() * b)
    return layer.fc2(gate(layer.act, u).detach() * u)


def pool(model: nn.Module, x: Tensor) -> Tensor:
    """Class token, average, or attention of a learned query: (B, D)."""
    patches = x if model.pool_include_prefix else x[:, model.num_prefix_tokens :]
    if isinstance(model.attn_pool, AttentionPoolLatent):
        return attention_pool(model.attn_pool, patches)
    if model.global_pool == "avgmax":
        return (patches.mean(1) + patches.amax(1)) / 2
    return x[:, 0] if model.global_pool == "token" else patches.mean(1)


def attention_pool(layer: AttentionPoolLatent, x: Tensor) -> Tensor:
    """SigLIP's head: P v of a learned query, then an MLP with a residual."""
    q = heads(layer.q(layer.latent.expand(len(x), -1, -1)), layer.num_heads)
    k, v = (heads(part, layer.num_heads) for part in layer.kv(x).chunk(2, dim=-1))
    y = layer.proj(attend(q, k, v))
    y = y + mlp(layer.mlp, norm(layer.norm, y))
    return y[:, 0]
