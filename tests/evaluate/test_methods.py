"""Test the methods: shapes, repeatability, independence of the batch, formulas, and the choice by name."""

from dataclasses import replace

import pytest
import torch

from dave_fast.errors import InputError, installing
from dave_fast.evaluate import methods
from dave_fast.evaluate.methods import AT_PIXELS, METHODS, MethodSettings, choose
from dave_fast.evaluate.scoring import as_maps
from dave_fast.explain.explainer import DAVE
from dave_fast.models.demo.model import build_model
from dave_fast.ops.smooth import smooth
from tests.evaluate import needs

SETUP = MethodSettings(3, {"precision": "fp32", "noise_alpha": 0.5})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build_model().eval().requires_grad_(False)
    torch.nn.init.normal_(made.head.weight, std=0.1)
    return made


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))


CLASSES = torch.tensor([3, 5])


NAMES = [pytest.param(name, marks=needs.lxt if METHODS[name].package == "lxt" else ()) for name in METHODS]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_explained_alike_alone_and_in_company_and_by_its_seed(name, model, images):
    made = METHODS[name].make(model, SETUP)

    def attribute(*given):
        found = made(*given)
        return found[0] if isinstance(found, tuple) else found

    state = torch.get_rng_state()
    both = attribute(images, CLASSES, (7, 8), 0)
    assert both.shape == images.shape
    alone = attribute(images[1:], CLASSES[1:], (8,), 0)
    torch.testing.assert_close(alone[0], both[1], rtol=1e-3, atol=1e-5 * both.abs().max().item())
    assert torch.equal(torch.get_rng_state(), state)
    other = attribute(images[1:], CLASSES[1:], (8,), 1)
    assert torch.equal(other, alone) != METHODS[name].random
    if METHODS[name].random:
        assert not torch.equal(attribute(images[1:], CLASSES[1:], (9,), 0), alone)


def test_the_baselines_are_their_formulas(model, images):
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[[0, 1], CLASSES].sum(), leaf)
    found = METHODS["input × gradient"].make(model, SETUP)(images, CLASSES, (0, 1), 0)
    torch.testing.assert_close(found, gradient * images, rtol=1e-4, atol=1e-6)
    fine = METHODS["integrated gradients"].make(model, MethodSettings(60, SETUP.explainer))(images, CLASSES, (0, 1), 0)
    rise = (model(images) - model(torch.zeros_like(images)))[[0, 1], CLASSES]
    torch.testing.assert_close(fine.sum((1, 2, 3)), rise, rtol=0.1, atol=0.02)


def test_classes_of_one_image_share_walks_and_get_the_maps_they_get_alone(model, images):
    explainer = SETUP.explainer | {"internal_batch_size": 2}
    shared = METHODS["DAVE"].make_shared(model, MethodSettings(5, explainer))
    found = shared(images[:1], CLASSES, (7,), 3)
    alone = METHODS["DAVE"].make(model, MethodSettings(5, explainer))
    wanted = alone(images[:1].expand(2, -1, -1, -1).contiguous(), CLASSES, (7, 7), 3)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())
        assert not torch.equal(other[0], other[1])


@pytest.mark.parametrize("shrink", [True, False])
def test_smoothed_maps_of_dave_are_those_that_it_gives(model, images, shrink):
    settings = SETUP.explainer | {"shrink": shrink}
    found = METHODS["DAVE"].make(model, MethodSettings(3, settings))(images, CLASSES, (7, 8), 1)
    own = DAVE(model, **settings).explain(images, CLASSES, 3, 1, image_keys=(7, 8))
    maps = as_maps(found)
    assert torch.equal(maps["as it is"], own.raw.sum(1)) and torch.equal(maps["smoothed"], own.maps)
    assert torch.equal(maps["smoothed"], smooth(own.raw)) != shrink
    assert torch.equal(as_maps(own.raw)["smoothed"], smooth(own.raw))


def test_absent_packages_are_named_and_unknown_methods_refused(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    chosen, absent = choose(None)
    assert set(chosen) == {"DAVE", "frozen gradient", "Libra FullGrad+", "|x|", "uniform"}
    assert absent["SmoothGrad"] == f"the package captum is missing: {installing('evaluate')}"
    with pytest.raises(InputError, match="integrated gradients"):
        choose(["Grad-CAM"])


def test_dave_and_the_controls_always_run():
    assert list(choose(["SmoothGrad"])[0]) == ["DAVE", "SmoothGrad", "|x|", "uniform"]


@pytest.mark.parametrize("depth", ["pixels", 1])
def test_dave_has_the_maps_of_explain_at_the_depth_of_the_settings(model, images, depth):
    setup = replace(SETUP, depth=depth)
    raw, maps = METHODS["DAVE"].make(model, setup)(images, CLASSES, (7, 8), 1)
    own = DAVE(model, **SETUP.explainer).explain(images, CLASSES, 3, 1, depth=depth, image_keys=(7, 8))
    assert torch.equal(raw, own.raw) and torch.equal(maps, own.maps)
    _, shared = METHODS["DAVE"].make_shared(model, setup)(images[:1], CLASSES[:1], (7,), 1)
    torch.testing.assert_close(shared, maps[:1], rtol=1e-4, atol=1e-6)


def test_maps_of_pixels_are_a_row_beside_those_of_a_block_only(model, images):
    assert AT_PIXELS not in choose(None)[0] and AT_PIXELS not in choose([])[0]
    chosen, _ = choose([], depth=1)
    assert list(chosen)[:2] == ["DAVE", AT_PIXELS]
    _, maps = chosen[AT_PIXELS].make(model, replace(SETUP, depth=1))(images, CLASSES, (7, 8), 1)
    assert torch.equal(maps, METHODS["DAVE"].make(model, SETUP)(images, CLASSES, (7, 8), 1)[1])
