"""Tests of the comparison of a route's output with the model's own, and of what it says."""

import warnings

import pytest
import timm.models.vision_transformer as vision_transformer
import torch
from torch import nn

from dave_fast import DAVE
from dave_fast.engine.agreement import BOUNDS, NARROW_BOUNDS, disagreement, find_difference
from dave_fast.errors import ModelError, NotFrozenError
from dave_fast.given.isolation import isolated
from dave_fast.given.own_forward import own_output
from dave_fast.ops.precision import DTYPES
from dave_fast.plan import families
from tests.tiny import random_vit
from tests.variants import ENGINE

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def explainer(model, **settings):
    return DAVE(model, **({"precision": "fp32", "noise_alpha": 0.1} | settings))


def differ_silently(model, where):
    """Change what a module computes in a way that no reader sees: its own function, by a wrong table entry."""
    parts = {
        "blocks.1": lambda: setattr(model.blocks[1].attn, "scale", 3.0),
        "what is ahead": lambda: setattr(model, "pos_embed", nn.Parameter(model.pos_embed * 1.5)),
        "what follows": lambda: model.norm.weight.data.mul_(1.5),
    }
    parts[where]()


@pytest.mark.parametrize("where", ["blocks.1", "what is ahead", "what follows"])
def test_the_module_that_differs_is_named(where):
    model, other = random_vit(), random_vit()
    for each in (*model.blocks, *other.blocks):
        each.attn.fused_attn = False
    differ_silently(other, where)
    reading = families.read(model, (32, 32))
    named = find_difference(other, reading, IMAGES[:1])
    assert where in named, named


@pytest.mark.parametrize("name", [name for name in ENGINE if name.startswith(("vit", "deit", "eva02", "beit", "dino"))])
def test_a_model_that_was_read_rightly_differs_nowhere(name):
    variant = ENGINE[name]
    model, images = variant.build(), variant.images()[:1]
    found = find_difference(model, families.read(model, tuple(images.shape[2:])), images)
    assert found == "what follows its blocks (norm, pooling, head)"


def test_a_forward_without_its_blocks_is_named():
    model = random_vit()
    reading = families.read(model)
    model.blocks = nn.Sequential(model.blocks[0])
    assert "does not run all of blocks.0 to blocks.1" in find_difference(model, reading, IMAGES[:1])


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "int8", "fp8"])
def test_the_bound_follows_from_the_precision(precision):
    model, image = random_vit().to(torch.float64), IMAGES[:1]
    output = own_output(model, image)
    for factor in (0.5, 20):
        error = factor * NARROW_BOUNDS.get(precision, BOUNDS[DTYPES[precision]])
        found = disagreement(output * (1 + error), model, image, precision)
        assert found is None if factor < 1 else found == pytest.approx(error, rel=1e-6)


def test_a_step_that_depends_on_the_precision_is_no_rounding():
    class Wide(nn.Module):
        """A tenth larger where a number has eight bytes."""

        def __init__(self):
            super().__init__()
            self.inner = random_vit()

        def forward(self, x):
            return self.inner(x) * (1 + 0.1 * (x.element_size() == 8))

    model, image = Wide().eval(), IMAGES[:1]
    found = own_output(model, image, torch.float64)
    assert disagreement(found, model, image, "fp64") == pytest.approx(0.1, rel=1e-3)


def test_a_model_that_rounds_badly_is_judged_by_its_own_rounding():
    class Large(nn.Module):
        """Adds and subtracts a constant, of which bfloat16 keeps eight bits."""

        def __init__(self):
            super().__init__()
            self.inner = random_vit()

        def forward(self, x):
            return (self.inner(x) + 40) - 40

    model, image = Large().eval(), IMAGES[:1]
    rounded = own_output(model, image, torch.bfloat16)
    exact = own_output(model, image)
    error = float((rounded - exact).norm() / exact.norm())
    assert BOUNDS[torch.bfloat16] < error < 0.3
    assert disagreement(rounded, model, image, "bf16") is None
    # in float32 the same error is another model
    assert disagreement(rounded, model, image, "fp32") == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("output", [torch.full((1, 5), torch.nan), torch.ones(1, 4), torch.ones(1, 5, 1)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "int8", "fp8"])
def test_nan_and_other_shapes_never_agree(output, precision):
    assert disagreement(output, random_vit(), IMAGES[:1], precision) == float("inf")


def test_an_output_of_zeros_agrees_with_zeros():
    model = random_vit()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert disagreement(torch.zeros(1, 5), model, IMAGES[:1], "fp32") is None


@pytest.mark.parametrize("route", ["auto", "engine"])
def test_a_plan_that_differs_leaves_the_engine_with_the_reason(monkeypatch, route):
    from dave_fast.plan import checks

    model = random_vit()
    # blinds the reader, so that only the output tells
    monkeypatch.setattr(checks, "replaced", lambda kind: None)
    plain = vision_transformer.Attention.forward
    monkeypatch.setattr(vision_transformer.Attention, "forward", lambda self, x, **_: 0.1 * plain(self, x))
    made, words = explainer(model, route=route), r"gives another output.*because of its module 'blocks.0' \(Block\)"
    if route == "engine":
        with pytest.raises(ModelError, match=words):
            made.predict(IMAGES)
        return
    with pytest.warns(UserWarning, match=f"the frozen route is taken.*{words}"):
        found = made.predict(IMAGES)
    with torch.no_grad():
        assert torch.allclose(found, model(IMAGES), atol=1e-5)
    assert made.route == "frozen"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # said once
        made.predict(IMAGES)


