"""Tiny models with random weights, for which all routes must give the same attributions.

`ENGINE` are variants of timm's families that the engine is expected to have a plan for, `FROZEN_ONLY` what goes
through the frozen route; both map a readable id to a `Variant`.

A new activation, say X: a variant `_vit(act_layer=...)` in `PLAIN` with its closed form in `gate` of
`tests/frozen/oracle.py`, or in `ENGINE` without one. A new family or block: a variant in `ENGINE` (the engine against
the frozen route), or in `FROZEN_ONLY` where the engine has no plan for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

CLASSES = 7


@dataclass(frozen=True)
class Variant:
    """A recipe of a model: `build` makes it in evaluation mode, `images` makes inputs of its size."""

    make: Callable[[], nn.Module]
    size: tuple[int, int] = (32, 32)
    at: Callable[[tuple[int, int]], Variant] | None = None

    def resized(self) -> Variant:
        """Return the same recipe for images of 1.5 × 2 times the size; whole patches where a patch is half of it."""
        assert self.at is not None
        return self.at((3 * self.size[0] // 2, 2 * self.size[1]))

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Return the model with random weights; the global generator is not changed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            randomise(model)
        return model.eval().to(dtype)

    def images(self, n: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Return images (n, 3, H, W) of normal deviates."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 3, *self.size, generator=generator, dtype=torch.float64).to(dtype)


def randomise(model: nn.Module, gain: float = 1.3) -> None:
    """Draw vectors away from 0 and 1, and matrices so large that attention and gates are far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            is_scale = parameter.ndim == 1 and name.endswith(("weight", "gamma", "gamma_1", "gamma_2"))
            if is_scale:
                parameter.copy_(0.8 + 0.3 * noise)
            elif parameter.ndim <= 1:
                parameter.copy_(0.3 * noise)
            elif name.endswith(
                ("_token", "_tokens", "pos_embed", "latent", "pos_embedding", "_embeddings", "_table", "probe")
            ):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape))
            elif buffer_name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape))


def _timm(name: str, size: tuple[int, int] = (32, 32), **changes: Any) -> Variant:
    settings = {"img_size": size, "num_classes": CLASSES, **changes}
    return Variant(partial(timm.create_model, name, **settings), size, lambda other: _timm(name, other, **changes))


def _vit(name: str = "vit_tiny_patch16_224", size: tuple[int, int] = (32, 32), **changes: Any) -> Variant:
    return _timm(name, size, **{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, **changes})


def _eva02(size: tuple[int, int] = (28, 28), name: str = "eva02_tiny_patch14_224", **changes: Any) -> Variant:
    return _timm(name, size, **{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14, **changes})


def _eva(name: str, **changes: Any) -> Variant:
    return _timm(name, **{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, **changes})


_DINO = "vit_small_patch14_dinov2"
_CLIP = "vit_base_patch16_clip_quickgelu_224"

_SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
_RELPOS = "vit_relpos_small_patch16_224"

# the models that tests/frozen/oracle.py implements
PLAIN: dict[str, Variant] = {
    "vit": _vit(),
    "vit-3-blocks-48": _vit(embed_dim=48, depth=3, num_heads=3),
    "vit-patch16": _vit(patch_size=16, size=(64, 64)),
    "vit-rectangle": _vit(size=(32, 48)),
    "vit-features": _vit(num_classes=0),
    "vit-no-qkv-bias": _vit(qkv_bias=False),
    "vit-max-pool": _vit(global_pool="avgmax"),
    "vit-average": _vit(class_token=False, global_pool="avg", fc_norm=True),
    "vit-average-all-tokens": _vit(global_pool="avg", pool_include_prefix=True, fc_norm=False),
    "vit-no-final-norm": _vit(final_norm=False),
    "vit-qk-norm": _vit(qk_norm=True),
    "vit-tanh-gelu": _vit(act_layer="gelu_tanh"),
    "vit-silu": _vit(act_layer="silu"),
    "vit-relu": _vit(act_layer="relu"),
    "vit-rms-norm": _vit(norm_layer="rmsnorm"),
    "vit-glu": _vit(mlp_layer=partial(GluMlp, act_layer=nn.SiLU, gate_last=False)),
    "vit-registers": _vit(reg_tokens=4, no_embed_class=True),
    "deit-distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit3": _vit("deit3_small_patch16_224", init_values=0.5),
    "deit3-no-qkv-bias": _vit("deit3_small_patch16_224", init_values=0.5, qkv_bias=False),
    "dinov2": _vit(_DINO, (28, 42), patch_size=14, init_values=0.5),
    "dinov2-registers": _vit(_DINO.replace("dinov2", "reg4_dinov2"), (28, 28), patch_size=14, init_values=0.5),
    "dinov2-giant-swiglu": _vit("vit_giant_patch14_dinov2", (28, 28), patch_size=14, init_values=0.5),
    "siglip": _vit("vit_base_patch16_siglip_224"),
    "clip": _vit(_CLIP),
}

