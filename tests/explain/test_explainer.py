"""DAVE from images to maps: repeatable, independent of batches, the model unchanged, errors."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import dave_fast
from dave_fast.errors import InputError, ModelError, NonFiniteError, UnknownModelError
from tests.tiny import random_vit

STILL = dict(rotation=0.0, scale=(1.0, 1.0), translation=0.0, flip=0.0, noise_alpha=0.0)


def tiny_vit(**changes):
    return random_vit(img_size=(32, 48), embed_dim=32, **changes)


@pytest.fixture
def model():
    return tiny_vit()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def explainer(model, **settings):
    return dave_fast.DAVE(model, **({"precision": "fp32", "noise_alpha": 0.5} | settings))


def state_of(model):
    """Return all of a model's state that an explanation could have changed."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [(m.training, len(m._forward_hooks), m.__dict__.get("forward")) for m in model.modules()],
    )


def assert_same_state(before, after):
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1:] == after[1:]


class Linear(nn.Module):
    """A model with scores linear in the image: attention over one token has P = 1, and raw is weight ⊙ image."""

    def __init__(self, shape, classes=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, *shape, generator=torch.Generator().manual_seed(2)))

    def forward(self, x):
        value = x.flatten(1)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(value, value, value)
        return mixed[:, 0] @ self.weight.flatten(1).T


def test_a_still_linear_model_gets_weight_times_image(images):
    model = Linear((3, 32, 48))
    with pytest.warns(UserWarning, match="frozen route"):
        found = explainer(model, **STILL).explain(images, target=[0, 1, 0], n_samples=3)
    expected = model.weight.detach()[[0, 1, 0]] * images
    assert torch.allclose(found.raw, expected, rtol=1e-6, atol=1e-7)
    assert found.maps.shape == (3, 32, 48)
    assert found.maps.amax((1, 2)).tolist() == [1, 1, 1]


def test_a_class_with_negative_evidence_everywhere_has_a_zero_map(images):
    model = Linear((3, 32, 48))
    nn.init.constant_(model.weight, -1.0)
    with pytest.warns(UserWarning, match="frozen route"):
        found = explainer(model, **STILL).explain(images.abs(), target=0, n_samples=2)
    assert not found.maps.any()


def test_shapes_types_and_what_is_reported(model, images):
    found = explainer(model).explain(images, n_samples=3, seed=7)
    assert found.maps.shape == (3, 32, 48) and found.maps.dtype == torch.float32
    assert found.raw.shape == images.shape and found.raw.dtype == torch.float32
    assert found.maps.min() >= 0 and found.maps.max() <= 1
    with torch.no_grad():
        logits = model(images)
    assert torch.allclose(found.output, logits, atol=1e-5)
    assert torch.equal(found.target, logits.argmax(1))
    assert torch.allclose(found.probability, logits.softmax(1).amax(1), atol=1e-5)
    assert (found.n_samples, found.seed) == (3, 7)


def test_routes_give_the_same_raw_attribution(model, images):
    engine = explainer(model, precision="fp64", route="engine").explain(images, n_samples=4)
    frozen = explainer(model, precision="fp64", route="frozen").explain(images, n_samples=4)
    assert torch.allclose(engine.raw, frozen.raw, rtol=1e-6, atol=1e-7 * engine.raw.abs().max().item())


def test_two_runs_are_bit_equal(model, images):
    first, second = (explainer(model).explain(images, n_samples=5, seed=3) for _ in range(2))
    assert torch.equal(first.raw, second.raw) and torch.equal(first.maps, second.maps)


@pytest.mark.parametrize("rows", [1, 4, 15])
def test_the_micro_batch_size_does_not_matter(model, images, rows):
    whole = explainer(model).explain(images, n_samples=5, seed=3)
    split = explainer(model).explain(images, n_samples=5, seed=3, internal_batch_size=rows)
    assert (whole.raw - split.raw).abs().max() <= 1e-6 * whole.raw.abs().max()
    assert (whole.maps - split.maps).abs().max() <= 1e-5


