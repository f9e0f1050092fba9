"""Test that docs/models.json and its table are complete and up to date, and that a sample is proved again."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from packaging.version import Version

from scripts import model_table as page
from tests.tolerances import EXACT

DATA = page.read()
ROWS: list[dict[str, Any]] = DATA["rows"]
# the registry of a timm other than the table's may have more or fewer architectures
KNOWN = [row for row in ROWS if timm.is_model(row["name"])]
SAMPLE = [
    "vit_pe_core_tiny_patch16_384",
    "xcit_nano_12_p8_224",
    "mobilevitv2_050",
    "efficientvit_m0",
    "swiftformer_xs",
]


def test_at_least_95_percent_are_explained() -> None:
    count = dict.fromkeys(("engine", "frozen", "refused", "open"), 0)
    listed = [name for row in ROWS for name in row["architectures"]]
    for row in ROWS:
        count[row["route"]] += len(row["architectures"])
    assert len(listed) == len(set(listed)) == sum(count.values()) > 600
    # open models were not run, so they are neither explained nor refused; there are few
    assert count["engine"] + count["frozen"] >= 0.95 * len(listed)


def test_what_is_explained_passed_the_replay_and_what_is_refused_names_a_module() -> None:
    for row in ROWS:
        if row["route"] == "open":
            assert row["error"] is None, row["name"]
        elif row["route"] == "refused":
            assert row["reason"].startswith("module '"), row["name"]
        else:
            assert row["route"] in ("engine", "frozen") and row["error"] <= EXACT, row["name"]


def test_the_page_is_the_data() -> None:
    _, _, rest = page.PAGE.read_text().partition(page.BEGIN + "\n")
    assert rest.partition(page.END)[0] == page.table(ROWS, DATA["timm"]), "run scripts/model_table.py --routes"


@pytest.mark.skipif(Version(timm.__version__) < Version(DATA["timm"]), reason="the table is of a later timm")
def test_the_list_is_of_this_timm() -> None:
    assert len(KNOWN) == len(ROWS)
    families = {row["family"] for row in ROWS}
    assert {"vision_transformer", "eva", "swin_transformer", "maxxvit", "naflexvit", "hiera", "levit"} < families
    listed = {name for row in ROWS for name in row["architectures"]}
    for name in ("resnet18", "resnest14d", "mixer_s16_224"):
        assert name not in listed and not page.vit_like(page.on_meta(lambda name=name: timm.create_model(name)))
    for name in ("test_vit", "vit_tiny_patch16_224", "test_maxvit"):
        assert name in listed and page.vit_like(page.on_meta(lambda name=name: timm.create_model(name)))


@pytest.mark.parametrize("row", KNOWN[::16], ids=lambda row: row["name"])
def test_the_engine_has_the_plans_that_the_table_says(row: dict[str, Any]) -> None:
    assert page.route_now(row) == row["route"], "run scripts/model_table.py --routes"


@pytest.mark.parametrize("row", [row for row in KNOWN if row["name"] in SAMPLE], ids=lambda row: row["name"])
def test_a_sample_is_proved_again(row: dict[str, Any]) -> None:
    found = page.prove(page.small_of(row))
    assert (found["error"] is None) == (row["error"] is None)
    assert found["route"] == row["route"] and found["reason"] == row["reason"]


def test_a_structure_knows_switches_and_not_sizes() -> None:
    def made(name: str, **changes: Any) -> page.Structure:
        return page.structure(page.on_meta(lambda: timm.create_model(name, depth=2, **changes)))

    assert made("vit_tiny_patch16_224") == made("vit_small_patch32_384", num_classes=10)
    for changes in ({"qkv_bias": False}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}):
        assert made("vit_tiny_patch16_224", **changes) != made("vit_tiny_patch16_224")


def test_the_smallest_form_keeps_the_structure() -> None:
    small = page.smallest("deit_small_distilled_patch16_224")
    assert (small.depth, small.side) == (1, 112)
    assert len(small.build().blocks) == 1
    assert small.image(small.build()).shape == (1, 3, 112, 112)
    torch.manual_seed(0)
    assert page.prove(small)["error"] <= EXACT


@pytest.mark.slow
def test_every_plan_is_in_the_table() -> None:
    """Test every architecture that has a plan; it takes a few minutes."""
    stale = [row["name"] for row in KNOWN if page.route_now(row) != row["route"]]
    assert not stale, "run scripts/model_table.py --routes"


@pytest.mark.slow
@pytest.mark.skipif(timm.__version__ != DATA["timm"], reason="the table is of another timm: scripts/model_table.py")
def test_the_whole_table_again() -> None:
    """Test the whole table; it takes half an hour on two cores."""
    again = sorted(page.prove_all(), key=lambda row: (row["family"], row["name"]))
    assert [(row["name"], row["architectures"], row["route"]) for row in again] == [
        (row["name"], row["architectures"], row["route"]) for row in ROWS
    ]
