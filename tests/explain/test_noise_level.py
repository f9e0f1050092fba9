"""The noise level of a model: the authors' where there is one, else by the scale of its pixels."""

import logging
import math

import pytest
import torch
from torch import nn
from torchvision.transforms import Normalize

from dave_fast import DAVE
from dave_fast.explain import inputs
from dave_fast.explain.noise_level import LEVEL, PHOTOGRAPHS, level_for
from dave_fast.models.catalog import noise_alpha_for
from tests.tiny import named_vit, random_vit


def divided_by(*std, **sizes):
    """Return a ViT whose configuration divides its pixels by these."""
    model = random_vit(**sizes)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.0,) * len(std), "std": std}
    return model


def ratio(alpha, spread):
    """Return the ratio of noise to image at the highest level."""
    return math.sqrt(1 - (1 - alpha) ** 2) / ((1 - alpha) * spread)


def test_the_authors_levels_stand_for_the_models_that_they_name():
    assert noise_alpha_for("deit3_base_patch16_224.fb_in1k") == 0.9
    assert noise_alpha_for("vit_base_patch16_224") == 0.3
    assert noise_alpha_for("vit_base_patch16_224.augreg2_in21k_ft_in1k") == 0.3
    assert noise_alpha_for("vit_base_patch16_224.dino") is None
    assert noise_alpha_for("vit_tiny_patch16_224") is None


@pytest.mark.parametrize("spread", [1.0, 0.45, 0.226, 0.05])
def test_every_spread_gets_the_same_ratio_of_noise(spread):
    # two digits are kept
    assert ratio(level_for(spread), spread) == pytest.approx(ratio(LEVEL, 1.0), rel=0.03)


@pytest.mark.parametrize(("spread", "level"), [(1.0, LEVEL), (60.0, LEVEL), (0.0, 0.0)])
def test_the_level_of_a_spread(spread, level):
    assert level_for(spread) == level


@pytest.mark.parametrize(
    ("std", "spread"),
    [((0.229, 0.224, 0.225), 1.0), ((0.5, 0.5, 0.5), PHOTOGRAPHS / 0.5), ((1.0, 1.0, 1.0), PHOTOGRAPHS)],
)
def test_the_scale_of_the_pixels_decides(std, spread):
    assert DAVE(divided_by(*std)).sampling.noise_alpha == level_for(spread)


def test_a_normalisation_inside_of_the_model_decides():
    whole = nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), divided_by(0.5, 0.5, 0.5))
    assert DAVE(whole).sampling.noise_alpha == level_for(PHOTOGRAPHS)


def test_the_sign_of_a_normalisation_does_not_decide():
    levels = [
        DAVE(nn.Sequential(Normalize([0.5] * 3, [std] * 3), divided_by(0.5, 0.5, 0.5))).sampling.noise_alpha
        for std in (5.0, -5.0)
    ]
    assert levels == [LEVEL] * 2


def test_a_level_of_the_authors_follows_a_normalisation_ahead_of_the_model():
    model = random_vit()
    model.pretrained_cfg = {"architecture": "vit_base_patch16_224", "tag": "augreg2_in21k_ft_in1k"}
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert DAVE(model).sampling.noise_alpha == 0.3
    whole = DAVE(nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), model)).sampling.noise_alpha
    assert ratio(whole, 0.5) == pytest.approx(ratio(0.3, 1.0), rel=0.03)


def test_precision_and_weights_do_not_decide():
    levels = {
        DAVE(divided_by(0.5, 0.5, 0.5, seed=n), precision=p).sampling.noise_alpha for n, p in ((0, "fp32"), (1, "bf16"))
    }
    assert levels == {level_for(PHOTOGRAPHS / 0.5)}


@pytest.mark.parametrize(
    "sizes",
    [{"in_chans": 1}, {"in_chans": 4}, {"in_chans": 6}, {"img_size": (32, 48)}, {"num_classes": 0}, {"num_classes": 1}],
)
def test_a_model_that_describes_no_pixels_gets_the_level_of_imagenet(sizes):
    assert DAVE(random_vit(**sizes)).sampling.noise_alpha == LEVEL


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)},
        {"input_size": 32, "mean": None},
        {"input_size": (3, 32, 32), "std": (math.nan,) * 3},
        {"input_size": (3, 32, 32), "std": (math.inf,) * 3},
    ],
)
def test_a_description_that_cannot_be_read_gets_a_plain_level_and_a_line(config, caplog):
    model = random_vit()
    model.pretrained_cfg = config
    with caplog.at_level(logging.INFO, "dave_fast"):
        assert DAVE(model).sampling.noise_alpha == LEVEL
    assert "unknown scale" in caplog.text


def test_a_shortage_of_memory_is_raised(monkeypatch):
    def short(model):
        raise MemoryError

    monkeypatch.setattr(inputs, "preprocessing", short)
    with pytest.raises(MemoryError):
        DAVE(random_vit())


def test_weights_that_are_not_finite_get_a_level():
    model = random_vit()
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    assert DAVE(model).sampling.noise_alpha == LEVEL


def test_what_was_chosen_is_said_in_one_line(caplog):
    with caplog.at_level(logging.INFO, "dave_fast"):
        DAVE(named_vit(["ant", "bee"]))
    (line,) = caplog.messages
    assert "noise_alpha is 0.1" in line
    assert "0.229, 0.224, 0.225" in line
    assert "noise_alpha=" in line
    caplog.clear()
    with caplog.at_level(logging.INFO, "dave_fast"):
        DAVE(named_vit(["ant", "bee"]), noise_alpha=0.3)
    assert not caplog.messages
