"""dave_fast.quantus.explain, by itself and in Quantus' own metrics."""

import importlib
import warnings

import numpy as np
import pytest
import torch

from dave_fast import DAVE
from dave_fast.errors import InputError
from dave_fast.quantus import explain
from tests.tiny import random_head_vit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantus = importlib.import_module("quantus")

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = {"n_samples": 3, "noise_alpha": 0.3, "precision": "fp32"}


@pytest.fixture
def model():
    return random_head_vit()


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 3, 32, 32)).astype(np.float32), np.array([0, 4, 2])


def test_equals_the_explainer_in_numpy(model, batch):
    found = explain(model, *batch, **SETTINGS)
    expected = DAVE(model, noise_alpha=0.3, precision="fp32").explain(
        torch.from_numpy(batch[0]), torch.from_numpy(batch[1]), 3
    )
    assert (found.shape, found.dtype) == ((3, 1, 32, 32), np.float32)
    np.testing.assert_array_equal(found[:, 0], expected.raw.sum(1).numpy())
    maps = explain(model, *batch, smoothed=True, device="cpu", **SETTINGS)
    np.testing.assert_array_equal(maps[:, 0], expected.maps.numpy())


def test_the_seed_is_fixed_and_can_be_chosen(model, batch):
    first = explain(model, *batch, **SETTINGS)
    np.testing.assert_array_equal(first, explain(model, *batch, **SETTINGS))
    assert not np.array_equal(first, explain(model, *batch, seed=1, **SETTINGS))


def test_weights_that_change_in_place_are_noticed(model, batch):
    first = explain(model, *batch, **SETTINGS)
    model.blocks[1].mlp.fc1.weight.data.mul_(1.5)
    assert not np.allclose(first, explain(model, *batch, **SETTINGS))


def test_arrays_that_are_no_images_are_refused(model):
    with pytest.raises(InputError, match=r"\(3, 32, 32\)"):
        explain(model, np.zeros((3, 32, 32)), 0)


def test_parameter_randomisation_of_quantus_sees_other_maps_stage_by_stage(model, batch):
    metric = quantus.MPRT(layer_order="top_down", return_aggregate=False)
    scores = metric(model, *batch, explain_func=explain, explain_func_kwargs=SETTINGS, device="cpu")
    curves = np.array([scores[layer] for layer in scores])
    assert curves.shape[1] == 3
    # the untouched model comes first, where Quantus scores it at all
    assert np.all(np.abs(curves[-1]) < 0.9)
    assert len({round(float(value), 6) for value in curves[:, 0]}) > len(curves) // 2


def test_robustness_of_quantus_measures_the_images_only(model, batch):
    metric = quantus.MaxSensitivity(nr_samples=2, lower_bound=1e-9, return_aggregate=False)
    scores = metric(model, *batch, explain_func=explain, explain_func_kwargs=SETTINGS, device="cpu")
    assert np.all(np.array(scores) < 1e-3)
