"""Build an engine of a model: its plan, the packed weights and, for e4m3, the static scales."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.calibration import calibrate, coarse_products
from dave_fast.engine.walks import Engine
from dave_fast.ops import _registry
from dave_fast.ops.linear import pack_panels
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.folding import Pack
from dave_fast.plan.reading import Reading
from dave_fast.plan.vit_plan import ViTPlan, make_plan

logger = logging.getLogger("dave_fast")


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
    form = _registry.choose("linear", backend, kind)
    settings: dict[str, Any] = {"dtype": dtype, "device": device, "sibling": sibling}
    # a CPU's products are bound by arithmetic, so that a wider stream costs them nothing; Triton's kernels, which tests
    # run on a CPU too, keep it as narrow as the activations
    if kind == "cpu" and narrow != "fp8" and form != "triton":
        settings["stream"] = statistics_dtype(dtype)
    if narrow == "int8":
        plan = _integer_plan(reading, plain, backend, kind, settings)
        return Engine(plan, backend, narrow=narrow)
    pack = plain if narrow is None else _registry.bind(f"pack_weight_{narrow}", backend, kind)
    plan = make_plan(reading, pack=pack, pack_embed=plain, **settings)
    # calibration uses PyTorch's own forms, so that no kernel is compiled for it
    scales = calibrate(Engine(plan, "torch", narrow=narrow)) if narrow == "fp8" else None
    return Engine(plan, backend, narrow=narrow, scales=scales)


def _integer_plan(reading: Reading, plain: Pack, backend: str, kind: str, settings: dict[str, Any]) -> ViTPlan:
    """Return a plan of eight-bit integers, with bfloat16 for the products that these are too coarse for.

    The plan is made again until no product is: what follows a coarse one is then judged by what it really gets.
    """
    pack = _registry.bind("pack_weight_int8", backend, kind)
    forms = [_registry.choose(op, backend, kind) for op in ("linear_int8", "linear")]
    # bfloat16 by our own products, since those of oneDNN's tiles depend on the batch
    among = (lambda matrix: pack_panels(matrix, "bf16")) if forms[0] == "native" else plain
    embed = among if forms[1] == "native" else plain
    wide: set[int] = set()
    while True:
        packed: list[Any] = []

        def pack_next(matrix: Tensor, packed: list[Any] = packed, wide: set[int] = wide) -> Any:
            packed.append(among(matrix.to(settings["dtype"])) if len(packed) in wide else pack(matrix))
            return packed[-1]

        # integers are made of numbers that have not been rounded before
        plan = make_plan(reading, pack=pack_next, pack_embed=embed, packed=torch.float32, **settings)
        found = coarse_products(Engine(plan, backend, narrow="int8")) if packed else []
        if not found:
            break
        numbers = {id(weight): number for number, weight in enumerate(packed)}
        wide.update(numbers[id(weight)] for weight in found)
    if wide:
        logger.info("%d of %d products stay in bfloat16: eight bits are too coarse for them", len(wide), len(packed))
    return plan
