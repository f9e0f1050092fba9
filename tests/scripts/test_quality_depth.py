"""The comparison at depth: its section says who is ahead, and a part is measured, gone on with and written."""

import json
import sys

import pytest

from dave_fast.errors import InputError
from scripts import quality_depth as script
from scripts import quality_depth_section as page
from scripts.quality_section import collected, with_section

HEAD = "class token"


def lines(rows, metric, *, items=6, head=HEAD):
    """Return lines of a part whose rows score about these values."""
    scored = [
        {row: {metric: {"smoothed": value + 0.01 * (item % 3)}} for row, value in rows.items()} for item in range(items)
    ]
    return [{"head": head, "item": f"item {item}", "family": "all", "scores": each} for item, each in enumerate(scored)]


def test_the_section_compares_the_block_of_auto_with_rivals_there_and_tells_where_they_are_ahead():
    block, other = page.auto(HEAD), "block 3"
    ahead = {
        f"DAVE, {block}, S = 16": 0.5,
        "DAVE, S = 16": 0.3,
        f"Grad-CAM, {block}": 0.4,
        # another block is no rival of the comparison, nor is the control or a contrast
        f"Grad-CAM, {other}": 0.8,
        "uniform": 0.9,
        f"Grad-CAM, {block}, against the others": 0.7,
    }
    behind = {f"DAVE, {block}, S = 16": 0.5, "Libra FullGrad+": 0.6, "LeGrad": 0.2}
    scores = collected({"mosaics-2x2": lines(ahead, "GridPG 2x2"), "photographs": lines(behind, "EnergyPG")})
    text = page.section(scores, {"LeGrad": 1.0})
    assert f"- **DAVE, ahead of every other method**: GridPG 2x2 ({HEAD})." in text
    assert f"- **DAVE, behind one**: EnergyPG ({HEAD})." in text
    assert f"| DAVE | GridPG 2x2 | {HEAD} | 0.510 (0.503–0.517) | Grad-CAM, {block} | 0.410 " in text
    assert "| behind Libra FullGrad+ |" in text
    assert f"| at depth against pixels, S = 16 | GridPG 2x2 | {HEAD} | +0.200 (+0.200 to +0.200) | 6 |" in text
    assert "| LeGrad | 1.00 |" in text
    cells = list(page.cells(scores[HEAD], "GridPG 2x2", "Grad-CAM", [block, other]))
    assert cells == ["–", "0.410 / 0.710", "0.810"]
    assert max(map(len, page.INTRODUCTION.splitlines())) <= 120


def test_a_section_takes_the_place_of_an_earlier_one_and_leaves_the_others():
    text = "# Quality\n\n## One\n\nfirst\n\n## Two\n\nsecond\n"
    assert with_section(text, "## One", "## One\n\nnew\n") == "# Quality\n\n## One\n\nnew\n\n## Two\n\nsecond\n"
    assert with_section(text, "## Two", "## Two\n\nnew\n") == "# Quality\n\n## One\n\nfirst\n\n## Two\n\nnew\n"
    assert with_section(text, "## Three", "## Three\n\nnew\n") == text + "\n## Three\n\nnew\n"


@pytest.mark.slow
def test_digits_are_measured_gone_on_with_and_written(monkeypatch, tmp_path, capsys):
    parts = {
        "digits": script.Part("photographs", 2, {page.DIGITS: (2, 16)}),
        "digits-2x2": script.Part("mosaics", 1, {page.DIGITS: (16,)}, grid=2),
    }
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.setattr(page, "PAGE", tmp_path / "quality.md")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results.json")
    page.PAGE.write_text("# Quality\n")
    families = ["DAVE at depth", "activations", "one frozen sample", "Libra FullGrad+"]

    def run(step, *more):
        monkeypatch.setattr(sys, "argv", ["quality_depth.py", step, *more, "--out", str(tmp_path)])
        script.main()

    run("measure", "--family", *families)
    path = script.lines_of(tmp_path, "digits-2x2", page.DIGITS)
    first = path.read_text()
    (dave,) = [one for one in map(json.loads, first.splitlines()) if one["family"] == "DAVE at depth"]
    assert f"DAVE, {page.auto(page.DIGITS)}, against the others, S = 16" in dave["scores"]
    capsys.readouterr()
    path.write_text(first[:-9])
    run("measure", "--family", *families)
    assert capsys.readouterr().out.count("\n") == 1 and path.read_text() == first
    run("write")
    assert page.HEADING in page.PAGE.read_text()
    assert json.loads(page.RESULTS.read_text())["auto"] == {page.DIGITS: page.auto(page.DIGITS)}
    # scores with other settings are not gone on with
    monkeypatch.setitem(parts, "digits", script.Part("photographs", 2, {page.DIGITS: (4, 16)}))
    with pytest.raises(InputError, match="sizes"):
        run("measure", "digits")


def test_photographs_need_their_folders(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["quality_depth.py", "measure", "photographs", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "--boxes" in capsys.readouterr().err


def test_families_of_photographs_have_no_contrast_and_take_methods_at_pixels_from_the_other_measurement():
    photographs = script.families(script.PARTS["photographs"], HEAD, (1.0, 0.0), (1,))
    assert list(photographs) == [
        "DAVE at depth",
        "DAVE at depth, no noise",
        "one frozen sample",
        "activations",
        "AttnLRP at tokens",
    ]
    assert not photographs["activations"].keywords["contrast"]
    mosaics = script.families(script.PARTS["mosaics-2x2"], HEAD, (1.0, 0.0), (1,))
    assert set(mosaics) == {*photographs, *script.PEERS} and mosaics["activations"].keywords["contrast"]
    assert script.gammas_of(script.PARTS["digits"], page.DIGITS) == script.GAMMAS
