"""Rows at the tokens that enter blocks: against autograd and formulas written by hand, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dave_fast import DAVE
from dave_fast.evaluate import deep, rows
from dave_fast.evaluate.full_gradient import full_gradient
from dave_fast.evaluate.methods import MethodSettings
from dave_fast.evaluate.packages import attnlrp, lrp_twin
from dave_fast.evaluate.twin import NotTakenError
from tests.evaluate import needs
from tests.tiny import random_head_vit, random_vit
from tests.tolerances import EXACT
from tests.toys import relative

SEED, BLOCKS = 5, (0, 1)
CLASSES = torch.tensor([1, 3, 0])


def averaging():
    """Return a ViT whose head reads the patches.

    Where a class token is read, a patch that enters the last block acts through a LayerNorm only, which does not change
    with the token's scale: its true gradient ⊙ activation sums to 0.
    """
    return random_vit(reg_tokens=2, global_pool="avg", fc_norm=False).double().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return averaging()


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(model, image, wanted):
    """Return what enters each block and the attention of the last one, (N, D), and one logit's gradients there."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(image.clone().requires_grad_())))
    entered = []
    for block in model.blocks:
        entered.append(tokens)
        normed = block.norm1(tokens)
        middle = tokens + block.attn(normed)
        tokens = middle + block.mlp(block.norm2(middle))
    gradients = torch.autograd.grad(model.forward_head(model.norm(tokens))[0, wanted], [*entered, normed])
    return [(each[0].detach(), slope[0]) for each, slope in zip([*entered, normed], gradients, strict=True)]


def large(patches):
    """Return one map of 4×4 patches, bilinearly."""
    return functional.interpolate(patches.reshape(1, 1, 4, 4), (32, 32), mode="bilinear", align_corners=False)[0, 0]


def signed(found, row):
    return found[row]["as it is"]


def test_gradient_times_activation_and_grad_cam_are_their_formulas(model, image):
    found = deep.activations(model, BLOCKS)(image, CLASSES, 0)
    names = [f"{method}, block {block}" for block in BLOCKS for method in ("gradient × activation", "Grad-CAM")]
    assert set(found) == {*names, "Grad-CAM, last norm1"}
    for row, wanted in enumerate(CLASSES.tolist()):
        *entered, normed = by_hand(model, image, wanted)
        for block, (tokens, slope) in enumerate(entered):
            # a class token and two registers have no place
            products = torch.stack([tokens[at] @ slope[at] for at in range(3, 19)])
            assert relative(large(products), signed(found, f"gradient × activation, block {block}")[row]) < EXACT
        for name, (tokens, slope) in zip(("block 0", "block 1", "last norm1"), [*entered, normed], strict=True):
            cam = sum(slope[3:, c].mean() * tokens[3:, c] for c in range(24)).clamp(min=0)
            assert cam.max() > 0
            assert relative(large(cam), signed(found, f"Grad-CAM, {name}")[row]) < EXACT
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradient_times_activation_of_patches_vanishes_at_the_last_block_of_a_class_token_s_head(image):
    model = random_vit().double().requires_grad_(False)
    first, last = deep.gradients_at(model, [*model.blocks], image, CLASSES)
    patches = [deep.times_activation(entered)[:, 1:].abs().mean() for entered in (first, last)]
    # what is left is that of eps in the norm
    assert patches[1] < 1e-5 * patches[0]
    (frozen,) = deep.frozen(model, (1,), precision="fp64")(image, CLASSES, 0).values()
    assert frozen["as it is"].abs().mean() > 1e-2 * patches[0]


def test_gradient_times_activation_is_that_of_captum(model, image):
    captum = pytest.importorskip("captum.attr")
    method = captum.LayerGradientXActivation(model, model.blocks[1])
    theirs = method.attribute(image, target=3, attribute_to_layer_input=True)
    (entered,) = deep.gradients_at(model, [model.blocks[1]], image, CLASSES[1:2])
    assert relative(theirs.detach()[0].sum(1), deep.times_activation(entered)[0]) < EXACT


def test_one_frozen_sample_is_gradient_times_activation_of_the_frozen_model(model, image):
    found = deep.frozen(model, BLOCKS, precision="fp64")(image, CLASSES, 0)
    assert list(found) == ["one frozen sample, block 0", "one frozen sample, block 1"]
    for row, wanted in enumerate(CLASSES):
        layers = full_gradient(model, image, wanted[None]).layers
        for block, products in enumerate(layers):
            own = signed(found, f"one frozen sample, block {block}")[row]
            assert relative(large(products[0, 3:].sum(1)), own) < EXACT


