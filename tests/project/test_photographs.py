"""Test that the script of the figures of photographs runs, and that the committed figures are small and shown."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.explain.explanation import Explanation
from dave_fast.models.demo import demo_scene
from scripts import photographs

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
    given = [str(tmp_path), "--model", "demo", "--n-samples", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["photographs.py", *given])
    photographs.main()
    columns = {"photographs": 3, "photographs_contrast": 4, "photographs_samples": 2, "photographs_alpha": 2}
    for name, (_, side) in photographs.MADE.items():
        with Image.open(tmp_path / f"{name}.jpg") as picture:
            assert picture.width == columns[name] * (side + photographs.GAP) - photographs.GAP


def test_signed_map_of_a_side_four_times_as_strong_is_four_times_as_large():
    raw, sums, none = torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 2, 32, 32), torch.full((1, 2), float("nan"))
    sums[0, 1, 8, 8], sums[0, 1, 24, 24] = 4.0, -1.0
    maps, targets = torch.zeros_like(sums), torch.full((1, 2), -1)
    found = Explanation(maps, raw, sums, targets, none, torch.zeros(1, 4), n_samples=1, seed=0, shrink=True)
    signed = photographs.signed(found)
    assert signed[8, 8] > 0 > signed[24, 24]
    np.testing.assert_allclose(signed[8, 8], -4 * signed[24, 24], rtol=1e-5)
