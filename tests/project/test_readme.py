"""Test README.md and the guide: their Python prints what they show; figures, commands and extras are true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from dave_fast.cli.options import DEFAULT_MODEL
from dave_fast.images import screen
from dave_fast.models.demo import demo_scene

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# a fenced block of Python, and the block of text right behind it, which is what it prints
BLOCKS = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_python_blocks_run_as_written_and_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    """Every block runs by itself, imports included, in a folder with photographs.

    The embedded model stands in for the default one, whose weights are downloaded, and pictures are drawn, not shown.
    """
    for name in ("photo.jpg", "other.jpg"):
        demo_scene().image.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    shown: list[bytes] = []
    monkeypatch.setattr(screen, "show_png", shown.append)
    blocks = BLOCKS.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    for number, (code, printed) in enumerate(blocks, 1):
        exec(compile(code.replace(DEFAULT_MODEL, "demo"), f"{page}, block {number}", "exec"), {})
        assert capsys.readouterr().out == printed
    assert all(each.startswith(b"\x89PNG") for each in shown)


def test_the_first_command_installs_and_explains_and_the_last_runs_every_check():
    first, *_, last = COMMANDS.findall(README)
    assert first.strip() == "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/dave-fast explain --demo"
    assert last.strip() == ".ci/run"


def test_the_table_of_extras_is_that_of_pyproject():
    named = [
        name
        for group in re.findall(r"^\| `pip install '\.\[(.*?)\]'", README, re.MULTILINE)
        for name in group.split(",")
    ]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(named) == sorted(declared)


@pytest.mark.parametrize("what", ["speed on a CPU", "maps", "models"])
def test_headline_figures_stand_in_the_page_that_they_link_to(what):
    """Every number of three digits or more in a row, such as 3.27, 0.478 or 658, is on the page that it links to."""
    ((figures, page),) = re.findall(rf"^\| {what} \| (.*?) \| \[.*?\]\((docs/.*?)\) \|$", README, re.MULTILINE)
    numbers = re.findall(r"\d\.\d{2,}|\d{3}\b", figures)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert numbers and not [number for number in numbers if number not in text]


def test_files_that_contributing_names_exist():
    """Every path that CONTRIBUTING.md names exists, in the repository or in the package; `<op>` stands for an op."""
    named = re.findall(r"`([\w./]+/[\w.]+\.(?:py|h|cpp|md))`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert named and not [path for path in named if not any((at / path).exists() for at in (ROOT, ROOT / "dave_fast"))]
