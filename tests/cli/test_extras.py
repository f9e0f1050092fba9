"""Test that what needs an extra says so where its package is missing, with the command that installs it."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dave_fast.cli.app import app
from dave_fast.errors import DaveFastError, MissingPackageError
from dave_fast.evaluate.methods import choose
from dave_fast.models.catalog import load_model

ROOT = Path(__file__).resolve().parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# for working on dave-fast; bcos, whose models are given as modules, so that nothing is imported here; and export, whose
# tests are those of the exports
OTHERS = {"test", "dev", "docs", "bcos", "export"}


def imported(name):
    """Return a function that imports a module as if for the first time; its parts are imported again too."""

    def run(monkeypatch, tmp_path):
        for known in list(sys.modules):
            if known == name or known.startswith(f"{name}."):
                monkeypatch.delitem(sys.modules, known)
        importlib.import_module(name)

    return run


def command(*arguments):
    def run(monkeypatch, tmp_path):
        done = CliRunner().invoke(app, [each.format(folder=tmp_path) for each in arguments])
        assert done.exit_code == 2 and "Traceback" not in done.output, done.output
        raise MissingPackageError(done.stderr)

    return run


def model(name):
    def run(monkeypatch, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
        load_model(name.format(folder=tmp_path))

    return run


def method(name):
    def run(monkeypatch, tmp_path):
        monkeypatch.setattr("dave_fast.evaluate.methods.find_spec", sys.modules.get)
        raise MissingPackageError(choose([name])[1][name])

    return run


CASES = [
    ("serve", "fastapi", command("serve", "demo", "--port", "0")),
    ("serve", "uvicorn", command("serve", "demo", "--port", "0")),
    ("serve", "httpx", imported("dave_fast.client")),
    ("serve,ray", "fastapi", imported("dave_fast.serve.cluster")),
    ("serve,ray", "ray", imported("dave_fast.serve.cluster")),
    ("ray", "ray", command("run", "{folder}", "--engine", "ray", "--model", "demo", "--out", "{folder}/run")),
    ("hf", "transformers", model("hf:{folder}")),
    ("openclip", "open_clip", model("open_clip:ViT-B-16:laion2b_s34b_b88k")),
    ("datasets", "datasets", command("run", "hf://{folder}/set:train", "--model", "demo", "--out", "{folder}/run")),
    ("evaluate", "captum", imported("dave_fast.captum")),
    ("evaluate", "captum", method("SmoothGrad")),
    ("evaluate", "torchcam", method("LeGrad")),
    ("lrp", "lxt", method("AttnLRP")),
]


@pytest.fixture
def imported_again():
    """Let modules of dave_fast be imported again, and put those before the test back behind it."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("dave_fast.")}
    yield
    for name in list(sys.modules):
        if name.startswith("dave_fast.") and name not in before:
            del sys.modules[name]
            parent, _, last = name.rpartition(".")
            vars(sys.modules.get(parent, sys)).pop(last, None)
    sys.modules.update(before)
    for name, module in before.items():
        parent, _, last = name.rpartition(".")
        setattr(sys.modules[parent], last, module)


@pytest.mark.usefixtures("imported_again")
@pytest.mark.parametrize(("extra", "package", "use"), CASES, ids=[f"{extra}-{name}" for extra, name, _ in CASES])
def test_the_extra_of_a_missing_package_is_named(extra, package, use, monkeypatch, tmp_path):
    (tmp_path / "a.png").touch()
    for name in list(sys.modules):
        # a command imports its parts as if for the first time
        if name.split(".")[0] == package or name.startswith(("dave_fast.serve.", "dave_fast.client")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DaveFastError) as caught:
        use(monkeypatch, tmp_path)
    text = " ".join(str(caught.value).split())
    assert package in text and re.search(rf"pip install '[^']*\[{extra}\]'", text), text
    assert isinstance(caught.value, ImportError)


def test_every_extra_for_users_has_a_case():
    assert {extra for extra, _, _ in CASES if "," not in extra} == set(DECLARED) - OTHERS


def test_no_message_names_a_package_index():
    """There is no release yet: only a checkout has the extras."""
    files = list((ROOT / "dave_fast").rglob("*.py"))
    assert files and not [path for path in files if "dave-fast[" in path.read_text(encoding="utf-8")]
