"""The number of rows of a micro-batch on a GPU, from a count of tiles and an estimated overhead.

    fill(m) = useful tiles / (waves · programs)      over the GEMMs of one block, weighted by their work
    cost(m) = m / fill(m) + overhead                 in rows at full fill

A GEMM of m·N token rows runs as whole waves of output tiles, one tile a program, as many programs at once as are
resident on the multiprocessors; programs that are idle in the last wave are lost. (A last wave with one program a
multiprocessor is counted as a whole one, though it may end sooner.) The overhead is the cost of a micro-batch that does
not depend on its rows: launches, the trimmed block, reading the weights once more.

The full micro-batch m* is the smallest with almost the least cost a row, since among equal ones the smallest keeps the
most in the L2 cache. The remaining rows at the end are padded to m*/2, m*/4, … rows: a captured graph needs a fixed
shape. The samples of one image may have a bucket of their own, of exactly that many rows.

Everything here is arithmetic; nothing has been measured on a device. m rows · N tokens · O × I a GEMM's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dave_fast.plan.vit_plan import ViTPlan

# costs a row that differ by less than this share count as equal
SAME_COST = 0.05
# no full micro-batch has more rows
MOST_ROWS = 512
# most buckets of an image size whose rows are the samples of one image; the first ones requested
OWN_BUCKETS = 4

Gemm = tuple[int, int]


@dataclass(frozen=True)
class Kernel:
    """The properties of a GEMM kernel that decide the number of rows.

    Attributes:
        tile: (rows, columns) of the output that a program makes; the first of `kernels.linear.configurations`.
        resident: programs on a multiprocessor at once.
        overhead: floating-point operations, a block, that take as long as a micro-batch's overhead.
    """

    tile: tuple[int, int]
    resident: int
    overhead: float

    @staticmethod
    def of(itemsize: int) -> Kernel:
        """Return the kernel for operands of this many bytes a number.

        The overhead is an estimate until it is measured: about 124 launches, PyTorch's own and the trimmed block of a
        ViT-B are 0.5 ms a micro-batch, so 42 µs for each of its 12 blocks. At 600 TFLOP/s (bfloat16) these are
        25 GFLOP, or five rows of 197 tokens; at 45 TFLOP/s (float32) 1.9 GFLOP. A register file of 256 KiB holds two
        programs of 128×128.
        """
        return Kernel((128, 128), 2, 25e9) if itemsize <= 2 else Kernel((64, 64), 2, 1.9e9)


@dataclass(frozen=True)
class Cost:
    """The cost of a micro-batch of one model and image size on a GPU, as a function of its rows.

    Attributes:
        tokens: N.
        gemms: (O, I) of the GEMMs of one block in both walks.
        kernel: the kernel that runs them.
        multiprocessors: of the GPU.
    """

    tokens: int
    gemms: tuple[Gemm, ...]
    kernel: Kernel
    multiprocessors: int

    def __call__(self, rows: int) -> float:
        """Return the cost of a micro-batch, in rows at full fill."""
        return rows / self.fill(rows) + self.overhead

    @property
    def overhead(self) -> float:
        """Cost of a micro-batch that does not depend on its rows, in rows at full fill."""
        return self.kernel.overhead / (2 * self.tokens * sum(outputs * inputs for outputs, inputs in self.gemms))

    def fill(self, rows: int) -> float:
        """Return the share of the programs' time that is useful, in (0, 1]."""
        (high, wide), programs = self.kernel.tile, self.kernel.resident * self.multiprocessors
        work = time = 0.0
        for outputs, inputs in self.gemms:
            waves = math.ceil(math.ceil(rows * self.tokens / high) * math.ceil(outputs / wide) / programs)
            work += rows * self.tokens * outputs * inputs
            time += high * wide * programs * waves * inputs
        return work / time


def plan_gemms(plan: ViTPlan) -> tuple[Gemm, ...]:
    """Return (O, I) of the eight GEMMs of the first attention and the first MLP, forward and VJP."""
    width, attention, mlp = plan.width, plan.attention, plan.mlp
    inner = attention.heads * attention.head_dim
    wide = mlp.fc1.bias.shape[0]
    hidden = hidden_width(wide, mlp.activation)
    forward = [(3 * inner, width), (width, inner), (wide, width), (width, hidden)]
    return (*forward, (hidden, width), (width, hidden), (inner, width), (width, inner))


def hidden_width(wide: int, activation: str) -> int:
    """Return M: half of the `wide` outputs of the first layer where the MLP is gated, else all of them."""
    return wide // 2 if "_glu" in activation else wide


@lru_cache(maxsize=64)
def full_rows(cost: Callable[[int], float], most: int) -> int:
    """Return m*, the fewest rows with almost the least cost a row, at most `most`."""
    a_row = {rows: cost(rows) / rows for rows in range(1, max(1, min(most, MOST_ROWS)) + 1)}
    enough = min(a_row.values()) * (1 + SAME_COST)
    return min(rows for rows, value in a_row.items() if value <= enough)


def ladder(full: int) -> tuple[int, ...]:
    """Return the bucket sizes m*, m*/2, m*/4, … 1."""
    return (full, *ladder(full // 2)) if full > 1 else (1,)


@lru_cache(maxsize=4096)
def next_bucket(remaining: int, full: int, cost: Callable[[int], float], own: int | None = None) -> int:
    """Return the size of the next bucket.

    While many rows remain it is the cheapest a row; then it is the largest of the cheapest sequence for all of them.

    Args:
        remaining: rows still to walk.
        full: m*.
        cost: rows of a micro-batch -> its cost, in any unit.
        own: one more size that is allowed besides the ladder's.
    """
    sizes = ladder(full) if own is None else (*ladder(full), own)
    if remaining >= 2 * max(sizes):
        return min(sizes, key=lambda size: cost(size) / size)
    return _ways(remaining, sizes, cost)


def _ways(rows: int, sizes: tuple[int, ...], cost: Callable[[int], float]) -> int:
    """Return the largest bucket of the cheapest sequence that holds all rows; of equal ones, the one with fewest."""
    # integers, so that sums are equal in any order
    costs = {size: round(1e6 * cost(size)) for size in sizes}
    best = [(0, 0, 0)]
    for left in range(1, rows + 1):
        after = {size: best[max(0, left - size)] for size in sizes}
        best.append(min((costs[size] + after[size][0], after[size][1] + 1, -size) for size in sizes))
    return -best[rows][2]


def flat_cost(rows: int) -> float:
    """Return a cost where no GPU is known: the overhead is that of one row."""
    return rows + 1.0