def test_batch_mates_and_their_order_do_not_matter(model, images):
    keys = [5, 6, 7]
    target = [0, 1, 2]
    whole = explainer(model).explain(images, target, n_samples=4, image_keys=keys)
    turned = explainer(model).explain(images.flip(0), target[::-1], n_samples=4, image_keys=keys[::-1])
    alone = explainer(model).explain(images[1:2], target[1], n_samples=4, image_keys=[6])
    limit = 1e-6 * whole.raw.abs().max()
    assert (whole.raw - turned.raw.flip(0)).abs().max() <= limit
    assert (whole.raw[1:2] - alone.raw).abs().max() <= limit


def test_seeds_and_keys_tell_draws_apart(model, images):
    twice = images[:1].repeat(2, 1, 1, 1)
    same = explainer(model).explain(twice, 0, n_samples=3)
    assert torch.equal(same.raw[0], same.raw[1])
    other_key = explainer(model).explain(twice, 0, n_samples=3, image_keys=[0, 1])
    assert torch.allclose(other_key.raw[0], same.raw[0], atol=1e-6)
    assert not torch.allclose(other_key.raw[1], same.raw[1], atol=1e-3)
    other_seed = explainer(model).explain(twice[:1], 0, n_samples=3, seed=1)
    assert not torch.allclose(other_seed.raw[0], same.raw[0], atol=1e-3)


def test_no_global_generator_is_read_or_set(model, images):
    torch.manual_seed(11)
    first = explainer(model).explain(images, n_samples=2).raw
    state = torch.get_rng_state()
    torch.manual_seed(12)
    second = explainer(model).explain(images, n_samples=2).raw
    assert torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)


def test_few_images_at_a_time_give_what_all_together_give(model, images, monkeypatch):
    whole = explainer(model).explain(images, n_samples=4)
    one = 4 * 3 * 32 * 48 * 4
    monkeypatch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: int(one * 4.5))
    split = explainer(model).explain(images, n_samples=4, internal_batch_size=12)
    assert (whole.raw - split.raw).abs().max() <= 1e-6 * whole.raw.abs().max()


def test_contributions_beyond_memory_are_refused_in_bytes(model, images, monkeypatch):
    monkeypatch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="GiB are free"):
        explainer(model).explain(images, n_samples=4)