def counted(monkeypatch):
    """Count the forward passes of copies of a ViT, by rows."""
    rows = []
    plain = vision_transformer.VisionTransformer.forward

    def forward(self, x, *args, **kwargs):
        rows.append(len(x))
        return plain(self, x, *args, **kwargs)

    from dave_fast.plan import checks

    monkeypatch.setattr(checks, "replaced", lambda kind: None)
    monkeypatch.setattr(vision_transformer.VisionTransformer, "forward", forward)
    return rows


def test_the_comparison_is_one_forward_pass_of_one_image_and_only_once(monkeypatch):
    rows, model = counted(monkeypatch), random_vit(dynamic_img_size=True)
    made = explainer(model)
    made.explain(IMAGES, n_samples=2)
    assert rows == [1]
    made.explain(IMAGES, n_samples=2)
    made.predict(IMAGES)
    assert rows == [1]
    # a route of its own
    made.predict(torch.randn(3, 3, 48, 48))
    assert rows == [1, 1]
    with torch.no_grad():
        model.head.weight.mul_(2)
    made.predict(IMAGES)
    assert rows == [1, 1, 1]


def test_images_that_are_not_finite_are_no_comparison(monkeypatch):
    rows, made = counted(monkeypatch), explainer(random_vit())
    with pytest.raises(ArithmeticError):
        made.predict(IMAGES.clone().fill_(torch.nan))
    made.predict(IMAGES)
    assert rows == [1]


class Branches(nn.Module):
    """Around a ViT, computes something else in another precision."""

    def __init__(self, wrong):
        super().__init__()
        self.inner, self.wrong = random_vit(), wrong

    def forward(self, x):
        output = self.inner(x)
        return output.flip(-1) if x.dtype == self.wrong else output


@pytest.mark.parametrize(("precision", "wrong"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.filterwarnings("ignore:the frozen route")
def test_a_copy_that_computes_something_else_in_its_precision_is_refused(precision, wrong):
    with pytest.raises(ModelError, match=r"off by \d+%.*Give precision='fp(32|64)'"):
        explainer(Branches(wrong).eval(), precision=precision).predict(IMAGES)


class Coarse(nn.Module):
    """A rotation whose angles need more bits than bfloat16 has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", 1000 + torch.linspace(0, 3, 24))

    def forward(self, x):
        return x * self.angles.sin() + x.roll(1, -1) * self.angles.cos()


@pytest.mark.filterwarnings("ignore:the frozen route")
def test_the_part_that_rounds_most_is_named():
    model = random_vit()
    model.blocks.insert(1, Coarse().eval())
    with pytest.raises(ModelError, match=r"in bfloat16.*most of it because of module 'blocks.1' \(Coarse\)"):
        explainer(model, precision="bf16").predict(IMAGES)
    explainer(model, precision="fp32").predict(IMAGES)


MIXES = {
    "the mean of a batch": lambda x: x - 0.5 * x.mean(0),
    "the place in a batch": lambda x: x * torch.linspace(1, 2, len(x)).view(-1, 1, 1, 1).to(x),
    "the first image": lambda x: x * (2.0 if x[0].mean() > 0 else 0.5),
    "the last image": lambda x: x + 0.1 * x[-1:],
    "the number of images": lambda x: x if len(x) == 1 else x.flip(-1),
    "an odd number of images": lambda x: x if len(x) % 2 else x.flip(-1),
    "the largest of all": lambda x: x / x.abs().max(),
    "gradients": lambda x: x if x.requires_grad else x.flip(-1),
    "no_grad": lambda x: x if torch.is_grad_enabled() else x.flip(-1),
    "sorted images": lambda x: x[x.flatten(1).mean(1).argsort()],
}


class Mixes(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.inner, self.step = random_vit(), step

    def forward(self, x):
        return self.inner(self.step(x))


@pytest.mark.parametrize("step", MIXES.values(), ids=MIXES)
@pytest.mark.filterwarnings("ignore:the frozen route")
def test_an_image_that_is_explained_by_its_company_is_refused(step):
    with pytest.raises((ModelError, NotFrozenError)) as caught:
        explainer(Mixes(step).eval()).explain(IMAGES[:1], n_samples=2)
    assert "over a batch" in str(caught.value) or "path that its input chooses" in str(caught.value)


def test_the_copy_is_that_of_the_proof_and_the_comparison():
    model = random_vit()
    first, second = isolated(model, torch.float64), isolated(model, torch.float64)
    with torch.no_grad():
        assert torch.equal(first(IMAGES.double()), second(IMAGES.double()))
