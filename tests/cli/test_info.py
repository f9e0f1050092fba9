"""Tests of `info`: each op has a default backend, and each backend that cannot be used a reason."""

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dave_fast import __version__
from dave_fast.cli.app import app
from dave_fast.cli.info import EXTRAS, Device, Info, collect, missing_of, render
from dave_fast.ops import _registry


@pytest.fixture(scope="module")
def found():
    return collect("cpu")


def printed(info):
    from rich.console import Console

    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(info))
    return console.export_text()


def test_versions_and_devices(found):
    assert found.versions["dave-fast"] == __version__
    assert set(found.versions) >= {"python", "torch", "timm", "triton"}
    assert found.devices[0].type == "cpu" and found.devices[0].name
    assert found.threads >= 1
    assert (found.native is None) == (found.isa is not None)


def test_table_says_what_the_registry_says(found):
    assert set(found.ops) == set(_registry.IMPLEMENTATIONS)
    for op, row in found.ops.items():
        assert [name for name, text in row.items() if text == "default"] == [_registry.choose(op, "auto", "cpu")]
        assert set(row) == {name for name in _registry.BACKENDS if name in _registry.IMPLEMENTATIONS[op]}
        for backend, text in row.items():
            assert text in ("default", "yes") or text == _registry.why_not(op, backend, "cpu")


def test_reasons_are_told_once_each():
    reason = "the extension was not built"
    ops = {
        "perturb": {"torch": "default", "native": reason},
        "smooth": {"torch": "default", "native": reason},
    }
    text = printed(Info({"torch": "2.0"}, (Device("cpu", "a chip", 8.0),), "cpu", 2, None, reason, ops))
    assert text.count("no [1]") == 2 and text.count(f"[1] {reason}") == 1
    assert "not available: the extension" in text and "8 GiB" in text


def test_measured_choices_are_shown_where_a_gpu_is_spoken_of():
    versions, chips, ops = {"torch": "2.0"}, (Device("cuda", "a chip", 80.0),), {"smooth": {"torch": "default"}}
    on_gpu = Info(versions, chips, "cuda", 2, None, None, ops, {}, "choices.json")
    assert "none measured here" in printed(on_gpu)
    text = printed(replace(on_gpu, choices={"linear O=768": {28: "library"}}))
    assert "choices.json" in text and "linear O=768" in text and "library" in text
    assert "measured" not in printed(replace(on_gpu, choices_file=None))


def test_screen():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert "native core" in result.stdout and "robust_mean" in result.stdout


def test_unknown_device():
    result = CliRunner().invoke(app, ["info", "--device", "abacus"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: device 'abacus' is unknown; backends are for cpu")


def test_module_is_a_program_with_plain_errors():
    # 0 without the native core, which alone reads the variable.
    environment = os.environ | {"DAVE_FAST_ISA": "none-such"}
    command = [sys.executable, "-m", "dave_fast", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


def test_extras_are_those_of_the_project(found):
    root = Path(__file__).resolve().parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    users = {extra: needs for extra, needs in declared.items() if extra not in ("test", "dev", "docs")}
    assert {extra: [re.match(r"[\w-]+", each)[0] for each in needs] for extra, needs in users.items()} == {
        extra: list(packages) for extra, packages in EXTRAS.items()
    }
    assert set(found.extras) == set(EXTRAS)


def test_an_extra_without_a_package_is_shown(found, monkeypatch):
    monkeypatch.setitem(EXTRAS, "ray", ("ray", "no-such-package"))
    assert missing_of("ray")[-1:] == ["no-such-package"]
    text = printed(replace(found, extras={"hf": [], "ray": ["no-such-package"]}))
    assert "hf" in text and "ray (without no-such-package)" in text


def test_json(found):
    result = CliRunner().invoke(app, ["info", "--json", "--device", "cpu"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ops"] == found.ops
    assert json.loads(result.stdout)["extras"] == found.extras
