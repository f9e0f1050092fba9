"""Micro-batch sizes on a GPU: the arithmetic of tiles, waves and buckets."""

import re
from pathlib import Path

import pytest
import torch

from dave_fast.engine.buckets import (
    MOST_ROWS,
    SAME_COST,
    Cost,
    Kernel,
    flat_cost,
    full_rows,
    ladder,
    next_bucket,
    plan_gemms,
)
from dave_fast.ops.linear import pack_ref
from dave_fast.plan.families import read
from dave_fast.plan.vit_plan import make_plan
from tests.tiny import initial_vit

# of an H100 and of an H200
MULTIPROCESSORS = 132
WIDTHS = {"S": 384, "B": 768, "L": 1024}
MANY = 10**6


def cost_of(name, pixels=224, kernel=None):
    width = WIDTHS[name]
    forward = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    gemms = (*forward, (4 * width, width), (width, 4 * width), (width, width), (width, width))
    return Cost((pixels // 16) ** 2 + 1, gemms, kernel or Kernel.of(2), MULTIPROCESSORS)


def walk(rows, full, cost, own=None):
    found = []
    while rows > 0:
        found.append(next_bucket(rows, full, cost, own))
        rows -= found[-1]
    return found


@pytest.mark.parametrize(("rows", "waves"), [(14, (1, 2, 2)), (28, (1, 3, 4)), (50, (2, 6, 7))])
def test_fill_is_counted_by_hand_from_waves_of_two_programs_a_multiprocessor(rows, waves):
    """ViT-B: GEMMs with 768, 2304 and 3072 outputs, in tiles of 128×128, 264 at once."""
    tiles = -(-rows * 197 // 128)
    assert tuple(-(-tiles * outputs // 128 // 264) for outputs in (768, 2304, 3072)) == waves
    narrow, qkv, wide = waves
    # five GEMMs with 768 outputs, two of them with 3072 inputs; one with 2304; two with 3072
    time = 264 * 128 * 128 * 768 * ((3 + 2 * 4) * narrow + qkv + 2 * wide)
    useful = rows * 197 * 22 * 768**2
    assert cost_of("B").fill(rows) == pytest.approx(useful / time, rel=1e-12)


def test_fourteen_rows_of_a_vit_b_leave_a_third_idle_and_twenty_eight_do_not():
    cost = cost_of("B")
    assert cost.fill(14) == pytest.approx(0.634, abs=0.001)
    assert cost.fill(28) == cost.fill(56) == pytest.approx(0.979, abs=0.001)


def test_the_overhead_is_five_rows_of_a_vit_b_and_fewer_of_larger_ones():
    assert cost_of("B").overhead == pytest.approx(4.9, abs=0.05)
    assert cost_of("S").overhead == pytest.approx(4 * cost_of("B").overhead)
    assert cost_of("L").overhead < cost_of("B").overhead
    assert cost_of("B", 672).overhead < 1


def documented():
    """Yield (model, pixels, overhead, m*, fill, cost of 50 rows) of each line of the table in docs/gpu.md."""
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        found = re.match(r"\| ViT-(.)/16, (\d+) px \| ([\d.]+) \|.*\| (\d+): ([\d.]+) \| [^|]*: ([\d.]+) \|$", line)
        if found:
            name, pixels, overhead, full, fill, fifty = found.groups()
            yield name, int(pixels), float(overhead), int(full), float(fill), float(fifty)


def test_the_documented_table_is_what_the_model_says():
    lines = list(documented())
    assert len(lines) == 9
    for name, pixels, overhead, full, fill, fifty in lines:
        cost = cost_of(name, pixels)
        assert full_rows(cost, MANY) == full
        found = (cost.overhead, cost.fill(full), sum(map(cost, walk(50, full, cost, 50))))
        assert found == pytest.approx((overhead, fill, fifty), abs=0.051)
        assert cost.fill(full) == pytest.approx(fill, abs=0.0051)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_full_micro_batch_costs_almost_the_least_a_row_and_fewer_rows_cost_more(name):
    cost = cost_of(name)
    full = full_rows(cost, MANY)
    least = min(cost(rows) / rows for rows in range(1, MOST_ROWS + 1))
    assert cost(full) / full <= (1 + SAME_COST) * least
    assert all(cost(rows) / rows > (1 + SAME_COST) * least for rows in range(1, full))


def test_short_memory_makes_smaller_micro_batches():
    cost = cost_of("B")
    assert full_rows(cost, 100) <= 100
    assert full_rows(cost, 5) <= 5
    assert full_rows(cost, 0) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_tile_is_that_of_the_kernels_fixed_configuration(dtype):
    configurations = pytest.importorskip("dave_fast.kernels.linear", exc_type=ImportError).configurations
    fixed = configurations(90, dtype, glu=False, descriptors=True)[0].kwargs
    assert Kernel.of(dtype.itemsize).tile == (fixed["BLOCK_T"], fixed["BLOCK_O"])


def test_float32_has_smaller_tiles_and_a_smaller_share_of_overhead():
    narrow = cost_of("B", kernel=Kernel.of(4))
    assert narrow.overhead < 1 and narrow.fill(14) > cost_of("B").fill(14)


def test_the_gemms_of_a_plan_are_those_of_its_blocks():
    model = initial_vit(patch_size=16, embed_dim=64, depth=1, mlp_ratio=3)
    plan = make_plan(read(model), dtype=torch.float32, pack=pack_ref)
    assert plan_gemms(plan) == (
        (192, 64),
        (64, 64),
        (192, 64),
        (64, 192),
        (192, 64),
        (64, 192),
        (64, 64),
        (64, 64),
    )


def test_the_ladder_halves_down_to_one():
    assert ladder(28) == (28, 14, 7, 3, 1)
    assert ladder(1) == (1,)


def by_rows(rows):
    return rows + 0.5


def dear(rows):
    return rows + 4


def test_tails_take_the_cheapest_buckets():
    assert walk(56, 28, by_rows) == [28, 28]
    # 28 padded rows cost less than 14 + 7 + 1 only where a micro-batch has its own price
    assert walk(50, 28, by_rows) == [28, 14, 7, 1]
    assert walk(50, 28, dear) == [28, 28]
    assert walk(1, 28, by_rows) == [1]
    assert walk(3, 1, by_rows) == [1, 1, 1]


def test_one_image_has_a_bucket_of_its_own_where_that_is_cheapest():
    cost = cost_of("B")
    assert walk(50, 113, cost) == [56]
    assert walk(50, 113, cost, own=50) == [50]
    # several images: full micro-batches first, then what ends soonest, of either kind
    assert walk(400, 113, cost, own=50)[:2] == [113, 113]
    assert walk(8, 113, cost, own=50) == [14]
    # more rows than a full micro-batch: one launch of everything, where it is allowed, of each image
    assert walk(200, 113, cost, own=200) == [200]
    assert walk(1600, 113, cost, own=200) == [200] * 8
    # 21 rows fill the chip where 20 do not
    assert walk(20, full_rows(cost_of("B", 448), MANY), cost_of("B", 448), own=20) == [21]


@pytest.mark.parametrize("own", [None, 50, 77])
@pytest.mark.parametrize("rows", [1, 2, 13, 50, 56, 113, 114, 400])
def test_buckets_hold_every_row_waste_less_than_the_last_and_none_is_cheaper(rows, own):
    cost = cost_of("B")
    found, allowed = walk(rows, 113, cost, own), {*ladder(113), *([own] if own else [])}
    assert sum(found) >= rows > sum(found[:-1])
    assert set(found) <= allowed
    alternatives = [-(-rows // size) * cost(size) for size in allowed]
    assert sum(map(cost, found)) <= min(alternatives) * (1 if rows < 226 else 1.02)


def test_without_a_chip_a_micro_batch_costs_one_more_row():
    assert flat_cost(7) == 8
    assert walk(18, 4, flat_cost) == [4, 4, 4, 4, 2]
