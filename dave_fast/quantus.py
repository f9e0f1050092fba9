"""DAVE as Quantus' `explain_func`: NumPy in, NumPy out. Quantus itself is not imported.

    metric(model, x_batch, y_batch, explain_func=dave_fast.quantus.explain, explain_func_kwargs={"n_samples": 50})

The explainer is made anew at every call, so that weights that Quantus randomises between calls cannot be missed. The
seed is fixed: metrics that compare two explanations then measure the difference of images, not of draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dave_fast.errors import InputError
from dave_fast.explain.explainer import DAVE


def explain(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray | int | None = None,
    *,
    n_samples: int = 50,
    seed: int = 0,
    smoothed: bool = False,
    device: str | torch.device | None = None,
    **settings: Any,
) -> np.ndarray:
    """Attributions (B, 1, H, W) float32 of images (B, C, H, W), normalised, for classes (B,).

    smoothed: False gives the signed sum over channels, True the map in [0, 1] behind DAVE's post-processing.
    device: Quantus says "cpu", "gpu" or a torch device. settings: keywords of `DAVE` (noise_alpha, precision ...).
    The mode of the model is as before afterwards. Raises InputError for images that are no such array.
    """
    inputs = np.asarray(inputs)
    if inputs.ndim != 4:
        raise InputError(f"inputs are {inputs.shape}; expected images (B, C, H, W), channels first.")
    images = torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32))
    classes = None if targets is None else torch.as_tensor(np.asarray(targets, dtype=np.int64))
    explainer = DAVE(model, device="cuda" if device == "gpu" else device, **settings)
    found = explainer.explain(images, classes, n_samples, seed)
    maps = found.maps if smoothed else found.raw.sum(1)
    return maps[:, None].cpu().numpy()
