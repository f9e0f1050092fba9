"""Tests of other attribution methods behind the call of DAVE.explain, and of comparisons."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

import dave_fast
from dave_fast.errors import InputError, ModelError, NonFiniteError
from dave_fast.evaluate import comparison
from dave_fast.evaluate import methods as evaluated
from dave_fast.evaluate.comparison import NAMES, Comparison, Explainer, compare
from dave_fast.evaluate.methods import METHODS
from dave_fast.ops.smooth import smooth
from dave_fast.targets import Contrast
from tests.tiny import named_vit, random_vit

CLASSES = ["cat", "dog", "house cat", "tiger, Panthera tigris", "lion"]
SETTINGS = {"precision": "fp32", "noise_alpha": 0.1}
PHOTO, OTHER = (np.random.default_rng(seed).integers(0, 256, (60, 100, 3), np.uint8) for seed in (0, 1))


@pytest.fixture(scope="module")
def dave():
    return dave_fast.DAVE(named_vit(CLASSES), **SETTINGS)


@pytest.fixture(scope="module")
def images(dave):
    return torch.stack([dave.prepare(Image.fromarray(each))[0] for each in (PHOTO, OTHER)])


def gradient(model, images, classes):
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(leaf).gather(1, classes[:, None]).sum(), leaf)
    return found


def test_input_times_gradient_is_autograds(dave, images):
    found = Explainer("input × gradient", dave).explain(images)
    wanted = images * gradient(dave.model, images, found.target)
    torch.testing.assert_close(found.raw, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.maps, smooth(found.raw)) and torch.equal(found.signed, found.raw.sum(1))


def test_integrated_gradients_add_up_to_the_difference_of_the_logits(dave, images):
    found = Explainer("integrated gradients", dave).explain(images, 3, n_samples=200)
    with torch.no_grad():
        change = (dave.model(images) - dave.model(torch.zeros_like(images)))[:, 3]
    torch.testing.assert_close(found.raw.sum((1, 2, 3)), change, rtol=0.02, atol=0.02)


def test_frozen_gradient_is_one_row_of_the_effective_transformation(dave, images):
    found = Explainer("frozen gradient", dave).explain(images, 2)
    torch.testing.assert_close(found.raw, images * dave.effective_gradient(images, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].package != "lxt"])
def test_every_method_explains_a_photograph_with_words_and_pictures(dave, name):
    found = Explainer(name, dave).explain([PHOTO, OTHER], "tiger", n_samples=2)
    assert found.about.method == name and repr(found).startswith(name)
    assert found.maps.shape == (2, 32, 32) and found.raw.shape == (2, 3, 32, 32)
    assert (found.maps >= 0).all() and (found.maps <= 1).all() and (found.maps.amax((1, 2)) == 1).all()
    assert found.answers()[0][0][:2] == (3, "tiger") and found.overlay().size == (100, 60)


@pytest.mark.parametrize("name", ["SmoothGrad", "Libra FullGrad+", "input × gradient"])
def test_several_classes_are_their_own_explanations(dave, name):
    method = Explainer(name, dave)
    found = method.explain([PHOTO, OTHER], targets=[4, "dog"], n_samples=2, seed=3)
    assert found.raw.shape == (2, 2, 3, 32, 32) and [k for k, _, _ in found.answers()[1]] == [4, 1]
    for number, target in enumerate((4, 1)):
        alone = method.explain([PHOTO, OTHER], target, n_samples=2, seed=3)
        torch.testing.assert_close(found.raw[:, number], alone.raw)
        torch.testing.assert_close(found.maps[:, number], alone.maps)
    best = method.explain(PHOTO, top_k=2, n_samples=2)
    assert best.target.tolist() == [best.output[0].topk(2).indices.tolist()]


def test_smoothgrad_depends_on_the_seed_alone(dave):
    method = Explainer("SmoothGrad", dave)
    one, again, other = (method.explain(PHOTO, 1, n_samples=2, seed=seed).raw for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_dave_by_name_is_dave(dave):
    assert torch.equal(
        Explainer("dave", dave).explain(PHOTO, 1, 3, depth=1).maps, dave.explain(PHOTO, 1, 3, depth=1).maps
    )


def test_model_is_explained_in_evaluation_mode_and_left_as_it_was():
    model = named_vit(CLASSES)
    model.pos_drop.p = 0.9
    wanted = Explainer("input × gradient", model, **SETTINGS).explain(PHOTO, 1).raw
    model.train()
    assert torch.equal(Explainer("input × gradient", model, **SETTINGS).explain(PHOTO, 1).raw, wanted)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("Integrated-Gradients", "integrated gradients"), ("input_x_gradient", "input × gradient"), ("legrad", "LeGrad")],
)
def test_names_may_be_written_with_dashes(dave, name, wanted):
    assert Explainer(name, dave).name == wanted


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda dave: Explainer("integrated gradient", dave), "did you mean integrated gradients"),
        (lambda dave: Explainer("SmoothGrad", dave).explain(PHOTO, Contrast(1, 2)), "SmoothGrad explains classes"),
        (lambda dave: Explainer("SmoothGrad", dave).explain(PHOTO, depth="auto"), "has one map, of the pixels"),
        (lambda dave: Explainer("SmoothGrad", dave).explain(PHOTO, depth=["pixels", "pixels"]), "has one map, of the"),
        (lambda dave: Explainer(3, dave), "a method is 3; expected a name"),
        (lambda dave: Explainer("SmoothGrad", dave, noise_alpha=0.5), "noise_alpha: settings of a DAVE"),
        (lambda dave: compare(PHOTO, dave, "DAVE", shrink=False), "shrink: settings of a DAVE"),
        (lambda dave: Explainer("SmoothGrad", dave).explain(PHOTO, n_samples=0), "n_samples is 0"),
        (lambda dave: Explainer("SmoothGrad", dave).explain("none.png"), "cannot read none.png"),
    ],
)
def test_what_a_method_cannot_do_is_refused_in_words(dave, ask, words):
    with pytest.raises(InputError, match=words):
        ask(dave)


def test_model_that_its_owner_changed_is_explained_as_it_is_now():
    model = named_vit(CLASSES)
    method = Explainer("input × gradient", model, **SETTINGS)
    before = method.explain(PHOTO, 1).raw
    with torch.no_grad():
        model.head.weight.neg_()
    torch.testing.assert_close(method.explain(PHOTO, 1).raw, -before)


def test_tensors_of_other_channels_are_explained():
    model = random_vit(in_chans=4)
    model.pretrained_cfg = {"input_size": (4, 32, 32)}
    found = Explainer("input × gradient", model, **SETTINGS).explain(torch.randn(1, 4, 32, 32))
    assert found.raw.shape == (1, 4, 32, 32)


def test_nan_of_a_method_is_refused(dave, monkeypatch):
    nan = evaluated.Method(lambda model, setup: lambda images, *_: images * torch.nan)
    monkeypatch.setitem(METHODS, "SmoothGrad", nan)
    with pytest.raises(NonFiniteError, match="attribution of SmoothGrad"):
        Explainer("SmoothGrad", dave).explain(PHOTO)
    assert "NaN" in compare(PHOTO, dave, ["SmoothGrad", "DAVE"], n_samples=2).absent["SmoothGrad"]


def test_missing_package_names_its_extra(dave, monkeypatch):
    monkeypatch.setattr(comparison, "find_spec", lambda name: None if name == "captum" else find_spec(name))
    with pytest.raises(InputError, match=r"SmoothGrad needs the package captum, which is missing: .*\[evaluate\]"):
        Explainer("SmoothGrad", dave)
    found = compare(PHOTO, dave, n_samples=2)
    assert "SmoothGrad" in found.absent and "DAVE" in found and "SmoothGrad" not in found
    with pytest.raises(InputError, match="captum"):
        compare(PHOTO, dave, ["SmoothGrad"])


def test_model_that_a_method_does_not_support_is_named(dave):
    model = random_vit(qk_norm=True)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(ModelError, match="LeGrad does not support"):
        Explainer("LeGrad", model, **SETTINGS).explain(PHOTO)
    found = compare(PHOTO, dave_fast.DAVE(model, **SETTINGS), ["LeGrad", "DAVE"], n_samples=2)
    assert list(found) == ["DAVE"] and "LeGrad does not support" in found.absent["LeGrad"]
    with pytest.raises(ModelError, match="LeGrad does not support"):
        compare(PHOTO, dave_fast.DAVE(model, **SETTINGS), ["LeGrad"], n_samples=2)


def test_comparison_explains_the_same_classes_by_each_method(dave, tmp_path, capsys):
    found = compare([PHOTO, OTHER], dave, ["dave", "input x gradient", "DAVE"], n_samples=3, progress=False)
    assert list(found) == ["DAVE", "input × gradient"] and len(found) == 2
    assert torch.equal(found["dave"].target, found["input x gradient"].target)
    assert torch.equal(found["DAVE"].maps, dave.explain([PHOTO, OTHER], n_samples=3).maps)
    said = repr(found)
    assert "2 explanations, 2 images" in said and "input × gradient" in said and " s" in said
    with Image.open(found.save(tmp_path / "compared.png")) as picture:
        assert picture.width > picture.height * 0.8
    assert not capsys.readouterr().err


def test_comparison_by_name_of_a_model(monkeypatch):
    found = dave_fast.compare(PHOTO, "demo", ["DAVE", "frozen gradient"], n_samples=2, target="six", precision="fp32")
    assert [one.answers()[0][0][1] for one in found.values()] == ["six", "six"]
    assert found.figure().axes


def test_explanations_of_settings_side_by_side(dave):
    few, many = (dave.explain([PHOTO, OTHER], 1, n_samples=count) for count in (2, 4))
    found = Comparison({"2 samples": few, "4 samples": many})
    said = [text.get_text() for axes in found.figure().axes for text in axes.texts]
    assert said.count("2 samples") == said.count("4 samples") == 2 and "2 samples" in repr(found)
    with pytest.raises(InputError, match="each of the same images"):
        Comparison({"one": few[0], "two": many})
    with pytest.raises(InputError, match="one or more"):
        Comparison({"none": few[2:]})


def test_comparison_is_a_mapping(dave):
    found = compare(PHOTO, dave, "DAVE", n_samples=2)
    assert list(found) == ["DAVE"] and found["dave"] is found["DAVE"]
    assert "nothing" not in found and 3 not in found and found.get("nothing") is None


def test_map_of_another_model_lies_on_what_that_model_saw(dave):
    model = named_vit(CLASSES, seed=1)
    model.pretrained_cfg |= {"crop_pct": 0.5}
    one = dave.explain(PHOTO, "cat", n_samples=2)
    other = dave_fast.DAVE(model, **SETTINGS).explain(PHOTO, "lion", n_samples=2)
    figure = Comparison({"one": one, "other": other}).figure()
    _, first, second = (axes.images[0].get_array() for axes in figure.axes[:3])
    for drawn, found in ((first, one), (second, other)):
        assert (drawn == np.asarray(found.overlay(size="enlarged"))).all()
    assert [axes.get_title() for axes in figure.axes[:3]] == ["cat", "", "lion"]


def test_methods_are_a_part_of_the_package():
    assert dave_fast.Explainer is Explainer and dave_fast.compare is compare
