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
import torch
from typer.testing import CliRunner

from dave_fast import __version__
from dave_fast.cli.app import app
from dave_fast.cli.info import EXTRAS, Device, Info, collect, missing_of, render
from dave_fast.ops import _ext, _registry, precision


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


MACHINES = {
    "no bfloat16": ((False, False, False), "fp32", "fp32"),
    "VNNI alone": ((False, False, True), "fp32", "int8"),
    "bfloat16 alone": ((True, False, False), "bf16", "bf16"),
    "bfloat16 and VNNI": ((True, False, True), "bf16", "int8"),
    "AMX": ((True, True, True), "bf16", "bf16"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_precisions_and_the_fastest_of_them_follow_the_machine(monkeypatch, machine):
    (bf16, tiles, bytes_), usual, fastest = MACHINES[machine]
    monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(_ext, "unavailable", lambda: None)
    monkeypatch.setattr(_ext, "multiplies_bytes", lambda: bytes_)
    found = collect("cpu")
    assert [name for name, said in found.precisions.items() if said == "default"] == [usual]
    assert found.fastest == fastest
    assert (found.precisions["int8"] == "yes") == bytes_ and found.precisions["fp64"] == "yes"
    assert "neither AVX512-VNNI" in found.precisions["int8"] or bytes_
    text = printed(found)
    assert "fp8: no: a CPU does not multiply e4m3" in text
    assert text.count("the fastest here") == 1 and f"the fastest here: --precision {fastest}" in text
    assert ("bf16: no: this CPU does not multiply bfloat16" in text) != bf16


def test_a_device_that_is_not_here_has_no_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = collect("cuda")
    assert found.precisions == {} and found.fastest is None and "precisions" not in printed(found)


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
    assert json.loads(result.stdout)["precisions"] == found.precisions
    assert json.loads(result.stdout)["fastest"] == found.fastest
