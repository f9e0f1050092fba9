"""DAVE as pytorch-grad-cam's users call it: a context manager, a list of callables, NumPy out.

    with dave_fast.gradcam.DAVE(model) as cam:
        maps = cam(input_tensor, targets=[ClassifierOutputTarget(3)])        # (B, H, W) float32 in [0, 1]

No target layers and no reshape_transform: DAVE explains pixels. Any callable of one image's output serves as a target,
also those of pytorch_grad_cam.utils.model_targets, which need not be installed. Nothing is hooked into the model, so
nothing has to be released, and an exception inside the block is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.explain import explainer


class DAVE:
    """model: any nn.Module, or a name. settings: keywords of `dave_fast.DAVE` (noise_alpha, precision, device ...)."""

    def __init__(self, model: str | nn.Module, **settings: Any) -> None:
        self._explainer = explainer.DAVE(model, **settings)

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Tensor], Tensor]] | None = None,
        *,
        n_samples: int = 50,
        seed: int = 0,
    ) -> np.ndarray:
        """Maps (B, H, W) float32 in [0, 1], at the images' resolution.

        input_tensor: (B, C, H, W), normalised. targets: a callable an image, output of that image (...) -> scalar;
        None is the predicted class of each. Raises InputError for fewer or more targets than images.
        """
        if targets is not None and (not isinstance(targets, Sequence) or not all(map(callable, targets))):
            raise InputError("targets must be a list of callables, one an image; classes go to dave_fast.DAVE.explain")
        target = None if targets is None else list(targets)
        return self._explainer.explain(input_tensor, target, n_samples, seed).maps.cpu().numpy()

    def __enter__(self) -> DAVE:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held, and no exception swallowed."""
