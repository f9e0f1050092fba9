"""Test the head of the page of performance: the ratios, which peer they are to, the sentences and the chart."""

import pytest

from benchmarks import performance_page, speed_page
from benchmarks.speed_page import AUTHORS, COMPILED
from dave_fast.bench.timing import spread

SPEEDS = {
    "dave-fast fp32": 2.0,
    "dave-fast bf16": 4.0,
    "dave-fast int8": 8.0,
    "the authors' code, fp32": 1.0,
    "PyTorch P3, fp32": 1.6,
    "PyTorch P3, bf16": 3.2,
    "PyTorch P4 in integers, int8": 2.5,
    "plain": 0.5,
}


def result(speeds, isa="avx2", model="vit_base_patch16_224", **more):
    rows = [
        {
            "name": name,
            "precision": name.replace(",", "").split()[-1],
            "samples": 50,
            "rows": 4,
            "peak bytes": None,
            "images a second": spread([speed, 2 * speed, 3 * speed]),
            "seconds an image": spread([1 / speed]),
        }
        for name, speed in speeds.items()
    ]
    missing = {"name": "captum IG-50", "precision": "fp32", "samples": 50, "not measured": "captum is not installed"}
    setting = {"model": model, "image": "3×224×224", "samples": 50, "device": "cpu"}
    where = {"device": "Zen", "isa": isa, "threads": 2, "commit": "abc", "python": "3.12", "versions": {}}
    return {"setting": setting, "environment": where, "engine": [*rows, missing], **more}


def test_ratios_are_to_the_fastest_peer_of_a_precision_or_a_finer_one():
    found = speed_page.speedups(result(SPEEDS))
    medians = {precision: {name: r["median"] for name, r in ratios.items()} for precision, ratios in found.items()}
    assert medians == {
        "fp32": {AUTHORS: 2.0, COMPILED: 1.25},
        "bf16": {AUTHORS: 4.0, COMPILED: 1.25},
        # the peer in bfloat16 is faster than that in eight bits
        "int8": {AUTHORS: 8.0, COMPILED: 2.5},
    }
    assert found["fp32"][COMPILED]["repeats"] == 3


def test_results_of_the_engine_alone_have_no_ratios():
    assert speed_page.speedups(result({"dave-fast fp32, auto": 1.0})) == {}
    assert speed_page.speedups({"ops": []}) == {}


def test_three_sentences_say_seconds_ratios_and_agreement():
    seconds, times, maps = speed_page.sentences(result(SPEEDS, agreement={"bf16": 0.99997, "images": 8}))
    assert "500 ms in fp32, 250 ms in bf16 and 125 ms in int8 on Zen (2 threads, avx2)" in seconds
    assert "2.00 (fp32), 4.00 (bf16) and 8.00 (int8) times the speed of the authors' code and 1.25" in times
    assert "0.99997 (bf16)" in maps
    assert "float64" in speed_page.sentences(result(SPEEDS))[2]


def test_the_page_starts_with_the_chart_of_all_results(tmp_path):
    other = {name: speed for name, speed in SPEEDS.items() if "authors" not in name and "bf16" not in name}
    results = [result(other, model="another"), result(other, isa="baseline"), result(SPEEDS)]
    text = performance_page.write(results, tmp_path).read_text()
    assert text.startswith("# Performance\n\n![Times the speed of the authors' code")
    assert (tmp_path / "figures" / "speed.png").stat().st_size > 0
    assert "(2 threads, avx2)" in text.partition("## ")[0]
    drawn = speed_page.plot(sorted(results, key=speed_page._place))
    left, right = drawn.axes
    assert [label.get_text().split("\n")[0] for label in left.get_yticklabels()][-1].startswith("another")
    assert len(left.patches) == 3 and len(right.patches) == 7


@pytest.mark.parametrize("results", [[], [result({"dave-fast fp32, auto": 1.0})]])
def test_a_page_without_comparisons_has_no_chart(tmp_path, results):
    text = performance_page.write(results, tmp_path).read_text()
    assert text.startswith("# Performance\n\n**Nothing") and not (tmp_path / "figures" / "speed.png").exists()
