"""The embedded model: a small trained ViT, and scenes in which the pixels of the labelled digit are known.

Neither needs a network or a GPU. `load_demo_model` imports PyTorch and timm; this module does not.
"""

from dave_fast.models.demo.model import CLASS_NAMES, load_demo_model
from dave_fast.models.demo.scenes import DemoScene, Scenes, demo_scene, draw_scenes

__all__ = ["CLASS_NAMES", "DemoScene", "Scenes", "demo_scene", "draw_scenes", "load_demo_model"]
