"""Test benchmarks/quality_for_time.py: the time to a quality, the run on drawn pictures, and the page."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import authors, performance_page, quality_for_time, quality_page
from benchmarks.quality_forms import AUTHORS, authors_form
from benchmarks.time_to_quality import Measured, compare, median_ratio, samples_needed
from dave_fast.explain.subject import Subject
from dave_fast.models.demo import draw_scenes


@pytest.mark.parametrize(
    ("quality", "wanted", "expected"),
    [
        ([0.5, 0.7, 0.8], 0.6, 8.0),
        ([0.5, 0.7, 0.8], 0.7, 16.0),
        ([0.5, 0.7, 0.8], 0.4, 4.0),
        ([0.5, 0.7, 0.8], 0.81, None),
        # a curve that falls below again has not reached the quality before it rises for good
        ([0.7, 0.5, 0.7], 0.6, 32.0),
        ([0.7, 0.8, 0.5], 0.6, None),
        ([float("nan")] * 3, 0.6, None),
    ],
)
def test_the_samples_of_a_quality_are_interpolated_in_log_s(quality, wanted, expected):
    found = samples_needed([4, 16, 64], quality, wanted)
    assert found == (None if expected is None else pytest.approx(expected))


def measured(score, seconds, images=6):
    scores = score + np.linspace(-0.2, 0.2, images)
    return Measured(scores, np.array(seconds))


def test_a_ratio_is_that_of_times_at_equal_quality():
    form = {4: measured(0.5, [1.0, 1.1]), 16: measured(0.7, [4.0, 4.4])}
    found = compare(form, measured(0.6, [40.0, 44.0]))
    # S = 8 takes 2.1 s by medians of 1.05 and 4.2 s, and the other takes 42 s
    assert (found.samples, found.seconds, found.ratio) == pytest.approx((8.0, 2.1, 20.0))
    # images that score alike in both and rounds that are slow for both do not widen the interval
    assert found.low == pytest.approx(20.0) and found.high == pytest.approx(20.0)
    assert found.share == 1.0 and not found.at_least


def test_a_quality_that_is_never_reached_says_so():
    found = compare({4: measured(0.5, [1.0])}, measured(0.6, [40.0]))
    assert found.samples is None and found.seconds is None and found.ratio is None
    assert found.share == found.low == found.high == 0.0


def test_a_quality_below_the_whole_curve_gives_a_lower_bound():
    found = compare({4: measured(0.5, [1.0]), 8: measured(0.6, [2.0])}, measured(0.4, [40.0]))
    assert found.at_least and found.samples == 4.0 and found.ratio == 40.0


def test_images_without_a_score_are_left_out_of_both():
    own, other = measured(0.5, [1.0]), measured(0.5, [40.0])
    own.scores[1] = other.scores[2] = np.nan
    other.scores[1] = 100.0
    assert compare({4: own}, other).ratio == 40.0


def test_the_interval_of_a_quality_near_the_end_of_the_curve_includes_not_reached():
    scores = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    found = compare({4: Measured(scores[::-1].copy(), np.ones(1))}, Measured(scores, np.full(1, 40.0)))
    assert found.low == 0.0 and found.high == 40.0 and 0.2 < found.share < 0.8


def test_the_median_of_ratios_has_an_interval_over_pairs():
    found = median_ratio([1.0, 1.01, 1.02, 1.0, 1.01])
    assert found["median"] == 1.01 and 1.0 <= found["low"] <= 1.01 <= found["high"] <= 1.02 and found["pairs"] == 5


class Recorded:
    """A stand-in for the authors' explainer, whose sample number s is the constant s."""

    def explain(self, image, label, num_steps):
        assert num_steps == 50
        return self.post_proc(self._aggregate_maps([torch.full((1, 1, 2, 2), float(s)) for s in range(num_steps)]))

    def _aggregate_maps(self, maps):
        self.last = [each.flatten()[0].item() for each in maps]
        return torch.stack(maps).mean(0)

    def post_proc(self, maps):
        return maps


