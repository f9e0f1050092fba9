"""How many rows a micro-batch on a GPU has: enough to fill the chip, few enough to keep a layer in its L2 cache.

    fill(m) = useful tiles / (waves · multiprocessors)      over the GEMMs of one block, weighted by their work

A GEMM of m·N token rows runs as whole waves of output tiles over the multiprocessors; what the last wave leaves idle
is lost. Within a block the stream and the hidden layer are written and read again by the next kernel, so they should
stay in L2. The full micro-batch m* is the number of rows with the best fill whose live tensors fit there. What is
left over at the end goes into m*/2, m*/4, … rows, padded: a bucket has a fixed shape, as a captured graph needs.

Everything here is arithmetic; nothing has been measured on a device. m rows · N tokens · O × I a GEMM's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dave_fast.plan import ViTPlan

# output tiles that the kernels choose between
TILES = ((128, 128), (128, 256))
# share of L2 that a block's live tensors may take beside the weights that stream through
L2_SHARE = 0.7
# fills that differ by less are equal, and the larger micro-batch reads the weights less often
SAME_FILL = 0.005
# what a micro-batch costs beside its rows, in rows: launches, and reading the weights once more
OVERHEAD = 1.0

Gemm = tuple[int, int]


@dataclass(frozen=True)
class Chip:
    """What of a GPU decides: its multiprocessors and the bytes of its L2 cache."""

    multiprocessors: int
    l2_bytes: int

    @staticmethod
    def of(device: torch.device) -> Chip:
        """Read off the device."""
        found = torch.cuda.get_device_properties(device)
        return Chip(found.multi_processor_count, found.L2_cache_size)


def plan_gemms(plan: ViTPlan) -> list[Gemm]:
    """(O, I) of the eight GEMMs of the first attention and the first MLP, forward and VJP."""
    width, attention, mlp = plan.width, plan.attention, plan.mlp
    inner = attention.heads * attention.head_dim
    wide = mlp.fc1.bias.shape[0]
    hidden = hidden_width(wide, mlp.activation)
    forward = [(3 * inner, width), (width, inner), (wide, width), (width, hidden)]
    return [*forward, (hidden, width), (width, hidden), (inner, width), (width, inner)]


def hidden_width(wide: int, activation: str) -> int:
    """M, what a gated MLP leaves of the `wide` outputs of its first layer."""
    return wide // 2 if "_glu" in activation else wide


def fill(rows: int, tokens: int, gemms: Sequence[Gemm], multiprocessors: int) -> float:
    """Share of the multiprocessors' time that is useful, in (0, 1], each GEMM with its better tile."""
    work = time = 0.0
    for outputs, inputs in gemms:
        shares = []
        for high, wide in TILES:
            waves = math.ceil(math.ceil(rows * tokens / high) * math.ceil(outputs / wide) / multiprocessors)
            shares.append(rows * tokens * outputs / (high * wide * waves * multiprocessors))
        work += outputs * inputs
        time += outputs * inputs / max(shares)
    return work / time


def live_bytes(tokens: int, width: int, wide: int, itemsize: int) -> int:
    """Bytes of one row that a block's kernels hand to each other: the stream and the hidden layer."""
    return tokens * (width + wide) * itemsize


def full_rows(tokens: int, gemms: Sequence[Gemm], itemsize: int, chip: Chip, most: int) -> int:
    """m*: the rows with the best fill among those that stay in L2, and no more than `most`."""
    outputs, width = gemms[2]
    fitting = int(L2_SHARE * chip.l2_bytes / live_bytes(tokens, width, outputs, itemsize))
    fills = {m: fill(m, tokens, gemms, chip.multiprocessors) for m in range(1, max(1, min(fitting, most)) + 1)}
    enough = max(fills.values()) - SAME_FILL
    return max(m for m, share in fills.items() if share >= enough)


def ladder(full: int) -> tuple[int, ...]:
    """Bucket sizes: m*, m*/2, m*/4, … 1."""
    return (full, *ladder(full // 2)) if full > 1 else (1,)


def next_bucket(remaining: int, full: int, cost: Callable[[int], float]) -> int:
    """The bucket for the next rows when `remaining` are left: m* while it fills, then what ends soonest.

    cost: of one micro-batch of so many rows, in any unit.
    """
    if remaining >= full:
        return full
    return _tail(remaining, ladder(full), cost)[1]


def _tail(remaining: int, sizes: tuple[int, ...], cost: Callable[[int], float]) -> tuple[float, int]:
    """(least cost, first bucket) for the rows that are left; of equal ways the one with fewer micro-batches."""

    @cache
    def best(left: int) -> tuple[float, int]:
        ways = []
        for size in sizes:
            rest = best(left - size)[0] if size < left else 0.0
            ways.append((cost(size) + rest, -size))
        least, size = min(ways)
        return least, -size

    return best(remaining)


def row_cost(rows: int, tokens: int, gemms: Sequence[Gemm], multiprocessors: int) -> float:
    """The cost of a micro-batch on a chip, in rows at full fill."""
    return rows / fill(rows, tokens, gemms, multiprocessors) + OVERHEAD
