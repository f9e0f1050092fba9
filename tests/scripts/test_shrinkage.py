"""Test the forms of shrinkage that the benchmark compares."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import shrinkage
from dave_fast.explain.explainer import DAVE
from dave_fast.ops.robust_mean import robust_mean_variance
from dave_fast.ops.shrink import shrink
from tests.tiny import random_vit


def noisy(samples: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a signal (C, H, W), a square on nothing, and samples (S, C, H, W) of it with noise."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.zeros(3, 40, 40)
    signal[:, 12:28, 12:28] = 1
    return signal, signal + noise * torch.randn(samples, 3, 40, 40, generator=generator)


@pytest.mark.parametrize("form", shrinkage.FORMS)
def test_equal_samples_give_their_sum(form):
    signal, samples = noisy(8, 0.0)
    found = shrinkage.FORMS[form](shrinkage.Samples.of(samples))
    assert torch.allclose(found, signal.double().sum(0), atol=1e-9)


@pytest.mark.parametrize("form", [name for name in shrinkage.FORMS if name != "paper"])
def test_noise_beside_a_signal_is_taken_away(form):
    samples = noisy(16, 2.0)[1]
    of = shrinkage.Samples.of(samples)
    away = torch.zeros(40, 40, dtype=torch.bool)
    away[:6], away[34:] = True, True
    left = shrinkage.FORMS[form](of)[away].square().mean() / of.sum[away].square().mean()
    assert left < 0.8


def test_shrink_is_the_op():
    _, samples = noisy(16, 1.0)
    expected = shrink(*robust_mean_variance(samples[None]))[0, 0].double()
    assert torch.equal(shrinkage.FORMS["shrink"](shrinkage.Samples.of(samples)), expected)


def test_the_variance_of_the_samples_is_that_of_the_op():
    of = shrinkage.Samples.of(noisy(16, 1.0)[1])
    assert torch.allclose(of.deviations.square().sum(0) / of.divisor, of.variance, rtol=1e-5)


def test_tables_of_both_halves_are_written(tmp_path, monkeypatch):
    explainer = DAVE(random_vit(), precision="fp32", noise_alpha=0.1)
    monkeypatch.setattr(shrinkage, "SIZES", (4, 8))
    monkeypatch.setattr(shrinkage, "PAGE", tmp_path / "page.md")
    side = explainer.model.patch_embed.img_size[0]
    examples = []
    for number in range(4):
        image = torch.randn(3, side, side, generator=torch.Generator().manual_seed(number))
        examples.append((image, dict.fromkeys(range(100), image[0] > 0)))
    monkeypatch.setitem(shrinkage.LIMITS, "scenes", 16)
    shrinkage.measure("scenes", explainer, iter(examples), tmp_path / "scenes.json")
    content = json.loads((tmp_path / "scenes.json").read_text())
    assert content["chosen on"] == 2 and len(content["scores"]) == 4
    shrinkage.PAGE.write_text("# Shrinkage\n\n## Tables\n\nof an earlier run\n")
    shrinkage.write({"scenes": tmp_path / "scenes.json"})
    text = shrinkage.PAGE.read_text()
    assert "of an earlier run" not in text
    assert text.count("| paper |") == 2 and "### Scenes, held out: 2" in text
