"""Test order, points, fills, ties and areas of the protocols of deletion and insertion on cases worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics
from dave_fast.evaluate.metrics import PROTOCOLS, Curve, Protocol, mean_score, perturbation_curve, published_area
from dave_fast.evaluate.metrics.perturbation import _ranks

WHOLE = Protocol("least", steps=4)


def brightness(images: Tensor) -> Tensor:
    """Return logits of two classes whose log-odds of class 1 are twice the sum of the image."""
    total = images.sum((1, 2, 3))
    return torch.stack([-total, total], dim=1)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-2 * value))


ROW = torch.tensor([0.1, 0.2, 0.4, 0.8]).reshape(1, 1, 1, 4)


@pytest.mark.parametrize(
    ("protocol", "sums"),
    [
        pytest.param(WHOLE, [1.5, 1.4, 1.2, 0.8, 0], id="least first"),
        pytest.param(replace(WHOLE, order="most"), [1.5, 0.7, 0.3, 0.1, 0], id="most first"),
        pytest.param(replace(WHOLE, order="most", insert=True), [0, 0.8, 1.2, 1.4, 1.5], id="insertion"),
        pytest.param(replace(WHOLE, fill="minimum"), [1.5, 1.5, 1.4, 1.1, 0.4], id="the image's minimum"),
        pytest.param(replace(WHOLE, start=False), [1.4, 1.2, 0.8, 0], id="without the unchanged image"),
    ],
)
def test_scores_follow_order_fill_and_points(protocol, sums):
    targets = torch.tensor([1])
    for batch_size in (1, 2, 100):
        curve = perturbation_curve(brightness, ROW, ROW[:, 0], targets, protocol, batch_size=batch_size)
        assert curve.scores[0].tolist() == pytest.approx([sigmoid(s) for s in sums], rel=1e-6)
        assert curve.changed.tolist() == [0, 0.25, 0.5, 0.75, 1][-len(sums) :]
    logits = perturbation_curve(brightness, ROW, ROW[:, 0], targets, replace(protocol, probability=False))
    assert logits.scores[0].tolist() == pytest.approx(sums, abs=1e-6)


def test_the_points_of_the_named_protocols_at_224_pixels():
    dave, rise, quantus = (PROTOCOLS[name].counts for name in ("dave", "rise-deletion", "quantus"))
    assert dave(224**2)[:3] == [0, 352, 704]
    assert dave(224**2)[-2:] == [45056, 45158]
    assert len(dave(224**2)) == 130
    assert rise(224**2) == list(range(0, 224**2 + 1, 224))
    assert quantus(3 * 224**2) == list(range(672, 3 * 224**2 + 1, 672))
    assert dave(4) == [0, 1, 2, 3]
    assert rise(1) == [0, 1]


def test_whether_more_is_better_follows_from_the_order():
    assert {name: p.higher_is_better for name, p in PROTOCOLS.items()} == {
        "dave": True,
        "rise-deletion": False,
        "rise-insertion": True,
        "quantus": False,
    }


def test_non_square_images_of_a_batch_keep_their_own_order_class_and_blur():
    images = torch.rand(3, 3, 10, 7)
    maps, targets = torch.rand(3, 10, 7), torch.tensor([0, 1, 0])
    whole = perturbation_curve(brightness, images, maps, targets, "dave", steps=9, batch_size=7)
    assert whole.scores.shape == (3, 10)
    assert whole.changed[-1].item() == 63 / 70
    for row in range(3):
        alone = perturbation_curve(
            brightness, images[row : row + 1], maps[row : row + 1], targets[row : row + 1], "dave", steps=9
        )
        torch.testing.assert_close(alone.scores[0], whole.scores[row], rtol=1e-5, atol=1e-7)
    start = brightness(images).softmax(1)[range(3), targets]
    torch.testing.assert_close(whole.scores[:, 0], start.double())


def test_elements_change_one_channel_at_a_time():
    images = torch.tensor([[[[3.0]], [[2.0]], [[1.0]]]])
    protocol = replace(PROTOCOLS["quantus"], fill="zero", steps=3, probability=False)
    curve = perturbation_curve(brightness, images, images, torch.tensor([1]), protocol)
    assert curve.scores[0].tolist() == [3, 1, 0]
    # a pixel changes in all three channels at once
    pixels = perturbation_curve(brightness, images, images, torch.tensor([1]), replace(protocol, element=False))
    assert pixels.scores[0].tolist() == [0]


def test_a_better_map_scores_better_under_every_protocol():
    images = torch.full((1, 1, 12, 12), 0.001)
    images[..., :4, :4] = 0.1
    for name, protocol in PROTOCOLS.items():
        right, wrong = (
            mean_score(perturbation_curve(brightness, images, maps, torch.tensor([1]), name))
            for maps in (images[:, 0], -images[:, 0])
        )
        assert (right > wrong) == protocol.higher_is_better, name


def test_ties_change_evenly_everywhere_and_in_a_fixed_order():
    ranks = _ranks(torch.zeros(1, 1, 32, 32))[0, 0]
    index = torch.arange(1024)
    assert torch.equal(torch.argsort(ranks.flatten()), torch.argsort(index * 2654435761 % 2**32))
    quarters = (ranks < 256).float().reshape(2, 16, 2, 16).sum((1, 3))
    assert quarters.flatten().tolist() == pytest.approx([64] * 4, abs=4)


def test_only_ties_are_scattered():
    values = torch.tensor([[[[2.0, 0.0, 2.0, 1.0, 2.0]]]])
    ranks = _ranks(values)[0, 0, 0]
    assert (ranks[1], ranks[3]) == (0, 1)
    tied = torch.tensor([0, 2, 4])
    assert torch.equal(tied[ranks[tied].argsort()], tied[(tied * 2654435761 % 2**32).argsort()])


def test_a_zero_map_is_scored_and_a_map_with_nan_is_not():
    images = torch.rand(2, 3, 6, 5)
    maps = torch.zeros(2, 6, 5)
    maps[1, 2, 2] = torch.nan
    scores = mean_score(perturbation_curve(brightness, images, maps, torch.tensor([1, 1]), "rise-deletion", steps=5))
    assert 0.5 < scores[0] < 1
    assert scores[1].isnan()


def test_areas_are_those_of_the_sources():
    shares = torch.tensor([0.0, 0.45, 0.9], dtype=torch.float64)
    curve = Curve(shares, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0]], dtype=torch.float64))
    assert mean_score(curve).tolist() == pytest.approx([1, 0.5])
    assert published_area(curve, "dave").tolist() == pytest.approx([90, 45])
    assert published_area(curve, "rise-deletion").tolist() == pytest.approx([0.9, 0.45])
    assert published_area(curve, "quantus").tolist() == pytest.approx([2, 1])


def test_the_area_of_rise_is_its_formula_for_even_points():
    scores = torch.rand(1, 225, dtype=torch.float64)
    curve = Curve(torch.linspace(0, 1, 225, dtype=torch.float64), scores)
    expected = (scores.sum() - scores[0, 0] / 2 - scores[0, -1] / 2) / 224
    assert published_area(curve, "rise-insertion").item() == pytest.approx(expected.item())


def test_blur_is_the_normalised_gaussian_with_zeros_outside():
    images = torch.ones(1, 2, 40, 33, dtype=torch.float64)
    blurred = metrics.blur(images)
    assert blurred[0, :, 20, 16].tolist() == pytest.approx([1, 1])
    offsets = torch.arange(-15.0, 16.0, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / 98)
    corner = (window[15:].sum() / window.sum()) ** 2
    assert blurred[0, 0, 0, 0].item() == pytest.approx(corner.item())


def test_unknown_protocols_and_foreign_maps_are_refused():
    images, maps, targets = torch.rand(1, 3, 4, 4), torch.rand(1, 4, 4), torch.tensor([0])
    with pytest.raises(InputError, match="rise-insertion"):
        perturbation_curve(brightness, images, maps, targets, "best")
    with pytest.raises(InputError, match="least"):
        Protocol("best")
    with pytest.raises(InputError, match="steps"):
        perturbation_curve(brightness, images, maps, targets, steps=0)
    with pytest.raises(InputError, match="do not belong"):
        perturbation_curve(brightness, images, maps[:, :2], targets)


class Brightness(torch.nn.Module):
    """One or two logits by the sum of the image, and what its owner says of them."""

    def __init__(self, classes, link):
        super().__init__()
        self.classes, self.link = classes, link

    def forward(self, images):
        return brightness(images)[:, 1:] if self.classes == 1 else brightness(images)


@pytest.mark.parametrize(("classes", "link"), [(1, "softmax"), (1, "sigmoid"), (2, "sigmoid")])
def test_a_single_logit_and_several_labels_are_sigmoids(classes, link):
    model, target = Brightness(classes, link), torch.tensor([classes - 1])
    found = perturbation_curve(model, ROW, ROW[:, 0], target, WHOLE).scores[0].tolist()
    assert found == pytest.approx([sigmoid(total / 2) for total in (1.5, 1.4, 1.2, 0.8, 0)], rel=1e-6)


@pytest.mark.parametrize("classes", [1, 2])
def test_a_model_without_probabilities_is_measured_by_its_score(classes):
    model, target = Brightness(classes, None), torch.tensor([classes - 1])
    with pytest.raises(InputError, match=r"no probabilities .*probability=False"):
        perturbation_curve(model, ROW, ROW[:, 0], target, WHOLE)
    found = perturbation_curve(model, ROW, ROW[:, 0], target, replace(WHOLE, probability=False)).scores[0].tolist()
    assert found == pytest.approx([1.5, 1.4, 1.2, 0.8, 0], abs=1e-6)
