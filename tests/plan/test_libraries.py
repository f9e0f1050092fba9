"""Plans of models of transformers, torchvision and open_clip against the frozen route, in float64."""

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from dave_fast import DAVE
from dave_fast.errors import InputError
from dave_fast.models.adapter import Adapter
from dave_fast.ops.patches import patchify
from dave_fast.plan import checks
from dave_fast.plan.families import why_not
from tests.libraries import FROZEN, LIBRARIES, ONE_SIZE, open_clip_model
from tests.tolerances import EXACT
from tests.toys import engine_of, frozen_vjp, relative
from tests.variants import ENGINE


def images_of(variant, size):
    return replace(variant, size=size).images(3, torch.float64)


@pytest.mark.parametrize("resized", [False, True], ids=["own", "other"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_float64_agrees_with_the_frozen_route(name, resized):
    if resized and name in ONE_SIZE:
        return
    variant = LIBRARIES[name]
    model, images = variant.build(torch.float64), images_of(variant, (32, 16) if resized else variant.size)
    engine = engine_of(model, images.shape[2:], dtype=torch.float64)
    output, saved = engine.forward(patchify(images, engine.plan.patch_size))
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = engine.vjp(saved, cotangent)
    expected_output, expected = frozen_vjp(model, images, lambda output: (output * cotangent).flatten(1).sum(1))
    assert relative(output, expected_output) < EXACT
    assert relative(found, patchify(expected, engine.plan.patch_size)) < EXACT


def raw(model, images, route, **settings):
    """Return attributions as they are, effective gradients and outputs on a route, which must not warn."""
    made = DAVE(model, precision="fp64", noise_alpha=0.3, route=route)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = made.explain(images, element, 3, **settings)
    assert made.route == ("frozen" if route == "frozen" else "engine")
    return found.raw, made.effective_gradient(images, element), made.predict(images)


# an element of an output of scores, of embeddings, of tokens
def element(output):
    return output.flatten(1)[:, 3]


@pytest.mark.parametrize("name", LIBRARIES)
def test_explanations_are_those_of_the_frozen_route(name):
    variant = LIBRARIES[name]
    images = variant.images(2, torch.float64)
    found = raw(variant.build(torch.float64), images, "auto")
    for ours, theirs in zip(found, raw(variant.build(torch.float64), images, "frozen"), strict=True):
        # maps and outputs are handed out in float32
        assert relative(ours.double(), theirs.double()) < (EXACT if ours.dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2-registers", "dinov3", "beit-both", "siglip", "torchvision", "open-clip"]
)
def test_evidence_at_blocks_is_that_of_the_frozen_route(name):
    variant = LIBRARIES[name]
    images = variant.images(2, torch.float64)
    told = [
        DAVE(variant.build(torch.float64), precision="fp64", noise_alpha=0.3, route=route)
        .explain(images, 3, 2, depth=[0, 1, "pixels"])
        .depths
        for route in ("engine", "frozen")
    ]
    for part in ("score", "pixels", "patches", "prefix"):
        ours, theirs = (getattr(depths, part) for depths in told)
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "dinov3", "beit-both", "siglip"])
def test_one_explainer_takes_images_of_several_sizes(name):
    variant = LIBRARIES[name]
    made, frozen = (
        DAVE(variant.build(torch.float64), precision="fp64", noise_alpha=0.0, route=route)
        for route in ("engine", "frozen")
    )
    for size in (variant.size, (32, 16), (16, 16)):
        images = images_of(variant, size)
        found, expected = (each.effective_gradient(images, element) for each in (made, frozen))
        assert relative(found, expected) < EXACT


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip-classifier"])
def test_patches_that_do_not_cover_an_image_are_left_to_the_frozen_route(name):
    variant = LIBRARIES[name]
    assert "no whole number of its patches" in why_not(variant.build(), (24, 30))
    made = DAVE(variant.build(), noise_alpha=0.0)
    with pytest.warns(UserWarning, match="the frozen route is taken.*24×30"):
        made.predict(images_of(variant, (24, 30)))


@pytest.mark.parametrize("name", ["clip-classifier", "torchvision", "open-clip"])
def test_an_image_size_that_the_model_refuses_is_named(name):
    with pytest.raises(InputError, match="images are 32×16 and the model takes 24×24"):
        DAVE(LIBRARIES[name].build()).predict(images_of(LIBRARIES[name], (32, 16)))


@pytest.mark.parametrize("name", FROZEN)
def test_other_classes_have_no_plan_and_say_why(name):
    variant, words = FROZEN[name]
    assert words in why_not(variant.build())


def test_a_tower_that_returns_tokens_too_has_no_plan():
    assert "returns tokens besides the embedding" in why_not(open_clip_model(output_tokens=True).build())


def test_a_plan_that_differs_leaves_the_engine_with_the_name_of_the_block(monkeypatch):
    from transformers.models.vit.modeling_vit import ViTAttention

    # blinds the reader, so that only the output tells
    monkeypatch.setattr(checks, "replaced", lambda kind: None)
    plain = ViTAttention.forward
    monkeypatch.setattr(ViTAttention, "forward", lambda self, x, *args, **kwargs: plain(self, 0.1 * x, *args, **kwargs))
    made = DAVE(LIBRARIES["vit"].build(), precision="fp64")
    with pytest.warns(UserWarning, match=r"because of its module 'model.vit.layers.0' \(ViTLayer\)"):
        made.predict(LIBRARIES["vit"].images())


def test_a_model_is_given_as_its_library_makes_it():
    variant = LIBRARIES["vit"]
    images = variant.images(2, torch.float64)
    adapter = variant.build(torch.float64)
    plain = adapter.model
    for given in (plain, nn.Sequential(plain), nn.Sequential(Halved(), plain), torch.nn.DataParallel(plain)):
        made = DAVE(given, precision="fp64", noise_alpha=0.0)
        expected = adapter(images / 2 if isinstance(given, nn.Sequential) and len(given) == 2 else images)
        torch.testing.assert_close(made.predict(images).double(), expected.detach(), rtol=1e-6, atol=1e-6)
        assert made.route == "engine"


class Halved(nn.Module):
    def forward(self, images):
        return images / 2


def test_an_adapter_around_a_timm_model_is_seen_through():
    model = ENGINE["vit"].build()
    assert why_not(Adapter(model, kind="classifier")) is None
    assert "Own is none of" in why_not(type("Own", (Adapter,), {})(model, kind="classifier"))


def test_no_library_is_imported_for_its_families():
    code = (
        "import sys, dave_fast.plan.families, dave_fast\n"
        "assert {'transformers', 'open_clip'}.isdisjoint(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
