"""Test that errors of the library name options on the command line."""

from __future__ import annotations

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dave_fast.cli import terminal
from dave_fast.cli.app import app
from dave_fast.cli.hints import as_options, options_of
from dave_fast.errors import InputError
from dave_fast.models.demo import demo_scene


class Context:
    def __init__(self, command):
        self.command = get_command(app).commands[command]


OPTIONS = options_of(Context("explain"))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Use backend='auto', or see `dave-fast info`.", "Use --backend auto, or see `dave-fast info`."),
        ("try precision='bf16'", "try --precision bf16"),
        ("n_samples is 0; expected 1 or more", "--n-samples is 0; expected 1 or more"),
        ("internal_batch_size is 0", "--internal-batch-size is 0"),
        ("num_classes=5 without weights", "--num-classes 5 without weights"),
        ("leave image_size out.", "leave --image-size out."),
        ("of target=, targets= and top_k= more than one", "of --target, --target and --top-k more than one"),
        ("for each image give targets=[...]; or", "for each image give --target [...]; or"),
        ("give shrink=False", "give --no-shrink"),
        ("give shrink=True", "give --shrink"),
        ("the file 'n_samples' and --n-samples stay", "the file 'n_samples' and --n-samples stay"),
        ("in my/n_samples or n_samples.toml", "in my/n_samples or n_samples.toml"),
        ("precision is 'fp3'; expected one of fp64", "precision is 'fp3'; expected one of fp64"),
        ("use graphs=None, global_pool='' or other_words", "use graphs=None, global_pool='' or other_words"),
        ("depth='pixels', device='cuda:1'", "--depth pixels, --device cuda:1"),
        ("noise_alpha=0.5%", "--noise-alpha 0.5%"),
    ],
)
def test_keywords_become_options(said, told):
    assert as_options(said, OPTIONS) == told


def test_another_command_has_other_options():
    tune = options_of(Context("tune"))
    assert as_options("n_samples is 0, seed=3", tune) == "n_samples is 0, --seed 3"
    assert as_options("device='cpu'", options_of(Context("run"))) == "--device cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--internal-batch-size", "0"], "'--internal-batch-size'"),
        (["--num-classes", "5"], "--num-classes 5 without weights"),
        (["--image-size", "64"], "leave --image-size out"),
        (["--top-k", "11"], "--top-k is 11, and the model has 10 classes"),
        (["--precision", "fp8"], "--precision fp8 was asked for"),
        (["--backend", "cuda"], "Use --backend auto"),
    ],
)
def test_errors_of_the_library_as_the_command_prints_them(arguments, words, tmp_path, monkeypatch):
    demo_scene().image.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["explain", "photo.png", "--model", "demo", "--n-samples", "1", *arguments])
    assert done.exit_code == 2 and words in " ".join(done.stderr.split()), done.stderr


def test_outside_of_a_command_messages_stay(capsys):
    terminal._options.set({})
    terminal.refuse(InputError("n_samples is 0"))
    assert capsys.readouterr().err == "error: n_samples is 0\n"


def test_keys_of_a_configuration_stay_keys(tmp_path):
    (tmp_path / "c.toml").write_text("noise_alpha = 2\n")
    done = CliRunner().invoke(app, ["explain", "x.png", "--config", str(tmp_path / "c.toml")])
    assert f"error: {tmp_path}/c.toml: 'noise_alpha' is 2.0; expected 0 to 1.\n" == done.stderr
    (tmp_path / "c.toml").write_text("alpha = 2\n")
    done = CliRunner().invoke(app, ["explain", "x.png", "--config", str(tmp_path / "c.toml")])
    assert "has the key 'alpha'; expected only 'model', 'noise_alpha', 'n_samples'," in done.stderr
