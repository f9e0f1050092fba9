"""Test that MODULE:FUNCTION is found in the current folder, also by the processes that a command starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dave_fast.errors import InputError
from dave_fast.models.catalog import load_object
from dave_fast.models.demo import demo_scene

ROOT = Path(__file__).resolve().parents[2]
MODEL = "from dave_fast.models.demo.model import load_demo_model\n\n\ndef model():\n    return load_demo_model()\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Go to an empty folder, whose modules are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_module_and_a_package_of_the_current_folder(here):
    (here / "own_model.py").write_text("def make():\n    return 7\n")
    (here / "own_package").mkdir()
    (here / "own_package/part.py").write_text("def make():\n    import own_model\n    return own_model.make()\n")
    assert load_object("own_package.part:make")() == 7


def test_what_is_installed_comes_before_the_current_folder(here):
    (here / "json.py").write_text("dumps = None\n")
    (here / "timm.py").write_text("VERSION = 0\n")
    assert load_object("json:dumps") is not None
    with pytest.raises(InputError, match="has no attribute 'VERSION'"):
        load_object("timm:VERSION")


@pytest.mark.parametrize("path", ["nowhere_at_all:make", "own_model:", "own_model:nothing", ":make"])
def test_what_is_not_there_is_refused_with_the_places_that_were_looked_at(here, path):
    (here / "own_model.py").write_text("")
    with pytest.raises(InputError, match="installed package or of the current folder"):
        load_object(path)


def test_a_run_finds_it_in_its_workers_without_the_folder_on_the_path(tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "photos").mkdir()
    demo_scene().image.save(tmp_path / "photos/a.png")
    # -P as in a console script: the current folder is not put on the path
    command = [sys.executable, "-P", "-m", "dave_fast", "run", "photos", "--model", "mine:model", "--n-samples", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 maps made" in done.stdout
