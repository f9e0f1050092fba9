"""The two routes to the effective transformation, behind one pair of walks.

`engine` is for models with a plan, `frozen` for every other module. Both take tokens (R, n, C·p_h·p_w) of their
`patch_size` and return cotangents of the same shape; for the frozen route the whole image is one token.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dave_fast.engine.buckets import Cost, Kernel, flat_cost, full_rows, multiprocessors, plan_gemms
from dave_fast.engine.build import build_engine
from dave_fast.engine.memory import engine_row_bytes, plan_bytes, weight_bytes
from dave_fast.engine.walks import Engine
from dave_fast.errors import InputError, ModelError
from dave_fast.frozen.mode import freeze, run_frozen
from dave_fast.frozen.proof import ensure_proved
from dave_fast.ops.precision import DTYPES
from dave_fast.plan import families
from dave_fast.plan.reading import NoPlanError, Reading

ROUTES = ("auto", "engine", "frozen")
# tokens of a micro-batch on a CPU: enough for full GEMM tiles, few enough to stay in the caches
CPU_TOKENS = 800
FROZEN_ROWS = 4


class Route(Protocol):
    """A pair of walks for one model, image size, precision and device.

    Attributes:
        name: "engine" or "frozen".
        patch_size: (p_h, p_w) of the tokens.
        dtype: of the tokens.
        row_bytes: bytes that a row of a micro-batch takes; 0 where they are not known.
        weights: bytes of the weights.
        capturable: whether the walks never wait for the device, so that a CUDA graph can record them.
        full_rows: rows of a full micro-batch; None until they have been chosen.
        fitting_rows: rows that memory had room for when they were chosen.
        own_rows: sizes of buckets whose rows are the samples of one image.
        row_cost: rows of a micro-batch -> its cost, in rows.
        most_rows: largest micro-batch since memory ran out.
    """

    name: str
    patch_size: tuple[int, int]
    dtype: torch.dtype
    row_bytes: int
    weights: int
    capturable: bool
    full_rows: int | None
    fitting_rows: int
    own_rows: list[int]
    row_cost: Callable[[int], float]
    most_rows: int

    def best_rows(self, fitting: int) -> int:
        """Return the rows of a full micro-batch where memory has room for `fitting`."""
        ...

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the output (R, ...), detached, and the operators for tokens (R, n, C·p_h·p_w)."""
        ...

    def vjp(self, saved: Any, cotangent: Tensor) -> Tensor:
        """Return the cotangent of the tokens for that of the output (R, ...)."""
        ...