def test_maps_of_the_authors_at_a_smaller_s_are_of_samples_spread_over_the_noise_levels(monkeypatch, tmp_path):
    recorded = Recorded()
    monkeypatch.setattr(authors, "load_explainer", lambda *_: recorded)
    form = authors_form(tmp_path, torch.nn.Identity(), 0.1, 50)
    found = form.every(torch.zeros(1, 3, 2, 2), torch.zeros(1), 0)
    assert list(found) == [50, 8, 16, 32] and {each.shape for each in found.values()} == {(1, 2, 2)}
    # 49 = 7 · 7, so that a schedule of 8 levels is every seventh of 50
    assert found[8].flatten()[0] == np.mean(range(0, 50, 7))
    assert found[50].flatten()[0] == np.mean(range(50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with four scenes of the demo model, and boxes.csv beside them."""
    made = tmp_path_factory.mktemp("scenes")
    scenes = draw_scenes(4, 0, n_digits=1, split="test", start=0)
    lines = ["image,xmin,ymin,xmax,ymax"]
    for number, (pixels, mask) in enumerate(zip(scenes.images, scenes.masks, strict=True)):
        Image.fromarray(pixels).save(made / f"{number}.png")
        (top, bottom), (left, right) = ((kept.min(), kept.max()) for kept in np.nonzero(mask))
        lines.append(f"{number}.png,{left},{top},{right + 1},{bottom + 1}")
    (made / "boxes.csv").write_text("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def result(folder):
    """Return the result of a small run on the held-out half."""
    out = folder / "result.json"
    given = ["demo", str(folder), "--boxes", str(folder / "boxes.csv"), "--samples", "8", "--limit-samples", "16"]
    quality_for_time.main([*given, "--noise-alpha", "0.5", "--limits", "1", "--repeats", "2", "--out", str(out)])
    return json.loads(out.read_text())


def test_a_run_scores_and_times_every_form_on_the_held_out_half(result):
    assert result["setting"]["half"] == "held-out" and result["setting"]["files"] == ["1.png", "3.png"]
    rows = {(row["name"], row["samples"]): row for row in result["forms"]}
    own = [name for name, _ in rows if name.startswith("dave-fast fp32")]
    assert set(own) == {"dave-fast fp32", "dave-fast fp32, the paper's map"}
    for row in rows.values():
        assert row["seconds"]["repeats"] == 2 and row["EnergyPG"]["n"] == 2 and row["correlation"]["n"] == 1
    shrunk, plain = rows["dave-fast fp32", 8], rows["dave-fast fp32, the paper's map", 8]
    assert shrunk["EnergyPG"]["mean"] != plain["EnergyPG"]["mean"]
    assert 0.3 < plain["correlation"]["mean"] < 1
    assert "give --authors PATH" in result["not measured"][AUTHORS] and result["time to quality"] == []
    assert result["shrinkage"]["pairs"] == 2


def test_each_folder_is_halved(folder, tmp_path):
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / name[2:]).read_bytes())
    subject = Subject.load("demo", noise_alpha=0.5)
    names = {}
    for half in quality_for_time.HALVES:
        args = argparse.Namespace(photographs=tmp_path, half=half, most=None, boxes=folder / "boxes.csv")
        names[half] = list(quality_for_time.read_photographs(subject, args).names)
    assert names == {"chosen-on": ["0.png", "2.png", "3.png"], "held-out": ["1.png"]}


@pytest.mark.parametrize(
    ("more", "said"), [(["--repeats", "0"], "--repeats is smaller than 1"), (["--samples", "4"], "smaller than 8")]
)
def test_a_number_that_would_end_the_run_after_its_scores_is_refused_at_once(folder, more, said, capsys):
    with pytest.raises(SystemExit):
        quality_for_time.main(["demo", str(folder), "--boxes", str(folder / "boxes.csv"), *more])
    assert said in capsys.readouterr().err


def test_photographs_without_a_box_are_refused(folder, tmp_path):
    (tmp_path / "boxes.csv").write_text("image,xmin,ymin,xmax,ymax\n")
    with pytest.raises(SystemExit, match=r"no box for these photographs: 1\.png, 3\.png"):
        quality_for_time.main(["demo", str(folder), "--boxes", str(tmp_path / "boxes.csv")])


def test_the_page_has_the_tables_of_a_run(result, tmp_path):
    text = performance_page.write([result], tmp_path).read_text()
    (figure,) = re.findall(r"\]\((figures/quality_for_time_.*\.png)\)", text)
    assert (tmp_path / figure).stat().st_size > 10_000
    assert quality_page.NO_AUTHORS in text and "| EnergyPG at S = | 4 | 8 |" in text
    assert "- Not measured: the authors' code, fp32: give --authors PATH" in text and quality_page.AGAIN in text


@pytest.mark.parametrize(
    ("wanted", "sentence", "line"),
    [
        (0.6, "20 times faster** (20 to 20)", "| dave-fast bf16 | 8 | 2 s | 20 (20 to 20) |"),
        (0.4, "at least 40 times faster", "| dave-fast bf16 | ≤ 4 | ≤ 1 s | ≥ 40 (40 to 40) |"),
        (0.8, "does not reach the EnergyPG", "| dave-fast bf16 | not reached |  |  |"),
    ],
)
def test_the_page_says_how_many_times_faster_or_that_a_quality_is_not_reached(wanted, sentence, line):
    found = compare({4: measured(0.5, [1.0]), 16: measured(0.7, [4.0])}, measured(wanted, [40.0])).as_json()
    theirs = {"name": AUTHORS, "samples": 50, "seconds": {"median": 40.0}}
    row = {"score": "EnergyPG", "name": "dave-fast bf16", "of": 50} | found
    result = {"forms": [theirs], "time to quality": [row]}
    assert sentence in quality_page.verdict(result)
    assert line in quality_page.reached_table(result, "EnergyPG")
