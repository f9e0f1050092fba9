"""Build an engine of a model: its plan, the packed weights and, for e4m3, the static scales."""

from __future__ import annotations

import torch
from torch import nn

from dave_fast.engine.calibration import calibrate
from dave_fast.engine.walks import Engine
from dave_fast.ops import _registry
from dave_fast.ops.fp8 import Scales
from dave_fast.plan.vit_plan import ViTPlan, make_plan


def build_engine(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    sibling: ViTPlan | None = None,
    fp8: bool = False,
    scales: Scales | None = None,
) -> Engine:
    """Plan and engine in one; arguments as `make_plan`.

    fp8: e4m3 operands in the blocks' GEMMs (`ops.fp8`), with these static scales, by default those of `calibrate`.
    """
    plain = _registry.bind("pack_weight", backend, torch.device(device).type)
    pack = _registry.bind("pack_weight_fp8", backend, torch.device(device).type) if fp8 else plain
    plan = make_plan(model, dtype=dtype, pack=pack, pack_embed=plain, size=size, device=device, sibling=sibling)
    # by PyTorch's own forms: kernels need not be compiled for it
    if fp8 and scales is None:
        scales = calibrate(Engine(plan, "torch", fp8=True))
    return Engine(plan, backend, fp8=fp8, scales=scales)