class EngineRoute:
    """The walks of an engine.

    Args:
        engine: of the model.
    """

    name = "engine"
    capturable = True

    def __init__(self, engine: Engine) -> None:
        plan = engine.plan
        self.plan = plan
        self.patch_size = plan.patch_size
        self.dtype = plan.dtype
        self.row_bytes = engine_row_bytes(plan)
        self.weights = plan_bytes(plan)
        self.full_rows: int | None = None
        self.fitting_rows = 0
        self.own_rows: list[int] = []
        self.most_rows = sys.maxsize
        self.row_cost: Callable[[int], float] = flat_cost
        if plan.device.type == "cuda":
            kernel, processors = Kernel.of(plan.dtype.itemsize), multiprocessors(plan.device)
            self.row_cost = Cost(plan.tokens, plan_gemms(plan), kernel, processors)
        self.forward = engine.forward
        self.vjp = engine.vjp

    def best_rows(self, fitting: int) -> int:
        """Return the rows of a full micro-batch, as `Route.best_rows`."""
        if self.row_cost is flat_cost:
            return max(1, min(64, CPU_TOKENS // self.plan.tokens, fitting))
        return full_rows(self.row_cost, fitting)


@dataclass
class _SavedGraph:
    leaf: Tensor
    output: Tensor


class FrozenRoute:
    """Autograd through the model's own forward pass with frozen operators.

    Args:
        model: in evaluation mode, in the dtype and on the device of the tokens.
        size: (H, W) of the images.
        dtype: of the tokens.
    """

    name = "frozen"
    capturable = False

    def __init__(self, model: nn.Module, size: tuple[int, int], dtype: torch.dtype) -> None:
        self.model = model
        self._size = size
        self.patch_size = size
        self.dtype = dtype
        # the memory that autograd takes is not known before it ran
        self.row_bytes = 0
        self.weights = weight_bytes(model)
        self.full_rows: int | None = None
        self.fitting_rows = 0
        self.own_rows: list[int] = []
        self.row_cost: Callable[[int], float] = flat_cost
        self.most_rows = sys.maxsize

    def best_rows(self, fitting: int) -> int:
        """Return the rows of a full micro-batch, as `Route.best_rows`."""
        return max(1, min(FROZEN_ROWS, fitting))

    def forward(self, tokens: Tensor) -> tuple[Tensor, _SavedGraph]:
        """Return the output (R, ...) and autograd's graph for images as tokens (R, 1, C·H·W)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = tokens.detach().clone().requires_grad_()
            with freeze():
                output = run_frozen(self.model, leaf.view(len(tokens), -1, *self._size))
        return output.detach(), _SavedGraph(leaf, output)

    def vjp(self, saved: _SavedGraph, cotangent: Tensor) -> Tensor:
        """Return the cotangent of the tokens, (R, 1, C·H·W), for that of the output."""
        with freeze():
            (gradient,) = torch.autograd.grad(saved.output, saved.leaf, cotangent, retain_graph=True)
        return gradient


def _as(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the model if it has this dtype and device and is in evaluation mode, else a copy that does."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    fits = all(t.dtype == dtype and t.device == device for t in tensors)
    if fits and not any(m.training for m in model.modules()):
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype).eval()


def make_route(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    route: str,
    precision: str,
    device: torch.device,
    backend: str,
    sibling: Route | None = None,
) -> tuple[Route, str | None]:
    """Return the route of a model and, where "auto" takes the frozen one, a line with the reason.

    Args:
        model: any module.
        shape: (C, H, W) of the images.
        route: one of ROUTES.
        precision: a name of `ops.precision.DTYPES`.
        device: of the walks.
        backend: a name of `ops._registry`, or "auto".
        sibling: this model's route for another image size, in the same precision and on the same device.

    Raises:
        InputError: the model does not take images of this shape.
        ModelError: route="engine" or precision="fp8" is given and there is no plan, or the model has no attention.
        NotFrozenError: the frozen route's proof fails.
    """
    dtype, fp8 = DTYPES[precision], precision == "fp8"
    read = _read(model, shape)
    if route != "frozen" and isinstance(read, Reading):
        plan = sibling.plan if isinstance(sibling, EngineRoute) else None
        engine = build_engine(read, dtype=dtype, device=device, backend=backend, sibling=plan, fp8=fp8)
        return EngineRoute(engine), None
    if route == "engine":
        raise ModelError(f"route='engine' was asked for, but {read}. Use route='auto' or 'frozen'.")
    if fp8:
        why = read if isinstance(read, str) else "route='frozen' was asked for"
        raise ModelError(f"precision='fp8' needs the engine's GEMMs, but {why}. Use precision='bf16'.")
    _prove(model, shape)
    line = None if route == "frozen" else f"the frozen route is taken (slower, more memory): {read}"
    fitting = sibling.model if isinstance(sibling, FrozenRoute) else _as(model, dtype, device)
    return FrozenRoute(fitting, shape[1:], dtype), line


def _read(model: nn.Module, shape: tuple[int, int, int]) -> Reading | str:
    """Return the model read for images (C, H, W), or why the engine has no plan for it.

    Raises InputError for images that the model does not take.
    """
    try:
        reading = families.read(model, shape[1:])
    except NoPlanError:
        # only the size may be at fault
        try:
            reading = families.read(model)
        except NoPlanError as reason:
            return str(reason)
    if shape[0] != reading.channels:
        raise InputError(
            f"images have {shape[0]} channels and the model takes {reading.channels}: "
            "preprocess them as the model expects"
        )
    if shape[1:] != reading.image_size:
        built_for = "×".join(map(str, reading.image_size))
        raise InputError(
            f"images are {shape[1]}×{shape[2]} and the model takes {built_for}: preprocess them as the model expects, "
            f"or build it with img_size={' or dynamic_img_size=True' if hasattr(model, 'dynamic_img_size') else ''}"
        )
    return reading


def _prove(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Run the affine replay, once a model; raise ModelError for a model without attention."""
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    parameter = next(model.parameters(), example)
    if not ensure_proved(model, example.to(parameter.device)).has_attention:
        raise ModelError(
            f"{type(model).__name__} has no attention: DAVE explains transformers. Give a Vision Transformer, or use a "
            "gradient method for this model"
        )
