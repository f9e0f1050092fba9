"""Tiny models of transformers, torchvision and open_clip with random weights, as `DAVE` takes them (see `variants`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from dave_fast.models.catalog import load_model
from tests.variants import CLASSES, Variant

# odd numbers of heads and of patches
_SMALL = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
_VIT = _SMALL | {"image_size": 24, "patch_size": 8}
_DINO = {name: value for name, value in _VIT.items() if name != "intermediate_size"} | {"layerscale_value": 0.5}
_TEXT = _SMALL | {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_TALL = {"image_size": [16, 40]}


def adapted(make: Callable[[], nn.Module], size: tuple[int, int]) -> Variant:
    """Return a variant of a library's model in its adapter."""
    return Variant(lambda: load_model(make())[0], size, lambda other: adapted(make, other))


def huggingface(kind: str, config: str, size: tuple[int, int] = (24, 24), **settings: Any) -> Variant:
    """Return a variant of a class of transformers."""

    def make() -> nn.Module:
        made: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings, num_labels=CLASSES))
        return made

    return adapted(make, size)


_towers = partial(huggingface, text_config=_TEXT)


def _beit(size: tuple[int, int] = (24, 24), **settings: Any) -> Variant:
    return huggingface("BeitForImageClassification", "BeitConfig", size, layer_scale_init_value=0.5, **settings)


