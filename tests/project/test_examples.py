"""Test that the notebook and the gallery run from end to end and that their statements are true."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples/lecture.ipynb"
SETTING = "SAMPLES = 50"


def test_every_cell_of_the_notebook_runs(monkeypatch, capsys):
    """Every cell runs in one namespace, as in a notebook, with few samples; figures are drawn but not shown."""
    mpl.use("agg", force=True)
    import matplotlib.pyplot as plt

    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(SETTING in source for source in sources) == 1 and len(sources) == 10
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()) or plt.close())
    names: dict = {}
    for number, source in enumerate(sources):
        exec(compile(source.replace(SETTING, "SAMPLES = 2"), f"cell {number}", "exec"), names)
    told = capsys.readouterr().out
    assert len(drawn) == 8
    assert "report.passed=True" in told and "four" in told.splitlines()[0]
    assert names["report"].passed and names["answers"].maps.shape == (1, 4, 128, 128)
    assert names["deep"].maps.shape == (1, 2, 4, 128, 128)


def test_the_notebook_is_kept_without_results():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


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