def test_progress_counts_every_row(model, images):
    seen = []
    explainer(model).explain(
        images, n_samples=4, internal_batch_size=5, progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_attribute_keeps_captums_contract(model, images):
    found = explainer(model).attribute(images.double(), target=torch.tensor([1, 2, 3]), n_samples=2)
    assert found.shape == images.shape and found.dtype == torch.float64
    expected = explainer(model).explain(images, [1, 2, 3], n_samples=2).raw
    assert torch.equal(found.float(), expected)
    assert explainer(model).multiplies_by_inputs
    with pytest.raises(InputError, match="additional_forward_args"):
        explainer(model).attribute(images, 0, (1,))


def test_a_callable_target_is_the_class_that_it_reads(model, images):
    by_class = explainer(model).explain(images, 2, n_samples=3)
    by_score = explainer(model).explain(images, lambda output: output[:, 2], n_samples=3)
    assert torch.equal(by_class.raw, by_score.raw)
    assert by_score.target.tolist() == [-1] * 3 and by_score.probability.isnan().all()


def test_the_model_is_untouched(model, images):
    model.train()
    before = state_of(model)
    with torch.no_grad():
        explainer(model).explain(images, n_samples=2)
    explainer(model, route="frozen").explain(images, n_samples=2)
    assert_same_state(before, state_of(model))


def test_the_model_is_untouched_when_its_forward_raises(images):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_vit()

        def forward(self, x):
            self.inner(x)
            raise RuntimeError("broken on purpose")

    model = Broken().eval()
    before = state_of(model)
    with pytest.raises(ModelError, match="of Broken raised RuntimeError: broken on purpose"):
        explainer(model).explain(images, n_samples=2)
    assert_same_state(before, state_of(model))
    assert torch.is_grad_enabled()


def test_changed_weights_are_noticed(model, images):
    explain = explainer(model).explain
    before = explain(images, 0, n_samples=2).raw
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    in_place = explain(images, 0, n_samples=2).raw
    model.blocks[1].attn.proj.weight.data = model.blocks[1].attn.proj.weight.data * 2
    swapped = explain(images, 0, n_samples=2).raw
    model.head.weight.data.mul_(3)
    through_data = explain(images, 0, n_samples=2).raw
    model.blocks[0] = copy.deepcopy(model.blocks[1])
    replaced = explain(images, 0, n_samples=2).raw
    seen = [before, in_place, swapped, through_data, replaced]
    for earlier, later in pairwise(seen):
        assert not torch.allclose(earlier, later)
    assert torch.equal(replaced, explainer(copy.deepcopy(model)).explain(images, 0, n_samples=2).raw)


def test_changed_settings_and_hooks_are_noticed(model, images):
    explain = explainer(model).explain
    before = explain(images, 0, n_samples=2).raw
    model.blocks[0].norm1.eps = 0.5
    settings = explain(images, 0, n_samples=2).raw
    assert not torch.allclose(before, settings)
    model.global_pool = "avg"
    pooled = explain(images, 0, n_samples=2).raw
    assert not torch.allclose(settings, pooled)
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.warns(UserWarning, match=r"frozen route is taken.*hooks"):
        hooked = explain(images, 0, n_samples=2).raw
    handle.remove()
    assert not torch.allclose(pooled, hooked)
    assert torch.allclose(explain(images, 0, n_samples=2).raw, pooled)


def test_image_sizes_share_their_weights():
    model = tiny_vit(dynamic_img_size=True)
    found = explainer(model)
    for size in ((32, 48), (40, 40), (48, 32)):
        images = torch.randn(1, 3, *size)
        alone = explainer(model).explain(images, 0, n_samples=2).raw
        assert torch.equal(found.explain(images, 0, n_samples=2).raw, alone)
    plans = [route.plan for route in found._cache._routes.values()]
    assert len(plans) == 3
    assert all(plan.steps is plans[0].steps and plan.tail is plans[0].tail for plan in plans)


@pytest.mark.parametrize("route", ["engine", "frozen"])
def test_the_callers_modes_change_nothing(model, images, route):
    found = explainer(model, route=route)
    expected = found.explain(images, 1, n_samples=2).raw
    with torch.inference_mode():
        inside = images.clone()
        assert torch.equal(found.explain(inside, 1, n_samples=2).raw, expected)
        score = found.explain(inside, lambda output: output[:, 1], n_samples=2).raw
        gradient = found.effective_gradient(inside, 1)
        found.predict(inside)
    assert torch.equal(score, expected)
    assert torch.equal(gradient, found.effective_gradient(images, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.explain(images, 1, n_samples=2).raw, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_callers_default_dtype_changes_nothing(model, images, dtype):
    expected = explainer(model).explain(images, 1, n_samples=2).raw
    try:
        torch.set_default_dtype(dtype)
        found = explainer(model).explain(images, 1, n_samples=2).raw
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_bfloat16_does_not_depend_on_the_micro_batch_beyond_its_rounding(model, images):
    whole = explainer(model, precision="bf16").explain(images, 0, n_samples=16)
    split = explainer(model, precision="bf16").explain(images, 0, n_samples=16, internal_batch_size=5)
    assert (whole.raw - split.raw).norm() <= 2e-2 * whole.raw.norm()


def test_unsupported_models_take_the_frozen_route_with_a_note(images):
    model = tiny_vit(class_token=False, global_pool="avg")
    model.blocks[0].register_forward_hook(lambda *args: None)
    found = explainer(model)
    with pytest.warns(UserWarning, match="frozen route is taken.*blocks.0.*hooks") as warned:
        found.explain(images, n_samples=2)
    assert found.route == "frozen" and warned[0].filename == __file__
    with pytest.warns(UserWarning, match="frozen route is taken") as warned:
        explainer(model).predict(images)
    assert warned[0].filename == __file__
    with pytest.raises(ModelError, match="route='engine' was asked for"):
        explainer(model, route="engine").explain(images, n_samples=2)


def test_effective_gradients_of_both_routes_agree(model, images):
    engine = dave_fast.effective_gradient(model, images, [0, 1, 2], route="engine")
    frozen = dave_fast.effective_gradient(model, images, [0, 1, 2])
    assert engine.dtype == torch.float64 and engine.shape == images.shape
    assert (engine - frozen).norm() / frozen.norm() < 1e-12
    by_default = dave_fast.effective_gradient(model, images)
    predicted = model(images).argmax(1)
    assert torch.equal(by_default, dave_fast.effective_gradient(model, images, predicted))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.randn(3, 32), r"\(3, 32\)"),
        (torch.zeros(0, 3, 32, 48), "0"),
        (torch.zeros(1, 3, 32, 48, dtype=torch.uint8), "uint8"),
        ("photo.jpg", "cannot read photo.jpg: no such file"),
        (["photo.jpg", 3], "cannot read photo.jpg"),
        ([3], "an image is a int; expected a path"),
        ([], "the list of images is empty"),
    ],
    ids=["two dimensions", "no image", "integers", "a name", "a name in a list", "a number", "an empty list"],
)
def test_bad_images_are_refused(model, images, words):
    with pytest.raises(InputError, match=words):
        explainer(model).explain(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_pixels_name_their_image(model, images, value):
    images[1, 0, 3, 4] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity in the pixels of image 1"):
        explainer(model).explain(images)


def test_a_model_that_yields_nan_is_named(model, images):
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="the model's output"):
        explainer(model).explain(images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(n_samples=0), "n_samples"),
        (dict(n_samples=2.5), "n_samples"),
        (dict(target=5), "out of range"),
        (dict(internal_batch_size=0), "internal_batch_size"),
        (dict(image_keys=[1]), "1 image_keys were given for 3"),
        (dict(image_keys=[1, 2, 0.5]), "an image key is 0.5"),
        (dict(n_samples=True), "n_samples is True"),
        (dict(seed=0.9), "seed is 0.9"),
        (dict(seed=None), "seed is None"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(model, images, settings, words):
    with pytest.raises(InputError, match=words):
        explainer(model).explain(images, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(precision="fp4"), "fp64, fp32, bf16, fp8"),
        (dict(device="abacus"), "abacus"),
        (dict(device="meta"), "cpu or cuda"),
        (dict(noise_alpha=2.0), "noise_alpha"),
        (dict(schedule="random"), "sequence, paper"),
        (dict(internal_batch_size=-1), "internal_batch_size"),
        (dict(route="magic"), "auto, engine, frozen"),
    ],
    ids=str,
)
def test_bad_construction_is_refused(model, images, settings, words):
    with pytest.raises(InputError, match=words):
        explainer(model, **settings)