def test_the_rows_of_one_set_of_walks_are_explanations_of_their_own():
    model, image = random_head_vit().requires_grad_(False), torch.randn(1, 3, 32, 32)
    found = deep.dave(model, "DAVE", (4, 8), SEED, 0.2, places=BLOCKS)(image, CLASSES, 7)
    names = ["DAVE", "DAVE, block 0", "DAVE, block 1"]
    assert list(found) == [f"{name}, S = {size}" for size in (4, 8) for name in names]
    explainer = DAVE(model, noise_alpha=0.2)
    for size in (4, 8):
        own = explainer.explain(
            image, targets=CLASSES, n_samples=size, seed=SEED, image_keys=[7], depth=["pixels", *BLOCKS]
        )
        for at, name in enumerate(names):
            maps = found[f"{name}, S = {size}"]
            assert torch.allclose(maps["smoothed"], own.maps[0, :, at], atol=1e-4)
            assert torch.allclose(maps["as it is"], own.raw[0, :, at].sum(1), atol=1e-6)


def test_a_contrast_is_that_of_a_model_whose_logits_are_the_contrasts(model, image):
    three = averaging()
    mixed = torch.full((3, 3), -0.5, dtype=torch.float64).fill_diagonal_(1)
    head = nn.Linear(24, 3).double().requires_grad_(False)
    head.weight.copy_(mixed @ model.head.weight[CLASSES])
    head.bias.copy_(mixed @ model.head.bias[CLASSES])
    three.head = head
    makes = {
        "activations": lambda of, **more: deep.activations(of, BLOCKS, **more),
        "frozen": lambda of, **more: deep.frozen(of, BLOCKS, precision="fp64", **more),
    }
    for make in makes.values():
        found, wanted = make(model, contrast=True)(image, CLASSES, 0), make(three)(image, torch.arange(3), 0)
        assert len(found) == 2 * len(wanted)
        for row in wanted:
            assert relative(signed(wanted, row), signed(found, f"{row}, against the others")) < EXACT
    asked = make(model, contrast=True)(image, CLASSES[:1], 0)
    assert not any("others" in row for row in asked)


def test_contrasts_of_a_family_without_them_and_of_averaged_samples(model, image):
    setup = MethodSettings(2, {"precision": "fp64"})
    found = deep.with_contrasts(rows.single(model, "frozen gradient", setup, SEED))(image, CLASSES, 0)
    assert list(found) == ["frozen gradient", "frozen gradient, against the others"]
    own, contrast = (each["as it is"] for each in found.values())
    assert torch.allclose(own[0] - (own[1] + own[2]) / 2, contrast[0], atol=1e-6 * own.abs().max().item())
    # with one sample nothing is left out of an average
    averaged = deep.dave(model, "DAVE", (1,), SEED, 0.2, places=(1,), contrast=True)(image, CLASSES, 0)
    for row in ("DAVE", "DAVE, block 1"):
        own = signed(averaged, f"{row}, S = 1")
        contrast = signed(averaged, f"{row}, against the others, S = 1")
        assert torch.allclose(own[1] - (own[0] + own[2]) / 2, contrast[1], atol=1e-4 * own.abs().max().item())


def test_depths_name_blocks_and_a_model_without_tokens_is_refused():
    deeper = random_vit(depth=8)
    assert deep.places_at(deeper, (0.25, 0.75, 1.0, 2)) == (2, 6, 7)
    assert deep.places_at(deeper, ("auto",))[0] in deep.places_at(deeper)
    for make in (deep.places_at, lambda given: deep.activations(given, BLOCKS)):
        with pytest.raises(NotTakenError, match="not Linear"):
            make(nn.Linear(2, 2))


@needs.lxt
def test_attnlrp_without_gamma_at_tokens_is_one_frozen_sample(image):
    model = random_vit().double().requires_grad_(False)
    found = deep.attnlrp(model, BLOCKS, None, contrast=True)(image, CLASSES, 0)
    wanted = deep.frozen(model, BLOCKS, precision="fp64", contrast=True)(image, CLASSES, 0)
    for row, maps in wanted.items():
        theirs = signed(found, row.replace("one frozen sample", "AttnLRP at tokens"))
        # LXT's gate of GELU, act(u)/(u + 1e-10), is not exact
        assert relative(maps["as it is"], theirs) < 1e-6


@needs.lxt
def test_attnlrp_of_several_classes_is_that_of_each_and_its_contrast_that_of_the_contrasts(image):
    model, gammas = random_vit().double().requires_grad_(False), (0.25, 0.05)
    found = deep.attnlrp(model, BLOCKS, gammas, contrast=True)(image, CLASSES, 0)
    alone = attnlrp(model, None, gammas)
    for row, wanted in enumerate(CLASSES):
        assert relative(alone(image, wanted[None], (0,), 0)[0].sum(0), signed(found, "AttnLRP")[row]) < EXACT
    leaf = image.clone().requires_grad_()
    output = lrp_twin(model, gammas)(leaf)[0, CLASSES]
    (gradient,) = torch.autograd.grad(output[0] - (output[1] + output[2]) / 2, leaf)
    assert relative((gradient * image).sum(1)[0], signed(found, "AttnLRP, against the others")[0]) < EXACT
