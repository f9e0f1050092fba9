"""Test that the notebooks and the gallery run from end to end and that their statements are true."""

import ast
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from PIL import Image

from dave_fast.images import screen

ROOT = Path(__file__).resolve().parents[2]
LECTURE, TEN_MINUTES = (ROOT / "examples" / f"{name}.ipynb" for name in ("lecture", "ten_minutes"))
NOTEBOOKS = pytest.mark.parametrize("notebook", [LECTURE, TEN_MINUTES], ids=lambda path: path.stem)


def cells_of(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def run(notebook: Path, setting: str, few: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[bytes]]:
    """Run every cell in one namespace, and show what a last expression is, as a notebook does.

    Args:
        notebook: its file.
        setting: the line that says how many samples are drawn.
        few: what stands in its place.

    Returns:
        The names that the cells defined, and the pictures that they showed.
    """
    mpl.use("agg", force=True)
    import matplotlib.pyplot as plt

    sources = cells_of(notebook, "code")
    assert sum(setting in source for source in sources) == 1
    shown: list[bytes] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(b"") or plt.close())
    monkeypatch.setattr(screen, "show_png", shown.append)
    names: dict[str, Any] = {}
    for number, source in enumerate(sources):
        cell = ast.parse(source.replace(setting, few))
        last = cell.body.pop() if isinstance(cell.body[-1], ast.Expr) else None
        exec(compile(cell, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
            if value is not None:
                assert repr(value)
                shown.append(value._repr_png_())
    return names, shown


def test_every_cell_of_the_lecture_runs(monkeypatch, capsys):
    names, shown = run(LECTURE, "SAMPLES = 50", "SAMPLES = 2", monkeypatch)
    told = capsys.readouterr().out
    assert len(shown) == 9
    assert "report.passed=True" in told and "four" in told.splitlines()[0]
    assert names["report"].passed and names["answers"].maps.shape == (1, 4, 128, 128)
    assert names["deep"].maps.shape == (1, 2, 4, 128, 128)


def test_every_cell_of_ten_minutes_runs_and_is_quiet(monkeypatch, capfd, tmp_path):
    temporary, here = tmp_path / "temporary", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(here)
    names, shown = run(TEN_MINUTES, "SAMPLES = 32", "SAMPLES = 8", monkeypatch)
    told, noise = capfd.readouterr()
    assert noise == "" and "arning" not in told
    assert len(shown) == 11 and all(picture.startswith(b"\x89PNG") for picture in shown if picture)
    assert "photograph (640, 480), overlay (640, 480), map (128, 128)" in told
    assert (names["untrained"].predict(names["photo"]).softmax(1) - 1 / 3).abs().max() < 0.1
    assert len(names["maps"]) == 12 and len(names["files"]) == 12
    # what the text says of the rows: the least sure answer is the first, and wrong
    assert re.search(r"^04-seven\.png +answer one ", told, re.MULTILINE) and names["least_sure"].id == "04-seven.png"
    names["working"].cleanup()
    assert not list(temporary.iterdir()) and not list(here.iterdir())


@NOTEBOOKS
def test_a_notebook_is_kept_without_results(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@NOTEBOOKS
def test_links_of_a_notebook_lead_to_files_and_headings(notebook):
    links = re.findall(r"\]\((?![a-z]+:)([^)#]+)#?([^)]*)\)", "\n".join(cells_of(notebook, "markdown")))
    for path, heading in links:
        page = (notebook.parent / path).read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w\- ]", "", each).lower() for each in re.findall(r"^#+ (.*)$", page, re.MULTILINE)]
        assert not heading or heading in [each.replace(" ", "-") for each in headings], f"{path}#{heading}"
    assert links or notebook == LECTURE


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    out = tmp_path_factory.mktemp("gallery")
    command = [sys.executable, "scripts/gallery.py", "--n-samples", "2", "--converged", "4", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_the_gallery_is_a_page_with_its_figures(gallery):
    page = (gallery / "gallery.md").read_text()
    figures = sorted(path.name for path in gallery.glob("*.png"))
    assert figures == [
        f"gallery_{name}.png" for name in ("alpha", "classes", "contrast", "patches", "resolution", "samples")
    ]
    for name in figures:
        assert f"]({name})" in page
        with Image.open(gallery / name) as picture:
            assert picture.width > 500


def test_the_documents_figures_are_small():
    figures = list((ROOT / "docs/figures").glob("gallery_*.png"))
    assert len(figures) == 6 and all(path.stat().st_size < 300_000 for path in figures)
    page = (ROOT / "docs/gallery-image.md").read_text()
    assert all(f"(figures/{path.name})" in page for path in figures)
