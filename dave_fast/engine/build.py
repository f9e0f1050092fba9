"""Build an engine of a model: its plan, the packed weights and, for e4m3, the static scales."""

from __future__ import annotations

import torch

from dave_fast.engine.bound_ops import BoundOps
from dave_fast.engine.calibration import Forms, calibrate, choose_products
from dave_fast.engine.walks import Engine
from dave_fast.ops import _registry
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.reading import Reading
from dave_fast.plan.vit_plan import ViTPlan, make_plan


def build_engine(
    reading: Reading,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    sibling: ViTPlan | None = None,
    narrow: str | None = None,
) -> Engine:
    """Return the engine of a model that was read (`plan.families.read`).

    Args:
        reading: the model for images of one size.
        dtype: of weights and activations: float64, float32 or bfloat16.
        device: on which the engine runs.
        backend: a name of `ops._registry`, or "auto".
        sibling: a plan of the same model, dtype and device for another image size, whose weights are shared.
        narrow: "fp8" or "int8" where the blocks' GEMMs take operands of eight bits (`ops.fp8`, `ops.int8`).
    """
    kind = torch.device(device).type
    plain = _registry.bind("pack_weight", backend, kind)
    pack = plain if narrow is None else _registry.bind(f"pack_weight_{narrow}", backend, kind)
    both = narrow == "int8" and sibling is None
    form = _registry.choose("linear", backend, kind)
    # Triton's kernels, which tests run on a CPU too, keep the stream as narrow as the activations
    wide = kind == "cpu" and narrow != "fp8" and form != "triton"
    if both:
        # what stays in bfloat16 must not depend on the batch either, as it would in oneDNN's tiles
        among = _registry.bind("pack_weight_among_int8", backend, kind)
        plain = among if form == _registry.choose("linear_int8", backend, kind) else plain
    plan = make_plan(
        reading,
        dtype=dtype,
        pack=(lambda matrix: Forms(pack(matrix), among(matrix.to(dtype)))) if both else pack,
        pack_embed=plain,
        # integers are made of numbers that have not been rounded before
        packed=torch.float32 if narrow == "int8" else dtype,
        # a CPU's products are bound by arithmetic, so that a wider stream costs them nothing
        stream=statistics_dtype(dtype) if wide else dtype,
        device=device,
        sibling=sibling,
    )
    if both:
        plan = choose_products(plan, BoundOps(backend, plan.device, narrow=narrow))
    # calibration uses PyTorch's own forms, so that no kernel is compiled for it
    scales = calibrate(Engine(plan, "torch", narrow=narrow)) if narrow == "fp8" else None
    return Engine(plan, backend, narrow=narrow, scales=scales)
