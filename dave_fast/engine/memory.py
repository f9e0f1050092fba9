"""The memory that an explanation takes, as a formula, which tests compare with the measured peak.

    peak = weights + rows·(row + blocks·stream) + pairs·storage + B·(1 + 2·targets·levels)·image + workspace

weights     the plan's, for both walks
row         of a micro-batch: the operators of all blocks at the end of the forward walk, the widest activations that
            are alive at once, tokens and contribution
stream      N·D values of a row that enter a block at which evidence is told
storage     S·C·H·W values for contributions of pixels and S·N for each block's evidence, for each (image, target) pair
            that is aggregated together
image       C·H·W values
workspace   copies that the PyTorch forms of the pixel ops make (C++ and CUDA make almost none), and the operand of
            some rows for each thread that C++'s float32 products take

The formula is linear in tokens, except for P, which a CPU keeps below 400 tokens. The user's own model is not included.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dave_fast.engine.buckets import hidden_width
from dave_fast.engine.free_memory import SHARE, megabytes
from dave_fast.errors import InputError
from dave_fast.ops.activation import GATES
from dave_fast.ops.attention import KEEP_PROBABILITIES
from dave_fast.ops.linear import BLOCK_ROWS, BLOCK_SUMS, NativeWeight
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.layers import MlpLayer

if TYPE_CHECKING:
    from dave_fast.plan.layers import Layer
    from dave_fast.plan.vit_plan import ViTPlan

logger = logging.getLogger("dave_fast")

# columns whose squares are summed together on a GPU, as PART of kernels/linear.py
SQUARES = 64
# P's rows are rounded up to whole vectors
PADDING = 15
# copies of each target's raw: the result of aggregation, and the returned one
RAW_COPIES = 2
# temporary copies that the PyTorch forms of the warps and of the mean make; values of a chunk of rows
PIXEL_COPIES, MEAN_COPIES, CHUNK = 12, 4, 1 << 22


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def plan_bytes(plan: ViTPlan) -> int:
    """Return the bytes of a plan: packed weights of both walks, biases, positions, other tables, the tail.

    On a CPU the tail's matrices are packed for both walks as well (`tail_forms`).
    """
    found = [plan.position, plan.prefix, *plan.tables()]
    for projection in plan.projections():
        found += [projection.bias, *_tensors(projection.weight), *_tensors(projection.transposed)]
    of_tail = weight_bytes(plan.tail) * (3 if plan.device.type == "cpu" else 1)
    return sum(t.numel() * t.element_size() for t in found) + of_tail


def _tensors(packed: object) -> list[Tensor]:
    """Return the tensors of a packed weight of any backend."""
    if isinstance(packed, Tensor):
        return [packed]
    parts = packed if isinstance(packed, list | tuple) else vars(packed).values()
    return [tensor for part in parts if isinstance(part, Tensor) for tensor in _tensors(part)]


def _layer_bytes(plan: ViTPlan, layer: Layer, entering: int, leaving: int) -> int:
    """Return the bytes of operators that a row saves of a layer: P, or q, k and two numbers a query, or the gate; 1/σ.

    Args:
        plan: whose layer it is.
        layer: the layer.
        entering: tokens ahead of the layer.
        leaving: tokens behind it.
    """
    item = plan.dtype.itemsize
    # where products sum squares, these sums are saved in place of 1/σ of the norm ahead
    ahead = math.ceil(plan.width / SQUARES) if plan.device.type == "cuda" else 1
    inside = sum(norm is not None for norm in (layer.inner, layer.post))
    norms = 4 * (ahead * entering * (layer.norm is not None) + leaving * inside)
    if isinstance(layer, MlpLayer):
        return leaving * hidden_width(layer.fc1.bias.shape[0], layer.activation) * item + norms
    if entering <= KEEP_PROBABILITIES:
        return layer.heads * leaving * (entering + PADDING) * item + norms
    # q and k are views of the product that holds v too, unless they were turned
    parts = 3 if layer.rotation is None else 2
    return parts * entering * layer.heads * layer.head_dim * item + layer.heads * leaving * 2 * 4 + norms


def _saved_bytes(plan: ViTPlan) -> int:
    """Return the bytes of operators that a row saves of all layers; only read tokens leave a trimmed step."""
    total, entering = 0, plan.tokens
    for step in plan.steps:
        leaving = plan.read if step.trimmed else entering
        total += sum(_layer_bytes(plan, layer, entering, leaving) for layer in step.layers)
        entering = leaving
    return total


def engine_row_bytes(plan: ViTPlan) -> int:
    """Return the bytes of one row of a micro-batch: saved operators, the widest activations of a block, tokens."""
    item = plan.dtype.itemsize
    saved = _saved_bytes(plan)
    fc1 = plan.mlp.fc1
    hidden = fc1.bias.shape[0]
    made = hidden_width(hidden, plan.mlp.activation)
    if not isinstance(fc1.weight, NativeWeight):
        # the input of an activation and its two results, which are half as wide in a gated MLP
        hidden += 2 * made
    else:
        # C++ writes the gate where it is saved; a product makes both results itself, except in a gated MLP
        hidden = made if plan.mlp.activation in GATES else hidden + made
    alive = plan.tokens * (2 * plan.width * (item + plan.stream.itemsize) + hidden * item)
    height, width = plan.image_size
    # tokens in and out, and the contribution before it is stored
    pixels = plan.channels * height * width * (2 * item + statistics_dtype(plan.dtype).itemsize)
    tail = 4 * plan.read * plan.width * 4
    return saved + alive + pixels + tail


def stream_bytes(plan: ViTPlan) -> int:
    """Return the bytes of the tokens of a row that enter a block, which are kept where its evidence is told."""
    return plan.tokens * plan.width * plan.stream.itemsize


def contribution_bytes(n_samples: int, image_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of the S contributions of one image (C, H, W)."""
    return n_samples * torch.Size(image_shape).numel() * dtype.itemsize


