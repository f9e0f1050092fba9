"""dave_fast.gradcam.DAVE: pytorch-grad-cam's calling convention."""

import numpy as np
import pytest
import torch

import dave_fast
from dave_fast.errors import InputError
from dave_fast.gradcam import DAVE
from tests.tiny import random_vit

SETTINGS = {"noise_alpha": 0.3, "precision": "fp32"}


class ClassifierOutputTarget:
    """A target as pytorch-grad-cam's: a callable of one image's output."""

    def __init__(self, category):
        self.category = category

    def __call__(self, model_output):
        return model_output[self.category]


@pytest.fixture(scope="module")
def model():
    return random_vit(img_size=(16, 24), num_classes=6)


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_maps_of_one_target_an_image(model, images):
    with DAVE(model, **SETTINGS) as cam:
        found = cam(input_tensor=images, targets=[ClassifierOutputTarget(3), ClassifierOutputTarget(0)], n_samples=3)
        predicted = cam(images, n_samples=3, seed=1)
    assert isinstance(found, np.ndarray) and (found.shape, found.dtype) == ((2, 16, 24), np.float32)
    assert found.min() >= 0 and found.max() == 1
    explainer = dave_fast.DAVE(model, **SETTINGS)
    np.testing.assert_array_equal(found, explainer.explain(images, [3, 0], 3).maps.numpy())
    np.testing.assert_array_equal(predicted, explainer.explain(images, None, 3, seed=1).maps.numpy())


def test_any_score_of_the_output_serves(model, images):
    with DAVE(model, **SETTINGS) as cam:
        found = cam(images, [lambda y: y[1] - y[2], lambda y: y.log_softmax(0)[1]], n_samples=2)
    explainer = dave_fast.DAVE(model, **SETTINGS)
    contrast = explainer.explain(images, dave_fast.targets.Contrast(1, 2), 2).maps[0].numpy()
    np.testing.assert_array_equal(found[0], contrast)
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("targets", [[ClassifierOutputTarget(3)], [ClassifierOutputTarget(3)] * 3], ids=len)
def test_a_list_of_another_length_is_an_error(model, images, targets):
    with DAVE(model, **SETTINGS) as cam, pytest.raises(InputError, match="for 2 images"):
        cam(images, targets)


def test_classes_are_no_callables(model, images):
    with DAVE(model, **SETTINGS) as cam, pytest.raises(InputError, match="list of callables"):
        cam(images, [3, 0])


def test_exceptions_are_raised_not_swallowed(model, images):
    with pytest.raises(IndexError), DAVE(model, **SETTINGS) as cam:
        cam(images, [ClassifierOutputTarget(77)] * 2)
    with pytest.raises(IndexError, match="mine"), DAVE(model, **SETTINGS):
        raise IndexError("mine")
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
