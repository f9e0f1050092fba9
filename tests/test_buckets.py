"""Micro-batch sizes on a GPU: the arithmetic of waves, tiles and L2."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dave_fast.buckets import Chip, fill, full_rows, ladder, next_bucket, plan_gemms, row_cost
from dave_fast.ops.linear import pack_ref
from dave_fast.plan import make_plan

# as torch reports an H200
H200 = Chip(132, 60 * 2**20)
MODELS = {"S": (384, 197), "B": (768, 197), "L": (1024, 197), "B at 448": (768, 785), "B at 672": (768, 1765)}


def gemms(width):
    forward = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [*forward, (4 * width, width), (width, 4 * width), (width, width), (width, width)]


@pytest.mark.parametrize(
    ("name", "rows", "share"),
    [
        ("B", 28, 0.98),
        ("B", 56, 0.98),
        ("B", 50, 0.93),
        ("B", 25, 0.87),
        ("S", 26, 0.91),
        ("S", 78, 0.94),
        ("L", 21, 0.98),
        ("L", 42, 0.98),
        ("L", 50, 0.96),
        ("B at 448", 7, 0.98),
        ("B at 448", 50, 1.00),
        ("B at 672", 3, 0.94),
        ("B at 672", 50, 0.99),
    ],
)
def test_fill_is_that_of_the_counted_table(name, rows, share):
    width, tokens = MODELS[name]
    assert fill(rows, tokens, gemms(width), 132) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize(("name", "rows"), [("B", 28), ("L", 21), ("B at 448", 7), ("B at 672", 3)])
def test_full_micro_batches_fill_the_chip_and_stay_in_l2(name, rows):
    width, tokens = MODELS[name]
    assert full_rows(tokens, gemms(width), 2, H200, most=1000) == rows


def test_a_smaller_cache_wider_numbers_and_short_memory_make_smaller_micro_batches():
    width, tokens = MODELS["B"]
    assert full_rows(tokens, gemms(width), 2, Chip(132, 50 * 2**20), most=1000) < 28
    assert full_rows(tokens, gemms(width), 4, H200, most=1000) <= 14
    assert full_rows(tokens, gemms(width), 2, H200, most=5) <= 5
    assert full_rows(1_000_000, gemms(width), 2, H200, most=0) == 1


def test_the_gemms_of_a_plan_are_those_of_its_blocks():
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2, mlp_ratio=3)
    plan = make_plan(model.eval(), dtype=torch.float32, pack=pack_ref)
    assert plan_gemms(plan) == [
        (192, 64),
        (64, 64),
        (192, 64),
        (64, 192),
        (192, 64),
        (64, 192),
        (64, 64),
        (64, 64),
    ]


def test_the_ladder_halves_down_to_one():
    assert ladder(28) == (28, 14, 7, 3, 1)
    assert ladder(1) == (1,)


def buckets(rows, full, cost):
    found = []
    while rows > 0:
        found.append(next_bucket(rows, full, cost))
        rows -= found[-1]
    return found


def test_tails_take_the_cheapest_buckets():
    def by_rows(rows):
        return rows + 0.5

    assert buckets(56, 28, by_rows) == [28, 28]
    # 28 padded rows cost less than 14 + 7 + 1 only where a micro-batch has its own price
    assert buckets(50, 28, by_rows) == [28, 14, 7, 1]
    assert buckets(50, 28, lambda rows: rows + 4) == [28, 28]
    assert buckets(1, 28, by_rows) == [1]
    assert buckets(3, 1, by_rows) == [1, 1, 1]


def test_on_a_chip_a_tail_of_22_rows_is_padded_to_28():
    width, tokens = MODELS["B"]
    cost = partial(row_cost, tokens=tokens, gemms=gemms(width), multiprocessors=132)
    assert buckets(50, 28, cost) == [28, 28]
    assert buckets(29, 28, cost)[0] == 28 and sum(buckets(29, 28, cost)) < 56


@pytest.mark.parametrize("rows", [1, 2, 13, 27, 28, 29, 100])
def test_buckets_hold_every_row_and_waste_less_than_the_last(rows):
    width, tokens = MODELS["B"]
    found = buckets(rows, 28, partial(row_cost, tokens=tokens, gemms=gemms(width), multiprocessors=132))
    assert sum(found) >= rows > sum(found[:-1])
    assert set(found) <= set(ladder(28))
