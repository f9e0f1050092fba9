"""Depth in other libraries' calling conventions and in the pipeline: the maps of `DAVE.explain` at that depth."""

import numpy as np
import pytest
import torch
from PIL import Image

import dave_fast
from dave_fast import captum, gradcam, quantus
from dave_fast.errors import InputError
from dave_fast.explain.pipeline import pipeline
from tests.tiny import named_vit

SETTINGS = {"noise_alpha": 0.3, "precision": "fp32"}
DEPTHS = [("pixels", "pixels"), (1, 1), (0.5, 1), ("auto", 1)]
SEVERAL = ["pixels", 1]


@pytest.fixture(scope="module")
def model():
    return named_vit(["cat", "dog", "bird"])


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))


def test_maps_at_pixels_and_at_a_block_differ(model, images):
    found = dave_fast.DAVE(model, **SETTINGS).explain(images, 1, 3, depth=SEVERAL)
    assert found.maps.shape == (2, 2, 32, 32) and not torch.equal(found.maps[:, 0], found.maps[:, 1])


@pytest.mark.parametrize("depth", [depth for depth, _ in DEPTHS])
def test_gradcam_captum_and_quantus_give_the_maps_of_explain(model, images, depth):
    expected = dave_fast.DAVE(model, **SETTINGS).explain(images, 1, 3, depth=depth)
    shown = gradcam.DAVE(model, **SETTINGS)(images, [lambda output: output[1]] * 2, n_samples=3, depth=depth)
    np.testing.assert_array_equal(shown, expected.maps.numpy())
    attributed = captum.DAVE(model, **SETTINGS).attribute(images, 1, n_samples=3, depth=depth)
    assert torch.equal(attributed, expected.raw)
    smoothed = quantus.explain(model, images.numpy(), 1, n_samples=3, smoothed=True, depth=depth, **SETTINGS)
    np.testing.assert_array_equal(smoothed[:, 0], expected.maps.numpy())
    signed = quantus.explain(model, images.numpy(), 1, n_samples=3, depth=depth, **SETTINGS)
    np.testing.assert_array_equal(signed[:, 0], expected.raw.sum(1).numpy())


@pytest.mark.parametrize(("depth", "name"), DEPTHS)
def test_answers_of_the_pipeline_have_the_map_of_explain_and_name_its_depth(model, photo, depth, name):
    explain = pipeline(model, **SETTINGS)
    image, _ = explain.prepare(photo)
    (answer,) = explain(photo, target="dog", n_samples=3, depth=depth)
    expected = dave_fast.DAVE(model, **SETTINGS).explain(image, 1, 3, depth=depth)
    np.testing.assert_array_equal(answer["map"], expected.maps[0].numpy())
    assert answer["depth"] == name


@pytest.mark.parametrize(
    ("depth", "words"),
    [(SEVERAL, r"\['pixels', 1\]; expected 'pixels', 'auto'"), (2, "blocks 0 to 1"), (-1, "depth is -1; expected")],
)
def test_several_depths_and_blocks_that_are_not_there_are_refused(model, images, photo, depth, words):
    faces = [
        lambda: gradcam.DAVE(model, **SETTINGS)(images, n_samples=1, depth=depth),
        lambda: captum.DAVE(model, **SETTINGS).attribute(images, 1, n_samples=1, depth=depth),
        lambda: quantus.explain(model, images.numpy(), 1, n_samples=1, depth=depth, **SETTINGS),
        lambda: pipeline(model, **SETTINGS)(photo, n_samples=1, depth=depth),
    ]
    for face in faces:
        with pytest.raises(InputError, match=words):
            face()