ENGINE: dict[str, Variant] = PLAIN | {
    "vit-patch-norm": _vit("aimv2_large_patch14_224", (28, 28), patch_size=14),
    "vit-patch-norm-centred": _vit(embed_norm_layer="layernorm"),
    "vit-post-norm": _vit(block_fn=ResPostBlock, init_values=0.5),
    "vit-post-norm-average": _vit(block_fn=ResPostBlock, class_token=False, global_pool="avg", norm_layer="rmsnorm"),
    "vit-parallel": _vit(block_fn=ParallelScalingBlock, init_values=0.5, qk_norm=True),
    "vit-parallel-fused": _vit(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True), qkv_bias=False),
    "vit-parallel-average": _vit(block_fn=ParallelScalingBlock, global_pool="avg", norm_layer="rmsnorm"),
    "vit-parallel-things": _vit(block_fn=ParallelThingsBlock, init_values=0.5),
    "vit-swiglu": _vit(mlp_layer=SwiGLU),
    "vit-scale-norms": _vit(scale_attn_norm=True, scale_mlp_norm=True),
    "vit-scale-norms-swiglu": _vit(scale_attn_norm=True, scale_mlp_norm=True, mlp_layer=SwiGLU, norm_layer="rmsnorm"),
    "eva02": _eva02(),
    "eva02-inner-norms": _eva02(scale_mlp=True, swiglu_mlp=True, qkv_fused=False, scale_attn_inner=True),
    "eva02-mlp-norm": _eva02(scale_mlp=True, swiglu_mlp=False, global_pool="token"),
    "eva-post-norm": _eva02(use_post_norm=True, scale_mlp=True),
    "eva-giant": _eva("eva_giant_patch14_224"),
    "eva-separate-bias": _eva(
        "eva_giant_patch14_224", init_values=0.5, global_pool="token", attn_only_layer_scale=True
    ),
    "dinov3": _eva("vit_small_patch16_dinov3"),
    "dinov3-untied-bias-token": _eva("vit_small_patch16_dinov3_qkvb", global_pool="token"),
    "dinov3-plus": _eva("vit_small_plus_patch16_dinov3"),
    "perception-encoder": _eva("vit_pe_core_tiny_patch16_384"),
    "perception-encoder-spatial": _eva("vit_pe_spatial_tiny_patch16_512"),
    "rope": _eva("vit_small_patch16_rope_224"),
    "rope-mixed": _eva("vit_small_patch16_rope_mixed_224"),
    "rope-mixed-positions": _eva("vit_small_patch16_rope_mixed_ape_224"),
    "rope-registers": _eva("vit_medium_patch16_rope_reg1_gap_256"),
    "rope-mrope": _eva("vit_medium_patch16_rope_reg1_gap_256", rope_type="mrope", rope_mrope_section=(2, 3, 3)),
    "rope-qk-norm": _eva("vit_small_patch16_rope_224", qk_norm=True, norm_layer=partial(nn.RMSNorm, eps=1e-6)),
    "rope-shared-heads": _eva("vit_base_patch16_sapiens2", num_heads=4, num_kv_heads=(2, 4)),
    "beit": _timm("beit_base_patch16_224", **_SMALL, init_values=0.5),
    "beit-shared-bias": _timm(
        "beit_base_patch16_224", **_SMALL, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, global_pool="token"
    ),
    "beit-swiglu": _timm("beitv2_base_patch16_224", **_SMALL, swiglu_mlp=True, scale_mlp=True, use_rel_pos_bias=False),
    "relative-position": _timm(_RELPOS, **_SMALL, init_values=0.5),
    "relative-position-table": _timm("vit_relpos_base_patch32_plus_rpn_256", **_SMALL, rel_pos_type="bias"),
    "relative-position-shared": _timm("vit_srelpos_small_patch16_224", **_SMALL),
    "relative-position-swin": _timm(_RELPOS, **_SMALL, rel_pos_type="mlp_swin", qk_norm=True),
    "relative-position-class": _timm("vit_relpos_base_patch16_cls_224", **_SMALL, rel_pos_type="bias"),
}

_SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}


def _torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)


class HandWritten(nn.Module):
    """A hand-written ViT, as many repositories have: separate q, k, v, two matrix products, its own norm and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.scale = nn.Parameter(torch.ones(32))
        self.head = nn.Linear(32, CLASSES)

    def normed(self, x: Tensor) -> Tensor:
        """A layer norm from its formula."""
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return x.view(*x.shape[:2], 2, 16).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        """Softmax attention from exponentials."""
        q, k, v = (self.split(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / 16**0.5
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.attend(self.normed(x))
        u = self.up(self.normed(x))
        x = x + self.down(0.5 * u * (1 + torch.erf(u / 2**0.5)))
        return self.head(self.normed(x).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoder or nn.MultiheadAttention, PyTorch's own composites, on patches."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.body = body
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        if isinstance(self.body, nn.MultiheadAttention):
            x = x if self.body.batch_first else x.transpose(0, 1)
            y, _ = self.body(x, x, x)
            return self.head((x + y).mean(1 if self.body.batch_first else 0))
        return self.head(self.body(x).mean(1))


def _encoder(**settings: Any) -> Variant:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, **settings)
        return Encoder(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    return Variant(make)


def _attention(batch_first: bool) -> Variant:
    return Variant(lambda: Encoder(nn.MultiheadAttention(32, 2, batch_first=batch_first)))


FROZEN_ONLY: dict[str, Variant] = {
    "vit-differential": _vit(block_fn=DiffParallelScalingBlock, init_values=0.5),
    "cait": _timm("cait_xxs24_224", **_SMALL),
    "xcit": _timm("xcit_nano_12_p8_224", embed_dim=32, depth=2, num_heads=2),
    "swin": _timm("swin_tiny_patch4_window7_224", **_SWIN),
    "swin2": _timm("swinv2_tiny_window8_256", **_SWIN),
    "hand-written": Variant(HandWritten),
    "encoder-post-norm-relu": _encoder(),
    "encoder-pre-norm-gelu": _encoder(activation="gelu", norm_first=True),
    "multihead-batch-first": _attention(True),
    "multihead-sequence-first": _attention(False),
}

# a model of another library, of which tests/libraries.py has more
TORCHVISION = Variant(_torchvision_vit)

ALL: dict[str, Variant] = {**ENGINE, **FROZEN_ONLY, "torchvision": TORCHVISION}
