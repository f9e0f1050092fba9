"""DAVE as the `explain_func` of Quantus, which itself is not imported: NumPy in, NumPy out.

    metric(model, x_batch, y_batch, explain_func=dave_fast.quantus.explain, explain_func_kwargs={"n_samples": 50})

Every call makes a new explainer, since Quantus randomises weights between calls. The seed is fixed, so that metrics
that compare two explanations measure the difference of the images and not of the draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import InputError
from dave_fast.explain.depth import PIXELS, Depth, check_one
from dave_fast.explain.explainer import DAVE


def explain(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray | int | None = None,
    *,
    n_samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    smoothed: bool = False,
    depth: Depth = PIXELS,
    device: str | torch.device | None = None,
    **settings: Any,
) -> np.ndarray:
    """Return attributions (B, 1, H, W) float32. The model's mode is restored.

    Args:
        model: the model.
        inputs: images (B, C, H, W), normalised.
        targets: classes (B,), or one for all images; None is the predicted class of each.
        n_samples: perturbed samples of an image.
        seed: equal seeds give equal maps.
        smoothed: True returns maps in [0, 1], after DAVE's post-processing; False the signed sum over channels.
        depth: one, see `dave_fast.DAVE.explain`.
        device: "cpu", "gpu" (as Quantus names it) or a torch device.
        settings: further keywords of `dave_fast.DAVE` (noise_alpha, precision ...).

    Raises:
        InputError: the images do not have four dimensions; depth is not one depth.
    """
    inputs = np.asarray(inputs)
    if inputs.ndim != 4:
        raise InputError(f"inputs are {inputs.shape}; expected images (B, C, H, W), channels first.")
    images = torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32))
    classes = None if targets is None else torch.as_tensor(np.asarray(targets, dtype=np.int64))
    explainer = DAVE(model, device="cuda" if device == "gpu" else device, **settings)
    found = explainer.explain(images, classes, n_samples, seed, depth=check_one(depth))
    maps = found.maps if smoothed else found.raw.sum(1)
    return maps[:, None].cpu().numpy()