@dataclass(frozen=True)
class Storage:
    """The form in which the S samples of an (image, target) pair are stored until the robust mean.

    Attributes:
        tokens: whether cotangents of tokens are stored, which `ops.pull_back_mean` pulls back and aggregates in
            spatial tiles; otherwise contributions.
        dtype: of the S·C·H·W values.
        bytes: that they and the evidence of blocks take.
    """

    tokens: bool
    dtype: torch.dtype
    bytes: int


def workspace_bytes(rows: int, n_samples: int, image_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the most bytes that the PyTorch forms of the pixel ops take besides their results.

    Args:
        rows: of a micro-batch.
        n_samples: S.
        image_shape: (C, H, W).
        dtype: of the images.
    """
    pixels = torch.Size(image_shape).numel()
    warps = PIXEL_COPIES * min(rows * pixels, max(CHUNK, pixels))
    return max(warps, MEAN_COPIES * n_samples * pixels) * dtype.itemsize


def operand_bytes(plan: ViTPlan) -> int:
    """Return the most bytes that C++'s products take: for each thread the operand of a block of rows, and sums."""
    packed = [p for projection in plan.projections() for p in (projection.weight, projection.transposed)]
    widest = max((p.features[1] for p in packed if isinstance(p, NativeWeight)), default=0)
    return torch.get_num_threads() * BLOCK_ROWS * (widest + BLOCK_SUMS) * 4 if widest else 0


def explanation_bytes(
    plan: ViTPlan,
    n_images: int,
    n_samples: int,
    rows: int,
    *,
    storage: Storage,
    together: int,
    n_targets: int = 1,
    n_levels: int = 1,
    n_blocks: int = 0,
    pytorch: bool = False,
) -> int:
    """Return the peak of an explanation in bytes by the module's formula.

    Args:
        plan: the model.
        n_images: B.
        n_samples: S.
        rows: of a micro-batch.
        storage: form of the samples.
        together: (image, target) pairs that are aggregated together, as `fitting_pairs` gives them.
        n_targets: targets of each image.
        n_levels: levels of each target.
        n_blocks: those of them that are blocks.
        pytorch: whether the pixel ops are PyTorch's.
    """
    shape, dtype = (plan.channels, *plan.image_size), statistics_dtype(plan.dtype)
    workspace = operand_bytes(plan) + (workspace_bytes(rows, n_samples, shape, dtype) if pytorch else 0)
    images = n_images * (1 + RAW_COPIES * n_targets * n_levels) * torch.Size(shape).numel() * dtype.itemsize
    micro_batch = rows * (engine_row_bytes(plan) + n_blocks * stream_bytes(plan))
    return plan_bytes(plan) + micro_batch + together * storage.bytes + images + workspace


def fitting_pairs(storage: Storage, n_targets: int, free: int) -> tuple[int, list[slice]]:
    """Return how many images are aggregated together, and the groups of targets for which they are.

    Groups have almost equal sizes, and there is one where all targets fit. Images are walked forward once for each
    group. At least one (image, target) pair is always stored, even where it does not fit.

    Args:
        storage: form of the samples.
        n_targets: targets of each image.
        free: free memory in bytes.
    """
    pairs = max(1, int(SHARE * SHARE * free / storage.bytes))
    size = math.ceil(n_targets / math.ceil(n_targets / pairs))
    groups = [slice(start, min(start + size, n_targets)) for start in range(0, n_targets, size)]
    return max(1, pairs // size), groups


def choose_storage(
    n_samples: int,
    image_shape: tuple[int, ...],
    statistics: torch.dtype,
    engine: torch.dtype,
    free: int,
    *,
    pixels: bool = True,
    evidence: int = 0,
) -> Storage:
    """Return the first form of storage that leaves half of the memory free, or else the first that fits at all.

    It does not depend on the number of targets, and so neither do the bits of the result. A warning is logged where
    contributions are rounded.

    1. Contributions in the dtype of the statistics.
    2. Token cotangents in the engine's dtype, where that is narrower: the result has the same bits.
    3. Contributions rounded to bfloat16, where the statistics are float32 and the engine's dtype is not narrower: raw
       is then off by 2 % (L2; 0.018 to 0.023 for three scenes of the demo model, S = 50).

    Args:
        n_samples: S.
        image_shape: (C, H, W).
        statistics: dtype of the images and of the robust mean.
        engine: dtype of the walks.
        free: free memory in bytes.
        pixels: whether there are contributions of pixels.
        evidence: of each sample, tokens whose evidence is stored in the dtype of the statistics.

    Raises:
        InputError: no form fits.
    """
    forms = [(False, statistics)]
    if not pixels:
        image_shape = (0,)
    elif engine.itemsize < statistics.itemsize:
        forms.append((True, engine))
    elif statistics == torch.float32:
        forms.append((False, torch.bfloat16))
    more = contribution_bytes(n_samples, (evidence,), statistics)
    found = [Storage(*form, contribution_bytes(n_samples, image_shape, form[1]) + more) for form in forms]
    for limit in (SHARE * free, free):
        fitting = next((storage for storage in found if storage.bytes <= limit), None)
        if fitting is not None:
            if not fitting.tokens and fitting.dtype != statistics:
                logger.warning(
                    "contributions are kept in bfloat16: in %s they would take %s of the %s that are free",
                    *(statistics, megabytes(found[0].bytes), megabytes(free)),
                )
            return fitting
    raise InputError(
        f"{n_samples} samples of {image_shape} take {found[-1].bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
        "free; ask for fewer samples or smaller images"
    )
