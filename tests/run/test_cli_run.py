"""Tests of the commands `run` and `export`: output and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import dave_fast
from dave_fast.cli.app import app
from dave_fast.models.demo import demo_scene

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene = np.asarray(demo_scene().image)
    for number in range(3):
        Image.fromarray(np.roll(scene, 9 * number, 1)).save(folder / f"{number}.png")
    return folder


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_run_resume_and_export(photos, tmp_path):
    out = tmp_path / "run"
    settings = ("--model", "demo", "--n-samples", 2, "--precision", "fp32", "--out", out)
    result = call("run", photos, *settings, "--limit", 2)
    assert "2 maps made" in result.stdout and "2 records in 1 shards" in result.stdout
    assert "noise_alpha is 0.023 for demo" in result.stderr
    (photos / "bad.png").write_bytes(b"no image")
    result = call("run", photos, *settings, code=2)
    assert "source.records: 3 before, 4 now" in result.stderr
    (photos / "bad.png").unlink()
    result = call("run", photos, *settings)
    assert "resuming: 2 records are done" in result.stderr and "1 maps made" in result.stdout
    result = call("export", out, "--to", "npy", "--out", tmp_path / "npy", "--limit", 2)
    assert "2 maps of pixels written" in result.stdout and np.load(tmp_path / "npy/maps.npy").shape == (2, 128, 128)
    result = call("export", out, "--to", "npy", "--out", tmp_path / "npy", code=2)
    assert "exists already" in result.stderr


def test_bad_image_is_told(photos, tmp_path):
    (photos / "bad.png").write_bytes(b"no image")
    result = call("run", photos, "--model", "demo", "--n-samples", 1, "--out", tmp_path / "run", code=1)
    assert "failed: bad.png: cannot read" in result.stderr and "1 records have an error" in result.stdout
    assert "3 maps made" in result.stdout


def test_config_file(photos, tmp_path):
    (tmp_path / "c.toml").write_text('model = "demo"\nnoise_alpha = 0.25\nn_samples = 3\nshrink = false\n')
    call("run", photos, "--config", tmp_path / "c.toml", "--out", tmp_path / "a")
    made = json.loads((tmp_path / "a/run.json").read_bytes())["configuration"]
    assert (made["model"], made["n_samples"], made["sampling"]["noise_alpha"]) == ("demo", 3, 0.25)
    assert made["shrink"] is False
    others = ("--n-samples", 1, "--noise-alpha", 0, "--shrink")
    call("run", photos, "--config", tmp_path / "c.toml", *others, "--out", tmp_path / "b")
    made = json.loads((tmp_path / "b/run.json").read_bytes())["configuration"]
    assert (made["n_samples"], made["sampling"]["noise_alpha"], made["shrink"]) == (1, 0.0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "dask"), "engine is 'dask'"),
        (("--map-dtype", "int4"), "--map-dtype is 'int4'"),
        (("--seed", 2**63), "expected an integer of 64 bits"),
        (("--weights", "none.pth"), "there is no file none.pth"),
        (("--random-weights", "--weights", __file__), "exclude each other"),
        (("--devices", ","), "--devices is ','"),
        (("--devices", "tpu"), "'tpu'"),
        (("--target", "walrus"), "no class has it"),
        (("--target", "fuor"), "did you mean four (4)"),
        (("--target", "label"), "only tars and datasets have labels"),
        (("--precision", "fp3"), "fp3"),
    ],
)
def test_refusals(photos, tmp_path, options, message):
    result = call("run", photos, "--model", "demo", "--out", tmp_path / "run", *options, code=2)
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_a_real_run(photos, tmp_path):
    """Ctrl-C stops the real program, with its processes, in the middle of an image."""
    root = Path(dave_fast.__file__).parent.parent
    command = [sys.executable, "-m", "dave_fast", "run", photos, "--model", "demo", "--out", tmp_path / "run"]
    program = subprocess.Popen(
        [*map(str, command), "--n-samples", "5000"],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while not (tmp_path / "run/run.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(2)
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=300)
    assert program.returncode == 130, err
    assert "stopping" in err and "stopped before the end" in out