HUGGINGFACE: dict[str, Variant] = {
    "vit": huggingface("ViTForImageClassification", "ViTConfig", **_VIT),
    "vit-rectangle": huggingface("ViTForImageClassification", "ViTConfig", (16, 40), **_VIT | _TALL),
    "vit-no-qkv-bias": huggingface("ViTForImageClassification", "ViTConfig", **_VIT, qkv_bias=False),
    "vit-tanh": huggingface("ViTForImageClassification", "ViTConfig", **_VIT, hidden_act="gelu_new"),
    "vit-features": huggingface("ViTModel", "ViTConfig", **_VIT),
    "deit": huggingface("DeiTForImageClassification", "DeiTConfig", **_VIT),
    "deit-teacher": huggingface("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_VIT),
    "deit-features": huggingface("DeiTModel", "DeiTConfig", **_VIT),
    "dinov2": huggingface("Dinov2ForImageClassification", "Dinov2Config", **_DINO, drop_path_rate=0.5),
    "dinov2-swiglu": huggingface("Dinov2ForImageClassification", "Dinov2Config", **_DINO, use_swiglu_ffn=True),
    "dinov2-features": huggingface("Dinov2Model", "Dinov2Config", **_DINO, qkv_bias=False),
    "dinov2-registers": huggingface(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **_DINO, num_register_tokens=3
    ),
    "dinov2-registers-features": huggingface(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_DINO, use_swiglu_ffn=True
    ),
    "dinov3": huggingface("DINOv3ViTModel", "DINOv3ViTConfig", **_VIT, num_register_tokens=3),
    "dinov3-gated": huggingface(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        (16, 40),
        **_VIT | _TALL,
        use_gated_mlp=True,
        hidden_act="silu",
        key_bias=True,
        mlp_bias=False,
        layerscale_value=0.5,
    ),
    "beit": _beit(**_VIT, use_relative_position_bias=True),
    "beit-shared": _beit(**_VIT, use_shared_relative_position_bias=True, use_mean_pooling=False),
    "beit-both": _beit(
        **_VIT,
        use_relative_position_bias=True,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True,
    ),
    "beit-rectangle": _beit((16, 40), **_VIT | _TALL, use_relative_position_bias=True),
    "beit-plain": huggingface("BeitModel", "BeitConfig", **_VIT, layer_scale_init_value=0.0),
    "clip": _towers("CLIPModel", "CLIPConfig", vision_config=_VIT, projection_dim=CLASSES),
    "clip-vision": huggingface("CLIPVisionModel", "CLIPVisionConfig", **_VIT),
    "clip-projection": huggingface("CLIPVisionModelWithProjection", "CLIPVisionConfig", **_VIT, projection_dim=CLASSES),
    "clip-classifier": _towers("CLIPForImageClassification", "CLIPConfig", vision_config=_VIT),
    "siglip": _towers("SiglipModel", "SiglipConfig", vision_config=_VIT),
    "siglip-vision": huggingface("SiglipVisionModel", "SiglipVisionConfig", **_VIT),
    "siglip-tokens": huggingface("SiglipVisionModel", "SiglipVisionConfig", **_VIT, vision_use_head=False),
    "siglip-classifier": _towers("SiglipForImageClassification", "SiglipConfig", vision_config=_VIT),
}
# images of other sizes are refused by the models themselves, or the positions of other grids than square ones
ONE_SIZE = {"vit-rectangle", "clip-classifier"}


def open_clip_model(**changes: Any) -> Variant:
    """Return a variant of an open_clip model, whose image tower has these settings."""
    import open_clip

    own = changes.pop("custom", False)
    tower = {"layers": 2, "width": 36, "head_width": 12, "patch_size": 8, "image_size": 24, "mlp_ratio": 1.5} | changes
    text = {"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    kind = open_clip.CustomTextCLIP if own or "timm_model_name" in changes else open_clip.CLIP
    size = tower["image_size"]
    return adapted(
        lambda: kind(CLASSES, tower, text, quick_gelu=not own), (size, size) if isinstance(size, int) else size
    )


def _torchvision(**changes: Any) -> Variant:
    settings = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 36, "mlp_dim": 40}
    return adapted(lambda: VisionTransformer(**settings, num_classes=CLASSES, **changes), (24, 24))


OTHERS: dict[str, Variant] = {
    "torchvision": _torchvision(dropout=0.5, attention_dropout=0.5),
    "torchvision-representation": _torchvision(representation_size=5),
    "open-clip": open_clip_model(),
    "open-clip-custom": open_clip_model(
        custom=True, image_size=(16, 40), ls_init_value=0.5, no_ln_pre=True, pool_type="avg"
    ),
    "open-clip-after-pool": open_clip_model(final_ln_after_pool=True, pool_type="avg"),
    "open-clip-tokens": open_clip_model(pool_type="none"),
    "open-clip-attention": open_clip_model(attentional_pool=True, attn_pooler_heads=CLASSES, attn_pooler_queries=3),
    "open-clip-timm": open_clip_model(timm_model_name="test_vit", image_size=160, timm_proj="mlp"),
    "open-clip-timm-siglip": open_clip_model(
        timm_model_name="test_vit3", image_size=160, timm_pool="", timm_proj="none"
    ),
}
LIBRARIES = HUGGINGFACE | OTHERS

_SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
_NO_READER = "none of another library's that are read"
# models without a plan, and words of the reason
FROZEN: dict[str, tuple[Variant, str]] = {
    "swin": (huggingface("SwinForImageClassification", "SwinConfig", (32, 32), **_SWIN, image_size=32), _NO_READER),
    "vit-msn": (huggingface("ViTMSNForImageClassification", "ViTMSNConfig", **_VIT), _NO_READER),
    "ijepa": (huggingface("IJepaForImageClassification", "IJepaConfig", **_VIT), _NO_READER),
    "data2vec": (huggingface("Data2VecVisionForImageClassification", "Data2VecVisionConfig", **_VIT), _NO_READER),
    "dinov3-backbone": (huggingface("DINOv3ViTBackbone", "DINOv3ViTConfig", **_VIT), _NO_READER),
    "vit-pixels": (huggingface("ViTForMaskedImageModeling", "ViTConfig", **_VIT, encoder_stride=8), _NO_READER),
    "torchvision-swin": (
        adapted(lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=CLASSES), (32, 32)),
        _NO_READER,
    ),
    "open-clip-custom-blocks": (open_clip_model(block_type="custom"), "is not open_clip's own ResidualAttentionBlock"),
    "open-clip-resnet": (
        open_clip_model(layers=[1, 1, 1, 1], width=8, head_width=64, image_size=32),
        "is not open_clip's own VisionTransformer",
    ),
    "open-clip-timm-swin": (
        open_clip_model(timm_model_name="xcit_nano_12_p16_224", image_size=32),
        "is none of timm's classes",
    ),
}
ONE_SIZE |= set(OTHERS)
