"""Maps at blocks of a model: the forms of depth, several depths and targets at once, what each depth accounts for."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import dave_fast
from dave_fast.engine.graphs import Graphs, direct
from dave_fast.engine.levels import levels_of
from dave_fast.errors import InputError, ModelError
from dave_fast.explain.depth import check_depth, depth_of, parse_depth, place_of, places_of
from dave_fast.ops.pull_back import adjoint_warp
from dave_fast.ops.robust_mean import robust_mean
from dave_fast.sampling import draw
from tests.tiny import random_vit
from tests.tolerances import EXACT
from tests.variants import ALL

SIZE, SAMPLES = 32, 6
DEPTHS = ["pixels", 3, 0, 0.5]


@pytest.fixture(scope="module")
def model():
    return random_vit(depth=4)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def explainer(model, **settings):
    return dave_fast.DAVE(model, **({"precision": "fp32", "noise_alpha": 0.5} | settings))


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("maps", "raw", "signed"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_several_depths_and_targets_equal_their_own_calls(model, images, precision):
    made = explainer(model, precision=precision)
    found = made.explain(images, targets=[1, 3], n_samples=SAMPLES, depth=DEPTHS)
    assert found.maps.shape == (2, 2, 4, SIZE, SIZE) and found.raw.shape == (2, 2, 4, 3, SIZE, SIZE)
    assert found.depth == ("pixels", 3, 0, 2)
    for which, target in enumerate([1, 3]):
        for level, depth in enumerate(DEPTHS):
            alone = made.explain(images, target, n_samples=SAMPLES, depth=depth)
            assert alone.depth == found.depth[level]
            assert torch.equal(alone.maps, found.maps[:, which, level])
            assert torch.equal(alone.raw, found.raw[:, which, level])
            assert torch.equal(alone.signed, found.signed[:, which, level])


def test_names_of_one_block_are_spread_once(model, images, monkeypatch):
    made, calls = explainer(model), []
    spread = made._cache.ops.spread_mean_variance
    monkeypatch.setattr(made._cache.ops, "spread_mean_variance", lambda *given: calls.append(given) or spread(*given))
    found = made.explain(images, 1, n_samples=2, depth=[2, 0.5, 2, 0])
    assert found.depth == (2, 2, 2, 0) and len(calls) == 2
    assert torch.equal(found.maps[:, 0], found.maps[:, 2]) and not torch.equal(found.maps[:, 0], found.maps[:, 3])


def test_pixels_are_the_default_and_have_no_depths(model, images):
    made = explainer(model)
    default = made.explain(images, 1, n_samples=SAMPLES)
    assert default.depth == "pixels" and default.depths is None
    assert same(default, made.explain(images, 1, n_samples=SAMPLES, depth="pixels"))


@pytest.mark.parametrize("shrink", [True, False])
def test_a_map_is_the_mean_of_densities_of_evidence(model, images, shrink):
    made = explainer(model, precision="fp64", shrink=shrink)
    image, draws = images[:1].double(), draw(SAMPLES, height=SIZE, width=SIZE, sampling=made.sampling)
    evidence = made.samples(image, draws, torch.tensor([[1]]), levels_of([2])).evidence[0][0]
    # a class token, then 4 × 4 patches of 8 × 8 pixels
    patches = evidence[:, 1:].view(SAMPLES, 1, 4, 4) / 64
    densities = adjoint_warp(patches.repeat_interleave(8, 2).repeat_interleave(8, 3), draws)
    expected = robust_mean(densities[None])[0, 0]
    found = made.explain(image, 1, n_samples=SAMPLES, depth=2)
    assert torch.allclose(found.raw[0].sum(0).double(), expected, atol=1e-6 * expected.abs().max().item())
    if not shrink:
        assert torch.allclose(found.signed[0], found.raw[0].sum(0), atol=1e-7)


def test_micro_batches_and_buckets_change_nothing(model, images):
    expected = explainer(model).explain(images, 1, n_samples=SAMPLES, depth=[1, "pixels"])
    for settings in ({"internal_batch_size": 1}, {"internal_batch_size": 5}):
        found = explainer(model, **settings).explain(images, 1, n_samples=SAMPLES, depth=[1, "pixels"])
        assert torch.allclose(found.maps, expected.maps, atol=1e-5)
    made = explainer(model)
    made._cache.make_graphs = lambda: Graphs(made.device, direct, strict=True)
    made._cache.graphs = made._cache.make_graphs()
    pixels = made.explain(images, 1, n_samples=SAMPLES)
    found = made.explain(images, 1, n_samples=SAMPLES, depth=[1, "pixels"])
    assert torch.allclose(found.maps, expected.maps, atol=1e-5) and torch.equal(found.maps[:, 1], pixels.maps)


def test_samples_of_a_caller_give_the_maps_of_explain(model, images):
    made, places = explainer(model), [3, None, 0]
    draws = draw(SAMPLES, height=SIZE, width=SIZE, sampling=made.sampling)
    kept = made.samples(images[:1], draws, torch.tensor([[1, 3]]), levels_of(places))
    raw, maps, signed = made.aggregate_levels(images[:1], kept, draws, places, made.blocks(images[:1]))
    expected = made.explain(images[:1], targets=[1, 3], n_samples=SAMPLES, depth=[3, "pixels", 0])
    assert torch.equal(maps, expected.maps[0]) and torch.equal(raw, expected.raw[0])
    assert torch.equal(signed, expected.signed[0])


def test_attributions_have_the_shape_of_inputs_and_add_up_to_the_map(model, images):
    made = explainer(model)
    found = made.attribute(images, 1, n_samples=SAMPLES, depth=2)
    assert found.shape == images.shape
    assert torch.equal(found, made.explain(images, 1, n_samples=SAMPLES, depth=2).raw)
    assert torch.equal(found[:, 0], found[:, 2])
    with pytest.raises(InputError, match="depth"):
        made.attribute(images, 1, depth=[1, 2])


def test_depths_add_up_to_the_logit(model, images):
    made = explainer(model, precision="fp64")
    told = made.depths(images.double(), 1)
    assert torch.allclose(told.score.float(), made.predict(images)[:, 1])
    assert told.patches.shape == (2, 4)
    assert torch.allclose(told.tokens + told.biases, told.score[:, None].expand(-1, 4), rtol=EXACT)
    found = made.explain(images.double(), targets=[1, 3], n_samples=1, depth=0)
    assert torch.equal(found.depths.patches[:, 0], told.patches)
    pixels = (made.effective_gradient(images.double(), 1) * images).sum((1, 2, 3))
    assert torch.allclose(told.pixels, pixels, rtol=EXACT)


def test_without_noise_and_transformations_a_map_is_the_evidence_of_the_image(model, images):
    still = {"noise_alpha": 0.0, "rotation": 0.0, "scale": (1.0, 1.0), "translation": 0.0, "flip": 0.0}
    made = explainer(model, precision="fp64", **still)
    found = made.explain(images.double(), 1, n_samples=1, depth=1)
    patches = found.raw.double().sum(1).unfold(1, 8, 8).unfold(2, 8, 8)
    spread = (patches - patches[..., :1, :1]).abs().max() / patches.abs().max()
    assert spread < 1e-6
    assert torch.allclose(patches.sum((1, 2, 3, 4)).float(), found.depths.patches[:, 1].float(), rtol=1e-5)


@pytest.mark.parametrize(
    ("depth", "place"),
    [("pixels", None), (0, 0), (11, 11), (0.0, 0), (0.5, 6), (1.0, 11), ("5-9", range(5, 10)), ("auto", range(6, 12))],
)
def test_a_depth_of_twelve_blocks_is_this_place(depth, place):
    assert place_of(depth, [None] * 12) == place
    assert place_of(depth_of(place), [None] * 12) == place


@pytest.mark.parametrize(
    ("grids", "place"),
    [
        ("a", 0),
        ("aa", 1),
        ("aaa", range(1, 3)),
        ("aaaaa", range(2, 5)),
        ("aabbbbbbcc", range(5, 8)),
        ("aabbbbcccc", range(5, 6)),
    ],
)
def test_auto_is_the_deeper_half_as_far_as_grids_are_the_same(grids, place):
    expected = place[0] if isinstance(place, range) and len(place) == 1 else place
    assert place_of("auto", grids) == expected


@pytest.mark.parametrize(("depth", "block"), [(np.int64(3), 3), (np.float32(0.5), 2), (Fraction(1, 4), 1)])
def test_other_libraries_numbers_are_numbers(depth, block):
    (checked,) = check_depth(depth)
    assert place_of(checked, [None] * 4) == block


OTHERS = [
    "deep",
    "6",
    "6-6",
    "6-5",
    "-5",
    "5-9-11",
    "٥-٩",
    -1,
    1.5,
    -0.1,
    math.nan,
    True,
    None,
    [],
    [3, "x"],
    [[1]],
    1j,
    b"\1",
]


@pytest.mark.parametrize("depth", OTHERS)
def test_other_depths_are_refused_with_the_forms_that_there_are(depth):
    with pytest.raises(InputError, match="'pixels', 'auto', the number of a block, a range of blocks"):
        check_depth(depth)


def test_a_block_that_the_model_lacks_is_refused_with_those_it_has(model, images):
    with pytest.raises(InputError, match="block 4 and the model has the blocks 0 to 3"):
        explainer(model).explain(images, 1, depth=[1, 4])


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("pixels", "pixels"),
        ("auto", "auto"),
        (" 6", 6),
        ("5-9", "5-9"),
        ("+1", 1),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("pixels, 3,0.25", ["pixels", 3, 0.25]),
    ],
)
def test_texts_name_depths(text, depth):
    assert parse_depth(text) == depth and type(parse_depth(text)) is type(depth)


@pytest.mark.parametrize("text", ["", "deep", "-1", "5-", "9-5", "٥", "1.5", "1e3", "nan", "3,", "block 3", "١"])
def test_texts_that_name_none_are_refused(text):
    with pytest.raises(InputError, match="depth"):
        parse_depth(text)


def test_a_range_is_the_mean_of_its_blocks_evidence(model, images):
    made, still = explainer(model, precision="fp64"), {"noise_alpha": 0.0, "rotation": 0.0, "translation": 0.0}
    found = made.explain(images.double(), targets=[1, 3], n_samples=SAMPLES, depth=["1-3", "pixels", 2])
    assert found.depth == ("1-3", "pixels", 2)
    assert torch.equal(found.maps[:, 1, 0], made.explain(images.double(), 3, n_samples=SAMPLES, depth="1-3").maps)
    # of one sample without transformations the map is linear in the evidence
    made = explainer(model, precision="fp64", scale=(1.0, 1.0), flip=0.0, **still)
    together, *alone = (made.explain(images.double(), 1, n_samples=1, depth=depth).raw for depth in ("1-3", 1, 2, 3))
    assert torch.allclose(together, torch.stack(alone).mean(0), atol=1e-6 * together.abs().max().item())


def test_a_range_over_two_grids_is_refused():
    with pytest.raises(InputError, match="blocks 1-2, whose tokens lie on different grids"):
        place_of("1-2", "aabb")


def test_a_model_without_blocks_is_asked_only_where_one_is_named():
    def count():
        raise InputError("it has no blocks")

    assert places_of(("pixels",), count) == [None]
    with pytest.raises(InputError, match="no blocks"):
        places_of(("pixels", "auto"), count)


def test_evidence_in_exact_arithmetic_is_that_of_both_routes(model, images):
    found = {
        route: explainer(model, precision="fp64", route=route).explain(images, 1, n_samples=3, depth=[0, 2, "pixels"])
        for route in ("engine", "frozen")
    }
    assert found["engine"].depths is not None and found["frozen"].depths is not None
    for name in ("score", "pixels", "patches", "prefix"):
        ours, theirs = (getattr(found[route].depths, name) for route in ("engine", "frozen"))
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert (found["engine"].raw - found["frozen"].raw).abs().max() <= 1e-6 * found["frozen"].raw.abs().max()


@pytest.mark.parametrize("name", ["swin", "torchvision", "encoder-pre-norm-gelu", "vit-differential"])
def test_models_on_the_frozen_route_have_depths_that_add_up(name):
    variant = ALL[name]
    made = explainer(variant.build(torch.float64), precision="fp64", route="frozen")
    images = variant.images(2, torch.float64)
    told = made.explain(images, 1, n_samples=2, depth=["pixels", "auto"]).depths
    assert torch.allclose(told.score, made.predict(images)[:, 1].double(), rtol=1e-6)
    assert told.patches.shape == (2, len(made.blocks(images)))


def test_a_model_without_blocks_is_refused_by_name_and_keeps_its_pixels():
    variant = ALL["hand-written"]
    made = explainer(variant.build(), route="frozen")
    with pytest.raises(ModelError, match=r"no item of .* of HandWritten has attention.*Use depth='pixels'"):
        made.explain(variant.images(1), 1, n_samples=2, depth="auto")
    found = made.explain(variant.images(1), 1, n_samples=2, depth=["pixels", "pixels"])
    assert found.depth == ("pixels", "pixels") and found.depths is None
