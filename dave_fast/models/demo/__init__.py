"""The embedded default: a small trained ViT and scenes whose class evidence is known to the pixel.

Neither needs a network or a GPU; PyTorch and timm are imported by load_demo_model, not here.
"""

from dave_fast.models.demo.model import CLASS_NAMES, load_demo_model
from dave_fast.models.demo.scenes import DemoScene, Scenes, demo_scene, draw_scenes

__all__ = ["CLASS_NAMES", "DemoScene", "Scenes", "demo_scene", "draw_scenes", "load_demo_model"]
