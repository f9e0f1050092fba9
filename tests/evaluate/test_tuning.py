"""Test tuning: the choice with known answers, the number of samples, and a run on a small model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dave_fast import DAVE
from dave_fast.cli.app import app
from dave_fast.cli.config import load_config
from dave_fast.errors import InputError
from dave_fast.evaluate.tuning import _decisions, choose_alpha, samples_for, tune
from dave_fast.explain.noise_level import level_for
from dave_fast.targets import tokens_of
from tests.tiny import random_head_vit

ALPHAS = np.array([0.0, 0.1, 0.2, 0.4])


@pytest.mark.parametrize(
    ("spread", "kept", "chosen"),
    [
        pytest.param(1.0, [1, 1, 1, 1], 0.1, id="normalised as ImageNet's"),
        pytest.param(0.5, [1, 1, 1, 1], level_for(0.5), id="half of that"),
        pytest.param(1.0, [1, 0.5, 0.4, 0.3], 0.1, id="just kept"),
        pytest.param(1.0, [1, 0.4, 0.3, 0.2], 0.05, id="lost, but not at the half"),
        pytest.param(1.0, [0.4, 0.3, 0.2, 0.1], 0.0, id="lost at once"),
        pytest.param(1.0, [np.nan] * 4, 0.1, id="no decision"),
    ],
)
def test_the_choice_on_curves_with_a_known_answer(spread, kept, chosen):
    assert choose_alpha(spread, ALPHAS, np.array(kept)) == chosen


def test_samples_follow_the_square_of_the_error():
    wanted = np.sqrt(1 - 0.9**2)
    assert samples_for(0.9, 64, wanted) == 64
    assert samples_for(0.9, 64, 2 * wanted) == 256
    assert samples_for(0.99, 64, 1e-6) == 2
    assert samples_for(0.999, 64, 5.0) == 1000


@pytest.fixture
def explainer():
    return DAVE(random_head_vit(), precision="fp32", noise_alpha=0.25)


def test_a_model_is_tuned_repeatably_and_left_as_it_was(explainer):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    first, second = (tune(explainer, images, progress=lambda *a: seen.append(a)) for _ in range(2))
    assert first.spread == pytest.approx(1, abs=0.05)
    assert first.noise_alpha in (level_for(first.spread), 0.05)
    assert (first.noise_alpha, first.n_samples) == (second.noise_alpha, second.n_samples)
    np.testing.assert_array_equal(first.kept, second.kept)
    assert (first.kept <= 1).all()
    assert first.kept[0] == 1
    assert first.kept[0] >= first.kept[-1]
    errors = list(first.errors.values())
    assert errors[0] > errors[-1] > 0
    assert explainer.sampling.noise_alpha == 0.25
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ((2, 3, 32, 32), {}, "three or more"),
        ((3, 3, 32, 32), {"quality": 1.0}, "quality"),
    ],
)
def test_models_that_cannot_be_tuned_are_refused(explainer, images, options, said):
    with pytest.raises(InputError, match=said):
        tune(explainer, torch.zeros(images), **options)


@pytest.mark.parametrize(("scores", "decisions"), [([[-1.0], [2.0]], [0, 1]), ([[1.0, 3.0], [2.0, 0.0]], [1, 0])])
def test_the_decision_of_one_logit_is_its_sign(scores, decisions):
    assert _decisions(torch.tensor(scores)).tolist() == decisions


def test_a_single_logit_is_tuned_by_its_sign():
    model = random_head_vit(num_classes=1)
    explainer = DAVE(model, precision="fp32", noise_alpha=0.25)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # about zero, so that noise changes signs
        model.head.bias -= model(images).mean()
    assert tune(explainer, images).kept[-1] < 1


def test_images_of_a_smaller_spread_get_less_noise(explainer):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert tune(explainer, images / 4).by_spread == level_for((images / 4).std().item())


def test_a_regression_is_tuned_by_its_images_alone():
    model = random_head_vit()
    model.link = None
    explainer = DAVE(model, precision="fp32", noise_alpha=0.25)
    found = tune(explainer, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert not found.decides
    assert found.noise_alpha == found.by_spread


def test_an_output_without_classes_is_refused():
    explainer = DAVE(tokens_of(random_head_vit()), precision="fp32", noise_alpha=0.25)
    with pytest.raises(InputError, match=r"scores of classes"):
        tune(explainer, torch.randn(3, 3, 32, 32))


def test_the_command_writes_a_file_that_other_commands_take(tmp_path, monkeypatch):
    monkeypatch.setattr("dave_fast.evaluate.tuning.ERROR_SAMPLES", 8)
    result = CliRunner().invoke(app, ["tune", "--images", "3", "--precision", "fp32", "--out", str(tmp_path / "tuned")])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "tuned" / "dave-fast.toml")
    assert config.model == "demo" and config.shrink is True
    assert f"noise_alpha = {config.noise_alpha:g}" in result.output
    assert f"n_samples = {config.n_samples}" in result.output
    assert "model: demo" in result.output
    assert (tmp_path / "tuned" / "tune.png").stat().st_size > 10_000


def test_the_command_refuses_before_it_loads(tmp_path):
    for arguments, said in ((["nowhere"], "no file or folder"), (["--model", "x"], "name images")):
        result = CliRunner().invoke(app, ["tune", *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert said in result.output


def test_a_folder_of_a_model_is_found_from_wherever_the_file_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("dave_fast.evaluate.tuning.ERROR_SAMPLES", 8)
    model = random_head_vit(num_classes=5)
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors", {"format": "pt"})
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": tiny}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 5, "classifier": "head"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    arguments = ["tune", "photos", "--model", "hf:./model", "--precision", "fp32", "--out", "sub/tuned"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path / "sub")
    result = CliRunner().invoke(
        app, ["explain", "../photos/1.png", "--config", "tuned/dave-fast.toml", "--out", "maps"]
    )
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "sub" / "maps").glob("1.*.npz"))) == 1
