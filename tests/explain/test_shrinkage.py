"""Shrinkage: the paper's maps without it, the same raw in either case, the same limit, and every face passes it on."""

import numpy as np
import pytest
import torch
from PIL import Image

import dave_fast
from dave_fast import captum, gradcam, quantus
from dave_fast.errors import InputError
from dave_fast.explain.convergence import estimate, refine
from dave_fast.explain.image_files import ImageSource, Request, explain_files
from dave_fast.explain.pipeline import pipeline
from dave_fast.explain.subject import Subject
from dave_fast.ops.robust_mean import robust_mean, robust_mean_variance
from dave_fast.ops.shrink import shrink
from dave_fast.ops.smooth import smooth
from dave_fast.sampling import draw
from dave_fast.targets import Contrast
from tests.tiny import named_vit, random_vit

SETTINGS = {"precision": "fp32", "noise_alpha": 0.3}
SAMPLES = 9


@pytest.fixture(scope="module")
def model():
    return random_vit()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))


def explainer(model, **settings):
    return dave_fast.DAVE(model, **(SETTINGS | settings))


def contributions_of(made, images, target):
    """Return the contributions (B, S, C, H, W) of one micro-batch of all rows, as `explain` makes them."""
    draws = draw(SAMPLES, height=32, width=32, image_keys=[0] * len(images), sampling=made.sampling)
    (found,) = made.contributions(images, draws, torch.full((len(images), 1), target))
    return found.view(len(images), SAMPLES, *found.shape[1:])


@pytest.mark.parametrize("route", ["engine", "frozen"])
def test_without_shrinkage_maps_are_the_smoothed_robust_mean(model, images, route):
    made = explainer(model, route=route, shrink=False, internal_batch_size=2 * SAMPLES)
    found = made.explain(images, 1, n_samples=SAMPLES)
    raw = robust_mean(contributions_of(made, images, 1))
    assert torch.equal(found.raw, raw) and torch.equal(found.maps, smooth(raw))
    torch.testing.assert_close(found.signed, raw.sum(1), rtol=0, atol=0)
    assert found.shrink is False


def test_by_default_maps_are_of_shrunk_raw_and_raw_is_unchanged(model, images):
    made = explainer(model, internal_batch_size=2 * SAMPLES)
    found = made.explain(images, 1, n_samples=SAMPLES)
    raw, variance = robust_mean_variance(contributions_of(made, images, 1))
    assert torch.equal(found.raw, raw) and torch.equal(found.maps, smooth(shrink(raw, variance)))
    assert torch.equal(found.signed, shrink(raw, variance)[:, 0])
    assert found.shrink is True
    paper = explainer(model, shrink=False, internal_batch_size=2 * SAMPLES).explain(images, 1, n_samples=SAMPLES)
    assert torch.equal(found.raw, paper.raw) and not torch.equal(found.maps, paper.maps)


def test_token_cotangents_of_several_targets_in_groups_give_the_same_maps(model, images, monkeypatch):
    """In bf16 with little memory samples are aggregated in tiles, one target at a time."""
    for image in images:
        found = []
        for free in (1 << 40, 15 * 4 * 3 * 32 * 32):
            with monkeypatch.context() as patch:
                patch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device, free=free: free)
                made = explainer(model, precision="bf16", internal_batch_size=3)
                found.append(made.explain(image, targets=[1, 3], n_samples=SAMPLES))
        assert torch.equal(found[0].raw, found[1].raw) and torch.equal(found[0].maps, found[1].maps)
        assert torch.equal(found[0].signed, found[1].signed)


def test_each_of_several_targets_has_the_map_of_its_own_call(model, images):
    made = explainer(model)
    together = made.explain(images, targets=[1, 3], n_samples=SAMPLES)
    for which, target in enumerate((1, 3)):
        alone = made.explain(images, target, n_samples=SAMPLES)
        assert torch.equal(together.maps[:, which], alone.maps)
        assert torch.equal(together.signed[:, which], alone.signed)


def test_a_reversed_contrast_has_the_same_signed_map_with_the_other_sign(model, images):
    found = explainer(model).explain(images, targets=[Contrast(1, 3), Contrast(3, 1)], n_samples=SAMPLES)
    assert torch.equal(found.signed[:, 0], -found.signed[:, 1]) and (found.signed > 0).any()


