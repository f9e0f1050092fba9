"""Test that the script of the figures of photographs runs, and that the committed figures are small and shown."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.explain.explanation import Explanation
from dave_fast.models.demo import demo_scene
from scripts import photographs, photographs_depth, photographs_parts

ROOT = Path(__file__).resolve().parents[2]


def test_the_figures_are_small_shown_and_no_others_are_there():
    figures = {path.name: path.stat().st_size for path in (ROOT / "docs/figures").glob("photographs*.jpg")}
    assert set(figures) == {f"{name}.jpg" for name in photographs.MADE}
    assert figures["photographs.jpg"] < 150_000 and max(figures.values()) < 200_000
    shown = re.findall(r"\(figures/(photographs\w*\.jpg)\)", (ROOT / "docs/gallery.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(figures)


@pytest.mark.slow
def test_the_script_draws_every_figure_with_the_demo_model(tmp_path, monkeypatch):
    for name in ("raccoon", "astronaut", "coffee", "chelsea"):
        demo_scene().image.save(tmp_path / f"{name}.png")
    monkeypatch.setattr(photographs, "SAMPLES", (1, 2))
    monkeypatch.setattr(photographs, "ALPHAS", (0.0, 0.5, 0.9))
    monkeypatch.setattr(photographs_depth, "DEPTHS", ("pixels", 4))
    given = [str(tmp_path), "--model", "demo", "--n-samples", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["photographs.py", *given])
    photographs.main()
    columns = {"photographs": 3, "photographs_contrast": 4, "photographs_samples": 2, "photographs_alpha": 2}
    columns |= {"photographs_animals": 3, "photographs_mosaic": 5, "photographs_account": 1}
    for name, (_, width) in photographs.MADE.items():
        with Image.open(tmp_path / f"{name}.jpg") as picture:
            assert picture.width == columns[name] * (width + photographs_parts.GAP) - photographs_parts.GAP


def test_signed_map_of_a_side_four_times_as_strong_is_four_times_as_large():
    raw, sums, none = torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 2, 32, 32), torch.full((1, 2), float("nan"))
    sums[0, 1, 8, 8], sums[0, 1, 24, 24] = 4.0, -1.0
    maps, targets = torch.zeros_like(sums), torch.full((1, 2), -1)
    found = Explanation(maps, raw, sums, targets, none, torch.zeros(1, 4), n_samples=1, seed=0, shrink=True)
    signed = photographs_parts.signed(found)
    assert signed[8, 8] > 0 > signed[24, 24]
    np.testing.assert_allclose(signed[8, 8], -4 * signed[24, 24], rtol=1e-5)


def test_share_of_a_map_that_is_three_quarters_in_the_upper_half_is_75():
    maps = torch.zeros(2, 8, 6)
    maps[0, 1, 1], maps[0, 6, 2], maps[1, 3, 5] = 3.0, 1.0, 1.0
    cells = photographs_depth.row(maps, photographs_depth.mask(photographs_depth.UPPER, maps), ("pixels", "block 4"))
    assert [name for name, _ in cells] == ["pixels: 75 %", "block 4: 100 %"]


def test_sheet_keeps_the_shape_of_a_wide_picture():
    wide, square = Image.new("RGB", (40, 20)), Image.new("RGB", (8, 8))
    made = photographs_parts.sheet([[("", wide)], [("name", square)]], 100)
    assert made.size == (100, 50 + photographs_parts.GAP + photographs_parts.HEADING + 100)
