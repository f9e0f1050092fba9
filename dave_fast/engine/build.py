"""Build an engine of a model: its plan, the packed weights and, for e4m3, the static scales."""

from __future__ import annotations

import torch

from dave_fast.engine.calibration import calibrate
from dave_fast.engine.walks import Engine
from dave_fast.ops import _registry
from dave_fast.plan.reading import Reading
from dave_fast.plan.vit_plan import ViTPlan, make_plan


def build_engine(
    reading: Reading,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    sibling: ViTPlan | None = None,
    fp8: bool = False,
) -> Engine:
    """Return the engine of a model that was read (`plan.families.read`).

    Args:
        reading: the model for images of one size.
        dtype: of weights and activations: float64, float32 or bfloat16.
        device: on which the engine runs.
        backend: a name of `ops._registry`, or "auto".
        sibling: a plan of the same model, dtype and device for another image size, whose weights are shared.
        fp8: whether the blocks' GEMMs take e4m3 operands (`ops.fp8`).
    """
    plain = _registry.bind("pack_weight", backend, torch.device(device).type)
    pack = _registry.bind("pack_weight_fp8", backend, torch.device(device).type) if fp8 else plain
    plan = make_plan(reading, dtype=dtype, pack=pack, pack_embed=plain, device=device, sibling=sibling)
    # calibration uses PyTorch's own forms, so that no kernel is compiled for it
    scales = calibrate(Engine(plan, "torch", fp8=True)) if fp8 else None
    return Engine(plan, backend, fp8=fp8, scales=scales)