def test_both_forms_have_the_same_limit(model, images):
    distances = []
    for samples in (8, 64, 512):
        shrunk, plain = (
            explainer(model, shrink=s).explain(images[0], 1, n_samples=samples).maps for s in (True, False)
        )
        distances.append(((shrunk - plain).norm() / plain.norm()).item())
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0
    assert distances[2] < 0.05


def test_one_sample_tells_no_variance_and_is_not_shrunk(model, images):
    shrunk, plain = (explainer(model, shrink=s).explain(images, 1, n_samples=1).maps for s in (True, False))
    torch.testing.assert_close(shrunk, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("setting", [True, False])
def test_aggregate_and_refine_take_the_setting_unless_told_otherwise(model, images, setting):
    made, other = (explainer(model, shrink=each) for each in (setting, not setting))
    contributions = contributions_of(made, images[:1], 1)
    own, told = made.aggregate(contributions), other.aggregate(contributions, shrink=setting)
    assert torch.equal(own[0], told[0]) and torch.equal(own[1], told[1])
    assert torch.equal(own[0], other.aggregate(contributions)[0])
    assert not torch.equal(own[1], other.aggregate(contributions)[1])
    refined, again = refine(made, contributions), refine(other, contributions, shrink=setting)
    assert torch.equal(refined.maps, own[1]) and torch.equal(again.maps, own[1])
    assert refined.shrink is again.shrink is setting
    halves = [made.aggregate(contributions[:, at : at + SAMPLES // 2])[1] for at in (0, SAMPLES // 2)]
    assert refined.errors == again.errors == estimate(own[1], *halves)


def test_nan_among_the_contributions_propagates(model):
    contributions = torch.ones(1, 5, 3, 32, 32)
    contributions[0, 2, 1, 4, 4] = torch.nan
    raw, maps = explainer(model).aggregate(contributions)
    assert raw[0, 1, 4, 4].isnan() and maps.isnan().all()


@pytest.mark.parametrize("given", [None, 1, "no"])
def test_other_values_than_booleans_are_refused(model, given):
    with pytest.raises(InputError, match="expected True, or False for the paper's maps"):
        explainer(model, shrink=given)


# Faces.


@pytest.mark.parametrize("setting", [True, False])
def test_other_packages_conventions_pass_it_on(model, images, setting):
    expected = explainer(model, shrink=setting).explain(images, 1, n_samples=3)
    shown = gradcam.DAVE(model, shrink=setting, **SETTINGS)(images, [lambda output: output[1]] * 2, n_samples=3)
    np.testing.assert_array_equal(shown, expected.maps.numpy())
    given = (model, images.numpy(), 1)
    smoothed = quantus.explain(*given, n_samples=3, smoothed=True, shrink=setting, **SETTINGS)
    np.testing.assert_array_equal(smoothed[:, 0], expected.maps.numpy())
    signed = quantus.explain(*given, n_samples=3, shrink=setting, **SETTINGS)
    np.testing.assert_array_equal(signed[:, 0], expected.raw.sum(1).numpy())
    attributed = captum.DAVE(model, shrink=setting, **SETTINGS).attribute(images, 1, n_samples=3)
    assert torch.equal(attributed, expected.raw)


@pytest.mark.parametrize("setting", [True, False])
def test_the_pipeline_passes_it_on(photo, setting):
    explain = pipeline(named_vit(["cat", "dog"]), shrink=setting, **SETTINGS)
    image, _ = explain.prepare(photo)
    (answer,) = explain(photo, target="dog", n_samples=3)
    expected = explainer(named_vit(["cat", "dog"]), shrink=setting).explain(image, 1, n_samples=3)
    np.testing.assert_array_equal(answer["map"], expected.maps[0].numpy())


@pytest.mark.parametrize("setting", [True, False])
def test_arrays_of_image_files_say_it(photo, tmp_path, setting):
    subject = Subject.of(explainer(named_vit(["cat", "dog"]), shrink=setting))
    source = ImageSource("photo", "photo.png", lambda: photo)
    (done,) = explain_files(subject, [source], Request(tmp_path, targets=("dog",), n_samples=3))
    with np.load(done.results[0].arrays) as arrays:
        assert arrays["shrink"].dtype == bool and arrays["shrink"] == setting
        expected = subject.explainer.explain(subject.prepare(photo)[0], 1, n_samples=3)
        np.testing.assert_array_equal(arrays["maps"], expected.maps.numpy())
