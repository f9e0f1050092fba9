"""Test what commands say while they work: the model, and where output is no terminal a line every few seconds."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dave_fast.cli import terminal
from dave_fast.cli.app import app
from dave_fast.defaults import DEFAULT_MODEL
from dave_fast.errors import InputError
from dave_fast.models.spec import ModelSpec
from dave_fast.run.progress import Bar, Tally

OFTEN_S = 0.02


@pytest.fixture
def log(monkeypatch):
    """A console that writes to a file, and prints lines often."""
    monkeypatch.setattr(terminal, "LOG_S", OFTEN_S)
    return Console(file=io.StringIO())


def wait_for(log, text):
    until = time.monotonic() + 10
    while text not in log.file.getvalue():
        assert time.monotonic() < until, log.file.getvalue()
        time.sleep(OFTEN_S)


def test_what_takes_long_is_told_again_with_its_seconds(log):
    with terminal.waiting(log, "loading it") as say:
        wait_for(log, "loading it, 0 s\n")
        say("warming up")
        wait_for(log, "warming up, 0 s\n")
    told = log.file.getvalue()
    time.sleep(3 * OFTEN_S)
    assert log.file.getvalue() == told


def test_progress_is_told_also_while_nothing_changes(log):
    with terminal.progress(log, "tuning") as update:
        wait_for(log, "tuning, 0 s\n")
        update(2, 8, "noise_alpha")
        wait_for(log, "noise_alpha: 2 of 8 samples, 0 s\n" * 2)


def test_what_takes_short_says_nothing():
    log = Console(file=io.StringIO())
    with terminal.progress(log, "tuning") as update:
        update(1, 8, "noise_alpha")
    assert log.file.getvalue() == ""


def test_an_error_ends_the_lines(log):
    with pytest.raises(InputError), terminal.waiting(log, "loading it"):
        raise InputError("refused")
    told = log.file.getvalue()
    time.sleep(3 * OFTEN_S)
    assert log.file.getvalue() == told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "model: demo\n"),
        ({"random_weights": True}, "model: demo, random weights\nnote: the weights are random: the maps"),
        ({"weights": __file__}, f"model: demo, weights {__file__}\n"),
    ],
)
def test_the_model_is_told_in_a_line(settings, words):
    log = terminal.console()
    log.file = io.StringIO()
    with terminal.loading(log, ModelSpec("demo", **settings)):
        pass
    assert log.file.getvalue().startswith(words)


def test_a_run_says_every_few_seconds_that_it_loads(monkeypatch):
    monkeypatch.setattr(Bar, "LOADING_S", 0.0)
    log = Console(file=io.StringIO())
    with Bar(log, 3) as bar:
        bar.update(Tally(workers=1))
        assert log.file.getvalue() == "loading the model, 0 s\n"
        working = Tally(workers=1)
        working.begin()
        bar.update(working)
    assert log.file.getvalue() == "loading the model, 0 s\n"


@pytest.mark.parametrize("command", ["explain", "run", "evaluate", "tune", "serve", "bench"])
def test_every_command_has_the_same_default_model(command):
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert f"[default: ({DEFAULT_MODEL})]" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "photo.png"],
        ["run", "photos"],
        ["evaluate", "photos"],
        ["tune", "photos"],
        ["serve", "--port", "0"],
        ["bench", "--op", "row_rstd", "--no-tests"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_default_model_is_printed_before_it_is_loaded(arguments, tmp_path, monkeypatch):
    from dave_fast.models.demo import demo_scene

    (tmp_path / "photos").mkdir()
    for place in ("photo.png", "photos/a.png", "photos/b.png", "photos/c.png"):
        demo_scene().image.save(tmp_path / place)

    def stop(*_, **__):
        raise InputError("no model is loaded here")

    places = ("explain.explainer.load_model", "serve.models.load_models", "bench.measure.run", "run.runner.run_dataset")
    for place in places:
        monkeypatch.setattr(f"dave_fast.{place}", stop)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "no model is loaded here" in done.output, done.output
    model = f"{DEFAULT_MODEL}, random weights" if arguments[0] == "bench" else DEFAULT_MODEL
    assert f"model: {model}" in done.stderr.replace('"message": "', "\n")


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_without_images_it_is_the_demo_and_says_so(command, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise InputError("no model is loaded here")

    monkeypatch.setattr("dave_fast.explain.explainer.load_model", stop)
    done = CliRunner().invoke(app, [command, "--out", str(tmp_path / "out")])
    assert "no images are given: the embedded scenes, and the embedded model\nmodel: demo\n" in done.stderr


# --config of the server


@pytest.fixture
def loaded(monkeypatch):
    """What the server would load: names, devices, keywords."""
    found = {}

    def load(names, devices, **settings):
        found.update(settings, names=names)
        raise InputError("no model is loaded here")

    monkeypatch.setattr("dave_fast.serve.models.load_models", load)
    return found


@pytest.fixture
def config(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    path = tmp_path / "tuned.toml"
    path.write_text(
        'model = "vit_tiny_patch16_224"\nweights = "mine.safetensors"\nnum_classes = 7\nlink = "sigmoid"\n'
        "noise_alpha = 0.25\nn_samples = 33\nshrink = false\n"
    )
    return path


@pytest.mark.parametrize("models", [[], ["vit_tiny_patch16_224"], ["mine=vit_tiny_patch16_224"]])
def test_a_server_takes_a_configuration(loaded, config, models):
    done = CliRunner().invoke(app, ["serve", *models, "--port", "0", "--config", str(config)])
    assert "no model is loaded here" in done.output, done.output
    assert loaded["names"] == (models or ["vit_tiny_patch16_224"])
    assert loaded["weights"] == str(config.parent / "mine.safetensors")
    assert (loaded["num_classes"], loaded["link"]) == (7, "sigmoid")
    assert (loaded["noise_alpha"], loaded["shrink"]) == (0.25, False)
    assert "n_samples = 33" in done.stderr and "each request says" in done.stderr


def test_the_command_line_of_a_server_comes_before_its_configuration(loaded, config):
    options = ["--noise-alpha", "0.5", "--shrink", "--num-classes", "9"]
    CliRunner().invoke(app, ["serve", "--port", "0", "--config", str(config), *options])
    assert (loaded["num_classes"], loaded["noise_alpha"], loaded["shrink"]) == (9, 0.5, True)


def test_a_configuration_of_another_model_gives_no_weights(loaded, config):
    CliRunner().invoke(app, ["serve", "demo", "--port", "0", "--config", str(config)])
    assert loaded["names"] == ["demo"] and loaded["weights"] is None and loaded["num_classes"] is None


def test_a_configuration_with_several_models_is_refused(loaded, config):
    done = CliRunner().invoke(app, ["serve", "demo", "vit_tiny_patch16_224", "--port", "0", "--config", str(config)])
    assert done.exit_code == 2 and "--config belongs to one model, and 2 are named" in done.stderr
    assert not loaded


def test_the_file_of_a_server_that_is_not_there_is_refused(loaded, tmp_path):
    done = CliRunner().invoke(app, ["serve", "demo", "--port", "0", "--weights", str(tmp_path / "none")])
    assert done.exit_code == 2 and "--weights: there is no file" in done.stderr
    assert not loaded
