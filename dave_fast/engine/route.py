"""The two routes to the effective transformation, behind one pair of walks.

`engine` is for models with a plan, `frozen` for every other module. Both take tokens (R, n, C·p_h·p_w) of their
`patch_size` and return cotangents of the same shape; for the frozen route the whole image is one token.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.engine.buckets import Cost, Kernel, flat_cost, full_rows, plan_gemms
from dave_fast.engine.build import build_engine
from dave_fast.engine.levels import Levels, Pulled, TokenGrid
from dave_fast.engine.memory import engine_row_bytes, plan_bytes, stream_bytes, weight_bytes
from dave_fast.engine.walks import Engine
from dave_fast.errors import InputError, ModelError, NonFiniteError, NotFrozenError
from dave_fast.frozen.blocks import BlockInput, Entered, NoBlocksError, evidence, find_blocks, watching
from dave_fast.frozen.mode import freeze, run_frozen
from dave_fast.frozen.proof import ReplayReport, check_copy, ensure_proved, prove_frozen
from dave_fast.given.isolation import class_name, form_of, isolated
from dave_fast.given.own_forward import own_errors
from dave_fast.models.fingerprint import Attribute, attributes, written
from dave_fast.ops.precision import DTYPES, NARROW, choose_precision
from dave_fast.plan import families
from dave_fast.plan.reading import ImageSizeError, Reading
from dave_fast.plan.vit_plan import ViTPlan

ROUTES = ("auto", "engine", "frozen")

# Values of the residual stream of a micro-batch on a CPU: enough for full GEMM tiles and few calls, few enough to stay
# in the caches; four rows of a ViT-B/16 at 224 px, eight of a ViT-S/16.
CPU_VALUES = 800 * 768
# the most rows, so that small models' maps sharpen in several steps where they are streamed
CPU_ROWS = 16
FROZEN_ROWS = 4


def check_route(route: str) -> None:
    """Raise InputError unless a route is one of `ROUTES`."""
    if route not in ROUTES:
        raise InputError(f"route is {route!r}; expected one of {', '.join(ROUTES)}")


@dataclass(eq=False)
class Route:
    """A pair of walks for one model, image size, precision and device.

    Attributes:
        name: "engine" or "frozen".
        forward: tokens (R, n, C·p_h·p_w), levels -> the output (R, ...), detached, and the operators.
        vjp: the operators and the cotangent of the output (R, ...) -> the cotangent of the tokens, evidence of blocks.
        find_blocks: returns the tokens that enter each block; raises NoBlocksError for a model that has no such blocks.
        patch_size: (p_h, p_w) of the tokens.
        dtype: of the tokens.
        weights: bytes of the weights.
        preferred_rows: rows of a full micro-batch where no GPU is known.
        plan: the model's, of the engine.
        model: the model as it is called, of the frozen route.
        row_bytes: bytes that a row of a micro-batch takes; 0 where they are not known.
        level_bytes: bytes that a row takes besides for each block at which evidence is told.
        row_cost: rows of a micro-batch -> its cost, in rows.
        full_rows: rows of a full micro-batch; None until they have been chosen.
        fitting_rows: rows that memory had room for when they were chosen.
        own_rows: sizes of buckets whose rows are the samples of one image.
        most_rows: largest micro-batch since memory ran out.
        written: attributes that the model's own forward writes, so that they may change between calls.
        agrees: whether its output has been compared with the model's own (`engine.agreement`).
    """

    name: str
    forward: Callable[[Tensor, Levels], tuple[Tensor, Any]]
    vjp: Callable[[Any, Tensor, Levels], Pulled]
    find_blocks: Callable[[], tuple[TokenGrid, ...]]
    patch_size: tuple[int, int]
    dtype: torch.dtype
    weights: int
    preferred_rows: int
    plan: ViTPlan | None = None
    model: nn.Module | None = None
    row_bytes: int = 0
    level_bytes: int = 0
    row_cost: Callable[[int], float] = flat_cost
    full_rows: int | None = None
    fitting_rows: int = 0
    own_rows: list[int] = field(default_factory=list)
    most_rows: int = sys.maxsize
    written: Collection[Attribute] = ()
    agrees: bool = False

    @cached_property
    def blocks(self) -> tuple[TokenGrid, ...]:
        """The tokens that enter each block; raises ModelError for a model that has no such blocks."""
        try:
            return self.find_blocks()
        except NoBlocksError as reason:
            raise ModelError(f"evidence at a block was asked for, but {reason}. Use depth='pixels'") from reason

    @property
    def capturable(self) -> bool:
        """Whether the walks never wait for the device, so that a CUDA graph can record them."""
        return self.plan is not None

    def rows_with(self, levels: Levels, rows: int) -> int:
        """Return the rows that take the memory of `rows` where evidence is told at these levels, at least one."""
        if not self.row_bytes:
            return rows
        return max(1, rows * self.row_bytes // (self.row_bytes + len(levels.blocks) * self.level_bytes))

    def best_rows(self, fitting: int) -> int:
        """Return the rows of a full micro-batch where memory has room for `fitting`."""
        if self.row_cost is flat_cost:
            return max(1, min(self.preferred_rows, fitting))
        return full_rows(self.row_cost, fitting)


def _engine_route(engine: Engine) -> Route:
    plan = engine.plan
    cost: Callable[[int], float] = flat_cost
    if plan.device.type == "cuda":
        processors = torch.cuda.get_device_properties(plan.device).multi_processor_count
        cost = Cost(plan.tokens, plan_gemms(plan), Kernel.of(plan.dtype.itemsize), processors)
    return Route(
        "engine",
        engine.forward,
        engine.vjp.pull,
        lambda: (TokenGrid(len(plan.prefix), *plan.grid),) * len(plan.whole_blocks),
        plan.patch_size,
        plan.dtype,
        weights=plan_bytes(plan),
        preferred_rows=min(CPU_ROWS, CPU_VALUES // (plan.tokens * plan.width)),
        plan=plan,
        row_bytes=engine_row_bytes(plan),
        level_bytes=stream_bytes(plan),
        row_cost=cost,
    )


def _frozen_route(model: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> Route:
    """Return autograd through a model's own forward pass with frozen operators; an image (H, W) is one token.

    The model is in evaluation mode, in the dtype and on the device of the tokens.
    """
    size, found = shape[1:], list[BlockInput]()

    def blocks() -> tuple[TokenGrid, ...]:
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found[:] = find_blocks(model, image.to(form_of(model)[0]))
        return tuple(TokenGrid(block.prefix, *block.grid) for block in found)

    def forward(tokens: Tensor, levels: Levels) -> tuple[Tensor, tuple[Tensor, Tensor, list[Entered]]]:
        wanted = [found[block] for block in levels.blocks]
        with torch.inference_mode(False), torch.enable_grad():
            leaf = tokens.detach().clone().requires_grad_()
            # a copy, so that a model that works in place does not change the leaf
            with watching(model, wanted) as entered:
                output = run_frozen(model, leaf.view(len(tokens), -1, *size).clone(), freeze(leaf))
        return output.detach(), (leaf, output, entered)

    def vjp(saved: tuple[Tensor, Tensor, list[Entered]], cotangent: Tensor, levels: Levels) -> Pulled:
        leaf, output, entered = saved
        ends = [*((leaf,) if levels.pixels else ()), *(each.edge for each in entered)]
        with own_errors(model, "backward pass"), freeze(leaf):
            gradients = list(torch.autograd.grad(output, ends, cotangent, retain_graph=True))
        tokens = gradients.pop(0) if levels.pixels else None
        told = zip(entered, gradients, levels.blocks, strict=True)
        return Pulled(tokens, tuple(evidence(each.tokens, slope, found[block]) for each, slope, block in told))

    weights = weight_bytes(model)
    return Route("frozen", forward, vjp, blocks, size, dtype, weights=weights, preferred_rows=FROZEN_ROWS, model=model)


def make_route(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    route: str,
    precision: str,
    device: torch.device,
    backend: str,
    sibling: Route | None = None,
    no_plan: str | None = None,
) -> Route:
    """Return the route of a model, and warn with the reason where "auto" takes the frozen one.

    Args:
        model: any module.
        shape: (C, H, W) of the images.
        route: one of ROUTES.
        precision: a name of `ops.precision.DTYPES`.
        device: of the walks.
        backend: a name of `ops._registry`, or "auto".
        sibling: this model's route for another image size, in the same precision and on the same device.
        no_plan: why the engine is not taken although the model can be read; None where nothing is known against it.

    Raises:
        InputError: the model does not take images of this shape.
        ModelError: route="engine" or a precision of eight bits is given and there is no plan, or the model has no
            attention.
        NotFrozenError: the proof of the frozen route, or of the engine's tail, fails.
    """
    dtype, narrow = DTYPES[precision], precision if precision in NARROW else None
    read = no_plan or _read(model, shape)
    if route != "frozen" and isinstance(read, Reading):
        plan = None if sibling is None else sibling.plan
        try:
            if plan is None:
                _prove_tail(model, read)
            with own_errors(model, "making of the plan"):
                engine = build_engine(read, dtype=dtype, device=device, backend=backend, sibling=plan, narrow=narrow)
            return _engine_route(engine)
        except NotFrozenError:
            raise
        except ModelError as error:
            read = str(error)
    if route == "engine":
        raise ModelError(f"route='engine' was asked for, but {read}. Use route='auto' or 'frozen'.")
    if narrow is not None:
        why = read if isinstance(read, str) else "route='frozen' was asked for"
        other = choose_precision(None, device)
        raise ModelError(f"precision={precision!r} needs the engine's GEMMs, but {why}. Use precision={other!r}.")
    report = _prove(model, shape)
    fitting = None if sibling is None else sibling.model
    made = isolated(model, dtype, device) if fitting is None else fitting
    before = attributes(made)
    check_copy(made, model, report)
    if route == "auto":
        # in the name of whoever called the explainer's method
        warnings.warn(f"the frozen route is taken (slower, more memory): {read}", stacklevel=5)
    return replace(_frozen_route(made, shape, dtype), written=written(made, before))


def _read(model: nn.Module, shape: tuple[int, int, int]) -> Reading | str:
    """Return the model read for images (C, H, W), or why the engine has no plan for it.

    Raises InputError for images that the model does not take.
    """
    try:
        with own_errors(model, "reading of the modules"):
            try:
                reading = families.read(model, shape[1:])
            except ImageSizeError:
                reading = families.read(model)
    except ModelError as reason:
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


def _prove(model: nn.Module, shape: tuple[int, int, int]) -> ReplayReport:
    """Run the affine replay, once a model and size; raise ModelError for a model without attention."""
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    report = ensure_proved(model, example.to(form_of(model)[0]))
    if not report.has_attention:
        raise ModelError(
            f"{class_name(model)} has no attention: DAVE explains transformers. Give a Vision Transformer, or use a "
            "gradient method for this model"
        )
    return report


def _prove_tail(model: nn.Module, reading: Reading) -> None:
    """Run the affine replay of what follows the last block: norm, pooling, and whatever stands in place of the head."""
    tokens = len(reading.position) + len(reading.prefix) if reading.read is None else reading.read
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, tokens, reading.position.shape[1], generator=generator, dtype=torch.float64)
    device = reading.position.device
    try:
        prove_frozen(reading.tail(torch.float64, device), example.to(device), name=class_name(model))
    except NonFiniteError:
        # every call checks its output and names the images
        return
