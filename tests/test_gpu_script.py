"""scripts/gpu, rehearsed on the CPU: its stages, its files, and what it does with a stage that fails or hangs."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from benchmarks import side_by_side

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu"


@pytest.fixture
def script():
    """The script as a module."""
    loader = SourceFileLoader("gpu_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_script", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    loader.exec_module(module)
    yield module
    del sys.modules["gpu_script"]


def rehearse(out, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "OUT"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_rehearsal(done, out, names):
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    states = {stage["name"]: stage["state"] for stage in results["stages"]}
    assert list(states) == names
    for name, state in states.items():
        assert state == ("not run: needs a GPU" if name in ("machine", "peers", "sanitizer", "tune") else "passed")
    assert results["machine"]["rehearsal"] is True and results["machine"]["commit"]
    assert (out / "table.txt").read_text().strip() in done.stdout
    return results


def test_a_rehearsal_leaves_four_files_and_says_what_was_not_run(tmp_path):
    names = ["machine", "tests", "sanitizer", "tune", "bench"]
    results = check_rehearsal(rehearse(tmp_path, "--only", *names), tmp_path, names)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        *("table.txt", "results.json", "logs.txt", "files.tar.gz")
    }
    assert results["bench"]["ops"][0]["op"] == "row_rstd"
    assert "passed" in (tmp_path / "logs.txt").read_text()
    with tarfile.open(tmp_path / "files.tar.gz") as archive:
        assert "docs/performance.md" in archive.getnames()


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path, script):
    names = [stage.name for stage in script.stages(tmp_path, "90a")]
    results = check_rehearsal(rehearse(tmp_path), tmp_path, names)
    assert {"goals", "first_linear", "first_attention", "first_pixels", "first_rows", "suites"} <= set(results)


def test_an_unknown_stage_is_refused_with_the_names(tmp_path):
    done = rehearse(tmp_path, "--only", "polish")
    assert done.returncode == 2
    assert "no such stage: polish" in done.stdout and "goals" in done.stdout


def test_without_a_gpu_every_stage_fails_plainly(tmp_path, script, monkeypatch):
    monkeypatch.setattr(script, "probe", lambda: {"torch": "2.11"})
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--only", "machine"])
    assert script.main() == 1
    assert "PyTorch sees no GPU" in (tmp_path / "table.txt").read_text()


def stage(script, *commands, limit=20.0):
    return script.Stage("x", "", limit, [], [[sys.executable, "-c", code] for code in commands])


def test_a_failed_or_hanging_stage_does_not_stop_the_next(tmp_path, script, monkeypatch):
    hanging = stage(script, "import subprocess, sys; subprocess.run(['sleep', '60'])", limit=2.0)
    failing = stage(script, "print('oh'); raise SystemExit(3)", "print('never')")
    missing = script.Stage("x", "", 5.0, [], [["no-such-program"]])
    good = stage(script, "print('fine')")
    monkeypatch.setattr(script, "stages", lambda *_: [hanging, failing, missing, good])
    monkeypatch.setattr(script, "probe", dict)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(tmp_path)])
    began = time.monotonic()
    assert script.main() == 1
    assert time.monotonic() - began < 20
    states = [each["state"] for each in json.loads((tmp_path / "results.json").read_text())["stages"]]
    assert states == ["out of time", "failed", "failed", "passed"]
    logs = (tmp_path / "logs.txt").read_text()
    assert "never" not in logs.replace("print('never')", "") and "no-such-program is not installed" in logs


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path, script, monkeypatch):
    monkeypatch.setattr(script, "stages", lambda *_: [stage(script, "pass")])
    monkeypatch.setattr(script, "probe", dict)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--minutes", "0.1", "--out", str(tmp_path)])
    assert script.main() == 0
    assert "not run: no time left" in (tmp_path / "table.txt").read_text()


def test_what_a_stage_names_is_there(script, tmp_path):
    """Modules, test folders and CMake targets that only a GPU machine would miss."""
    commands = [part for each in script.stages(tmp_path, "90a") for command in each.commands for part in command]
    root = SCRIPT.parents[1]
    for path in ("tests/gpu", "tests/kernels", "benchmarks"):
        assert path in commands and (root / path).is_dir()
    assert "tests/test_cuda_engine.py" in commands and (root / "tests" / "test_cuda_engine.py").is_file()
    assert {"benchmarks.first_measurements", "benchmarks.side_by_side"} <= set(commands)
    assert f"--benchmark-json={tmp_path}/suites.json" in commands


def test_every_comparison_is_one_that_the_benchmark_takes(script, tmp_path):
    """Options that only a GPU machine would find wrong, the authors' code at a path with a space among them."""
    authors = tmp_path / "their code"
    stages = script.stages(tmp_path, "90a", authors)
    module = "benchmarks.side_by_side"
    commands = [command for each in stages for command in each.commands if module in command]
    parsed = [side_by_side.parser().parse_args(command[command.index(module) + 1 :]) for command in commands]
    assert {each.out.name for each in parsed} >= {"goals.json", "px672.json", "s200.json", "s8.json", "peers.json"}
    assert [each.authors for each in parsed if "authors" in each.groups] == [authors]
    assert "authors" not in {each.name for each in script.stages(tmp_path, "90a")}
