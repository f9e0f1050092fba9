"""The embedded model: a small ViT that names the digit of a demo scene."""

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 128
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The names timm.data reads its preprocessing from.
PREPROCESSING = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "num_classes": len(CLASS_NAMES),
    "label_names": CLASS_NAMES,
}


def build_model() -> "torch.nn.Module":
    """The architecture with fresh weights: images (B, 3, 128, 128), normalised, to logits (B, 10)."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=16,
        embed_dim=144,
        depth=5,
        num_heads=3,
        mlp_ratio=4,
        qkv_bias=True,
        num_classes=len(CLASS_NAMES),
    )
    # A copy: timm and callers may edit the configuration of their own model.
    model.pretrained_cfg = dict(PREPROCESSING)
    return model


def load_demo_model() -> "torch.nn.Module":
    """The trained model in eval mode, float32 parameters on the CPU; a new one on every call."""
    from safetensors.torch import load_file

    model = build_model()
    with as_file(files(__package__).joinpath("weights.safetensors")) as path:
        # Stored in half precision to keep the package small; copying into the parameters widens them.
        model.load_state_dict(load_file(path))
    return model.eval()
