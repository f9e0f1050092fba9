"""Agreement with Quantus where it follows the definitions, and its known departures, seen in what is installed.

When a departure is gone, its test fails: then the notes in dave_fast.evaluate.metrics
say something that is no longer so.
"""

import importlib
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dave_fast.evaluate import metrics
from dave_fast.evaluate.metrics import PROTOCOLS, perturbation_curve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantus = importlib.import_module("quantus")

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (4, 3, 8, 10)


class Linear(nn.Module):
    """A model of two classes whose logits are linear in the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(240, 2)

    def forward(self, images):
        return self.read(images.flatten(1))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    images = rng.standard_normal(SHAPE).astype(np.float32)
    maps = rng.random((4, 1, 8, 10)).astype(np.float32)
    masks = rng.random((4, 1, 8, 10)) > 0.6
    return images, np.array([0, 1, 1, 0]), maps, masks


def scored(metric, data, masks=None):
    images, classes, maps, _ = data
    return metric(Linear().eval(), images, classes, a_batch=maps, s_batch=masks, device="cpu", channel_first=True)


def test_mass_accuracy_of_a_positive_map_is_the_energy_pointing_game(data):
    theirs = scored(quantus.RelevanceMassAccuracy(abs=False, normalise=False), data, data[3])
    ours = metrics.energy_pointing_game(torch.from_numpy(data[2][:, 0]), torch.from_numpy(data[3][:, 0]))
    assert ours.tolist() == pytest.approx(theirs, rel=1e-5)


def test_mass_accuracy_of_a_signed_map_is_another_number(data):
    images, classes, maps, masks = data
    signed = (images, classes, maps - 0.4, masks)
    theirs = scored(quantus.RelevanceMassAccuracy(abs=False, normalise=False), signed, masks)
    ours = metrics.energy_pointing_game(torch.from_numpy(signed[2][:, 0]), torch.from_numpy(masks[:, 0]))
    assert not np.allclose(ours, theirs, rtol=0.01)


def test_pointing_games_agree_where_the_maximum_is_single(data):
    theirs = scored(quantus.PointingGame(abs=False, normalise=False), data, data[3])
    ours = metrics.pointing_game(torch.from_numpy(data[2][:, 0]), torch.from_numpy(data[3][:, 0]))
    assert ours.tolist() == [float(hit) for hit in theirs]


def test_quantus_counts_an_empty_mask_as_a_hit(data):
    metric = quantus.PointingGame(abs=False, normalise=False)
    maps, empty = data[2], np.zeros_like(data[3])
    assert list(metric.evaluate_batch(a_batch=maps, s_batch=empty)) == [True] * 4
    ours = metrics.pointing_game(torch.from_numpy(maps[:, 0]), torch.from_numpy(empty[:, 0]))
    assert ours.isnan().all()


def test_the_weighted_pointing_game_of_quantus_cannot_run(data):
    metric = quantus.PointingGame(weighted=True, abs=False, normalise=False)
    with pytest.raises(TypeError, match="boolean array"):
        metric.evaluate_batch(a_batch=data[2], s_batch=np.ones_like(data[3]))


def test_road_of_quantus_averages_the_first_batch_only():
    metric = quantus.ROAD(percentages=[10, 20])
    metric.evaluation_scores = [np.array([[1.0, 1.0]]), np.array([[0.0, 0.0]])]
    metric.custom_postprocess()
    assert metric.evaluation_scores == {10: 1.0, 20: 1.0}


@pytest.mark.parametrize("features", [1, 8])
def test_pixel_flipping_is_the_protocol_quantus(data, features):
    images, classes, _, _ = data
    protocol = replace(PROTOCOLS["quantus"], steps=-(-images[0].size // features))
    # random elements instead of a map: with three equal channels the order of ties is Quantus' own, and open
    signed = np.random.default_rng(1).standard_normal(images.shape).astype(np.float32)
    theirs = scored(
        quantus.PixelFlipping(features_in_step=features, abs=False, normalise=False), (images, classes, signed, None)
    )
    ours = perturbation_curve(
        Linear().eval(), torch.from_numpy(images), torch.from_numpy(signed), torch.from_numpy(classes), protocol
    )
    np.testing.assert_allclose(ours.scores.numpy(), np.array(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(hasattr(np, "trapz"), reason="this NumPy still has trapz, which Quantus needs")
def test_quantus_cannot_compute_its_area_under_this_numpy(data):
    with pytest.raises(AttributeError, match="trapz"):
        scored(quantus.PixelFlipping(features_in_step=40, return_auc_per_sample=True, abs=False, normalise=False), data)
