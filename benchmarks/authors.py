"""The DAVE authors' released code, run from a checkout of it (github.com/a-vrobell/DAVE).

It has no licence, so this repository contains none of it. It needs kornia and PyYAML.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

CONFIG = """
model: {{model_name: given, model_spec: given}}
augment: {{noise_alpha: {noise_alpha}, h_flip_prob: 0.5, affine_prob: 1.0,
          rotate_range: [-20.0, 20.0], translate_range: [0.1, 0.1], scale_range: [0.9, 1.1]}}
post_proc: {{gaussian: {{kernel_size: 11, sgm: 7.0}},
            bilateral: {{kernel_size: 5, sgm_spatial: 0.5, sgm_range: 0.05}}}}
"""


def load_explainer(authors: Path, model: nn.Module, noise_alpha: float, device: str = "cpu") -> Any:
    """Return their explainer with the settings of their configurations, on a given timm VisionTransformer.

    Args:
        authors: the checkout.
        model: a timm VisionTransformer; its weights stop requiring gradients, like those that their code loads.
        noise_alpha: of the method.
        device: to run on.
    """
    if str(authors) not in sys.path:
        sys.path.insert(0, str(authors))
    from core import config
    from core.explainer import DAVEExplainer
    from core.utils import detach_mode

    if not hasattr(detach_mode.make_detach_attn_forward, "without_is_causal"):
        detach_mode.make_detach_attn_forward = _without_is_causal(detach_mode.make_detach_attn_forward)
    model.requires_grad_(False)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(config, "load_timm_model", lambda _: (model, None)),
    ):
        path = Path(folder) / "given.yaml"
        path.write_text(CONFIG.format(noise_alpha=noise_alpha))
        return DAVEExplainer(path, torch.device(device))


def _without_is_causal(make: Callable[[], Callable[..., Tensor]]) -> Callable[[], Callable[..., Tensor]]:
    """Wrap their attention for timm releases that also pass is_causal, which it does not accept."""

    def make_forward() -> Callable[..., Tensor]:
        forward = make()

        def without(self: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            if is_causal:
                raise ValueError("the authors' attention knows no causal mask")
            return forward(self, x, attn_mask)

        return without

    make_forward.without_is_causal = True  # type: ignore[attr-defined]
    return make_forward
