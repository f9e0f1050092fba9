"""DAVE in the calling convention of pytorch-grad-cam: a context manager, a list of callables, NumPy out.

    with dave_fast.gradcam.DAVE(model) as cam:
        maps = cam(input_tensor, targets=[ClassifierOutputTarget(3)])        # (B, H, W) float32 in [0, 1]

In place of target layers there is a depth: the pixels by default, or the tokens that enter a block; which of these lie
where is known, so that there is no reshape_transform. Any callable of one image's output can be a target, such as those
of pytorch_grad_cam.utils.model_targets, which need not be installed. The model gets no hooks, so that nothing has to be
released, and an exception inside the block is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import InputError
from dave_fast.explain import explainer
from dave_fast.explain.depth import PIXELS, Depth, check_one


class DAVE:
    """`dave_fast.DAVE` called as a class activation map.

    Args:
        model: any nn.Module, or a name.
        settings: keywords of `dave_fast.DAVE` (noise_alpha, precision, device ...).
    """

    def __init__(self, model: str | nn.Module, **settings: Any) -> None:
        self._explainer = explainer.DAVE(model, **settings)

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Tensor], Tensor]] | None = None,
        *,
        n_samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        depth: Depth = PIXELS,
    ) -> np.ndarray:
        """Return maps (B, H, W) float32 in [0, 1], at the images' resolution.

        Args:
            input_tensor: images (B, C, H, W), normalised.
            targets: a callable for each image, from the output (...) for that image to a scalar; None is the predicted
                class of each.
            n_samples: perturbed samples of an image.
            seed: equal seeds give equal maps.
            depth: one, see `dave_fast.DAVE.explain`.

        Raises:
            InputError: there are fewer or more targets than images, or they are not callables; depth is not one depth.
        """
        if targets is not None and (not isinstance(targets, Sequence) or not all(map(callable, targets))):
            raise InputError("targets must be a list of callables, one an image; classes go to dave_fast.DAVE.explain")
        target = None if targets is None else list(targets)
        found = self._explainer.explain(input_tensor, target, n_samples, seed, depth=check_one(depth))
        return found.maps.cpu().numpy()

    def __enter__(self) -> DAVE:
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing: exceptions are raised."""
