"""Test tuning: the rule on curves with known answers, the number of samples, and a run on a small model."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dave_fast import DAVE
from dave_fast.cli.app import app
from dave_fast.cli.config import load_config
from dave_fast.errors import InputError
from dave_fast.evaluate.tuning import _decisions, choose_alpha, samples_for, tune
from tests.tiny import random_head_vit

NOISE = np.random.default_rng(0).normal(0, 0.01, (4, 8))
EASY = np.ones(4)


def curve(*means, noise=NOISE):
    return np.array(means)[:, None] + noise


@pytest.mark.parametrize(
    ("means", "kept", "chosen"),
    [
        pytest.param((0.9, 0.7, 0.5, 0.3), EASY, 0, id="falling"),
        pytest.param((0.3, 0.5, 0.9, 0.6), EASY, 2, id="a maximum inside"),
        pytest.param((0.3, 0.5, 0.7, 0.9), EASY, 3, id="rising"),
        pytest.param((0.3, 0.5, 0.7, 0.9), [1, 0.8, 0.49, 0.3], 1, id="rising, but the decision is lost"),
        pytest.param((0.3, 0.5, 0.7, 0.9), [0.4, 0.3, 0.2, 0.1], 0, id="the decision is lost at once"),
    ],
)
def test_the_choice_on_curves_with_a_known_answer(means, kept, chosen):
    assert choose_alpha(curve(*means), np.array(kept))[0] == chosen


def test_nearly_equal_scores_choose_more_noise():
    assert choose_alpha(curve(0.9, 0.91, 0.895, 0.5, noise=0 * NOISE), EASY) == (2, 1)
    assert choose_alpha(curve(0.9, 0.91, 0.89, 0.5, noise=0 * NOISE), EASY) == (1, 1)
    assert choose_alpha(curve(-0.2, -0.1, -0.3, -0.5, noise=0 * NOISE), EASY) == (1, 1)


def test_an_image_with_a_constant_map_is_left_out():
    values = curve(0.3, 0.5, 0.9, 0.6)
    values[:, 0] = np.nan
    assert choose_alpha(values, EASY)[0] == 2


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
    first, second = (
        tune(explainer, images, alphas=(0.0, 0.3, 0.6), progress=lambda *a: seen.append(a)) for _ in range(2)
    )
    assert first.noise_alpha in (0.0, 0.3, 0.6)
    assert (first.noise_alpha, first.n_samples) == (second.noise_alpha, second.n_samples)
    np.testing.assert_array_equal(first.repeatability, second.repeatability)
    assert first.repeatability.shape == (3, 3)
    assert (first.kept <= 1).all()
    assert first.kept[0] >= first.kept[-1]
    errors = list(first.errors.values())
    assert errors[0] > errors[-1] > 0
    assert explainer.sampling.noise_alpha == 0.25
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ((2, 3, 32, 32), {}, "three or more"),
        ((3, 3, 32, 32), {"alphas": (0.5, 0.1)}, "rise"),
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
    assert tune(explainer, images, alphas=(0.0, 1.0)).kept[-1] < 1


def test_a_regression_has_no_decision_to_keep():
    model = random_head_vit()
    model.link = None
    explainer = DAVE(model, precision="fp32", noise_alpha=0.25)
    with pytest.raises(InputError, match="decide nothing"):
        tune(explainer, torch.zeros(3, 3, 32, 32), alphas=(0.0, 0.3))


def test_the_command_writes_a_file_that_other_commands_take(tmp_path, monkeypatch):
    monkeypatch.setattr("dave_fast.evaluate.tuning.SAMPLES", 2)
    monkeypatch.setattr("dave_fast.evaluate.tuning.ERROR_SAMPLES", 8)
    result = CliRunner().invoke(app, ["tune", "--images", "3", "--precision", "fp32", "--out", str(tmp_path / "tuned")])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "tuned" / "dave-fast.toml")
    assert config.model == "demo"
    assert f"noise_alpha = {config.noise_alpha:g}" in result.output
    assert f"n_samples = {config.n_samples}" in result.output
    assert (tmp_path / "tuned" / "tune.png").stat().st_size > 10_000


def test_the_command_refuses_before_it_loads(tmp_path):
    for arguments, said in ((["nowhere"], "no file or folder"), (["--model", "x"], "name images")):
        result = CliRunner().invoke(app, ["tune", *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert said in result.output
