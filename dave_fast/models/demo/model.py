"""The embedded model: a small ViT that classifies the digit of a demo scene."""

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from dave_fast.images import describe_preprocessing

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 128
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PREPROCESSING = {
    **describe_preprocessing((IMAGE_SIZE, IMAGE_SIZE), (0.5,) * 3, (0.5,) * 3, resize=IMAGE_SIZE),
    "num_classes": len(CLASS_NAMES),
    "label_names": CLASS_NAMES,
}


def build_model() -> "torch.nn.Module":
    """Build the model with random weights: images (B, 3, 128, 128), normalised, to logits (B, 10)."""
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
    # a copy, because timm and callers may edit the configuration of their own model
    model.pretrained_cfg = dict(PREPROCESSING)
    return model


def load_demo_model() -> "torch.nn.Module":
    """Load the trained model in evaluation mode, float32 parameters on the CPU; a new one on every call."""
    from safetensors.torch import load_file

    model = build_model()
    with as_file(files(__package__).joinpath("weights.safetensors")) as path:
        # stored in half precision to keep the package small; load_state_dict converts to float32
        model.load_state_dict(load_file(path))
    return model.eval()