def test_a_wrong_image_size_is_refused_with_the_right_one(model):
    with pytest.raises(InputError, match="40×40 and the model takes 32×48"):
        explainer(model).explain(torch.randn(1, 3, 40, 40), n_samples=1)


def test_a_wrong_number_of_channels_is_refused(model):
    with pytest.raises(InputError, match="1 channels and the model takes 3"):
        explainer(model).explain(torch.randn(1, 1, 32, 48), n_samples=1)


def test_unknown_models_are_named_with_their_neighbours():
    with pytest.raises(UnknownModelError, match="vit_base_patch16_224"):
        dave_fast.DAVE("vit_base_patch16_242")
    with pytest.raises(UnknownModelError, match="int"):
        dave_fast.DAVE(3)


def test_a_model_without_attention_is_refused(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ModelError, match="attention"):
        explainer(model).explain(images, n_samples=1)


def test_the_most_probable_classes_are_explained_in_order(model, images):
    explain = explainer(model).explain
    found = explain(images, top_k=3, n_samples=2)
    assert torch.equal(found.target, found.output.topk(3).indices)
    assert torch.equal(found.raw, explain(images, targets=found.target, n_samples=2).raw)
    assert torch.equal(explain(images, top_k=1, n_samples=2).raw, found.raw[:, :1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_k": 6}, "top_k is 6, and the model has 5 classes"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2, "target": 1}, "more than one"),
    ],
)
def test_a_top_k_that_cannot_be_met_is_refused(model, images, given, words):
    with pytest.raises(InputError, match=words):
        explainer(model).explain(images, n_samples=1, **given)
