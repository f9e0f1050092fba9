"""The engine's two walks against the frozen route, an independent oracle, and plain PyTorch in low precision."""

import re

import pytest
import timm
import torch
from torch import nn

from dave_fast.ops.patches import patchify
from dave_fast.plan.families import why_not
from dave_fast.plan.layers import AttentionLayer
from dave_fast.plan.reading import NoPlanError
from tests.tolerances import EXACT, LOW_PRECISION_RATIO
from tests.toys import engine_of, frozen_vjp
from tests.variants import ENGINE, FROZEN_ONLY, Variant, randomise

BACKENDS = ["torch", "auto"]
# average pooling, rotations, norms inside a branch and behind it, a bias of the scores, branches side by side
LOW_PRECISION = ["vit-average", "dinov3", "eva02-inner-norms", "eva-post-norm", "beit", "vit-parallel"]


def walks(engine, images, cotangent):
    tokens = patchify(images, engine.plan.patch_size).to(engine.plan.dtype)
    output, saved = engine.forward(tokens)
    return output, engine.vjp(saved, cotangent.to(output.dtype))


def truth(variant: Variant, images, cotangent):
    model = variant.build(torch.float64)
    return frozen_vjp(model, images.double(), lambda output: (output * cotangent).sum(1))


def cotangent_for(variant: Variant, images):
    with torch.no_grad():
        classes = variant.build()(images).shape[1]
    return torch.randn(len(images), classes, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def distance(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("resized", [False, True], ids=["square", "rectangle"])
@pytest.mark.parametrize("name", ENGINE)
def test_float64_agrees_with_the_frozen_route(name, resized):
    variant = ENGINE[name].resized() if resized else ENGINE[name]
    model, images = variant.build(torch.float64), variant.images(3, torch.float64)
    engine = engine_of(model, dtype=torch.float64)
    tokens = patchify(images, engine.plan.patch_size)
    output, saved = engine.forward(tokens)
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = engine.vjp(saved, cotangent)
    expected_output, expected = frozen_vjp(model, images, lambda output: (output * cotangent).sum(1))
    assert distance(output, expected_output) < EXACT
    assert distance(found, patchify(expected, engine.plan.patch_size)) < EXACT


# one or two of each family in the width that timm gives them; tests.variants has narrow ones of the same names
REAL = [
    *("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "deit_small_distilled_patch16_224"),
    *("eva02_small_patch14_224", "vit_small_patch16_dinov3_qkvb", "vit_pe_core_small_patch16_384"),
    *("vit_small_patch16_rope_mixed_ape_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"),
]


def agrees_by_name(name, size, **settings):
    model = timm.create_model(name, depth=2, img_size=size, num_classes=7, **settings)
    randomise(model)
    model = model.double().eval().requires_grad_(False)
    images = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, expected = frozen_vjp(model, images, lambda output: output[:, 1])
    engine = engine_of(model, dtype=torch.float64)
    output, saved = engine.forward(patchify(images, engine.plan.patch_size))
    found = engine.vjp(saved, torch.eye(output.shape[1], dtype=torch.float64)[[1]])
    assert distance(found, patchify(expected, engine.plan.patch_size)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_models_as_they_are_configured(name):
    side = 14 if "patch14" in name else 16
    agrees_by_name(name, (2 * side, 3 * side))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_small_patch14_dinov2", (1036, 518)),
        ("vit_small_patch16_dinov3", (1024, 512)),
        ("eva02_tiny_patch14_224", (518, 1036)),
        ("beit_base_patch16_224", (672, 336)),
    ],
)
def test_models_as_they_are_configured_at_high_resolution(name, size):
    agrees_by_name(name, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["vit", "dinov2-giant-swiglu", "clip", "vit-rms-norm", *LOW_PRECISION])
def test_float32_stays_at_its_rounding(name, backend):
    variant = ENGINE[name]
    images = variant.images(3)
    cotangent = cotangent_for(variant, images)
    engine = engine_of(variant.build(), dtype=torch.float32, backend=backend)
    _, found = walks(engine, images, cotangent)
    _, expected = truth(variant, images, cotangent)
    _, plain = frozen_vjp(variant.build(), images, lambda output: (output * cotangent.float()).sum(1))
    error = distance(found, patchify(expected, engine.plan.patch_size))
    assert error <= LOW_PRECISION_RATIO * distance(plain, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["vit", "vit-3-blocks-48", "deit3", "siglip", "vit-qk-norm", *LOW_PRECISION])
def test_bfloat16_is_as_good_as_plain_pytorch(name, backend):
    variant = ENGINE[name]
    images = variant.images(8)
    cotangent = cotangent_for(variant, images)
    engine = engine_of(variant.build(), dtype=torch.bfloat16, backend=backend)
    _, found = walks(engine, images, cotangent)
    _, expected = truth(variant, images, cotangent)
    low = variant.build(torch.bfloat16)
    _, plain = frozen_vjp(low, images.bfloat16(), lambda output: (output * cotangent).sum(1))
    error = distance(found, patchify(expected, engine.plan.patch_size))
    assert error <= LOW_PRECISION_RATIO * distance(plain, expected)


def test_the_stream_is_centred_where_everything_is_blind_to_a_mean():
    centred = {name: planned(name).centred for name in ("vit", "vit-average", "deit3", "clip", "siglip")}
    assert all(centred.values())
    assert not planned("vit-no-final-norm").centred
    assert not planned("vit-rms-norm").centred


def test_large_means_in_the_stream_cost_nothing_in_float64():
    variant = ENGINE["vit-no-final-norm"]
    model = variant.build(torch.float64)
    with torch.no_grad():
        model.pos_embed += 50.0
        model.blocks[0].attn.proj.bias += 30.0
    images = variant.images(2, torch.float64)
    _, expected = frozen_vjp(model, images, lambda output: output[:, 0])
    engine = engine_of(model, dtype=torch.float64)
    cotangent = torch.zeros(2, expected.shape[0] and model.num_classes, dtype=torch.float64)
    cotangent[:, 0] = 1
    _, found = walks(engine, images, cotangent)
    assert distance(found, patchify(expected, engine.plan.patch_size)) < EXACT


def planned(name):
    variant = ENGINE[name]
    return engine_of(variant.build(), dtype=torch.float32, backend="torch").plan


def test_the_last_block_is_trimmed_to_what_the_head_reads():
    assert planned("vit").read == 1 and planned("vit").steps[-2].trimmed
    assert planned("deit-distilled").read == 2
    average = planned("vit-average")
    assert average.read == average.tokens and not any(step.trimmed for step in average.steps)
    assert not any(step.trimmed for step in planned("vit").steps[:-2])


def test_only_the_read_tokens_leave_the_trimmed_block():
    variant = ENGINE["vit"]
    engine = engine_of(variant.build(), dtype=torch.float32)
    _, saved = engine.forward(patchify(variant.images(3), engine.plan.patch_size))
    assert saved.tail_input.shape[1] == 1
    assert saved.steps[-1][0].core.shape[0] == 3


def test_one_forward_walk_serves_several_cotangents():
    variant = ENGINE["deit3"]
    images = variant.images(2)
    engine = engine_of(variant.build(), dtype=torch.float32)
    output, saved = engine.forward(patchify(images, engine.plan.patch_size))
    one, two = torch.eye(output.shape[1])[[0, 1]], torch.eye(output.shape[1])[[2, 2]]
    first, second = engine.vjp(saved, one), engine.vjp(saved, two)
    assert torch.equal(engine.vjp(saved, one), first)
    assert torch.allclose(engine.vjp(saved, one + two), first + second, atol=1e-5 * first.abs().max().item())


def test_dynamic_image_sizes_resample_the_positions():
    model = ENGINE["vit"].build()
    dynamic = type(model)(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7, dynamic_img_size=True
    )
    dynamic.load_state_dict(model.state_dict())
    dynamic = dynamic.double().eval()
    images = torch.randn(2, 3, 48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, expected = frozen_vjp(dynamic, images, lambda output: output[:, 1])
    engine = engine_of(dynamic, dtype=torch.float64, size=(48, 40))
    _, found = walks(engine, images, torch.eye(7, dtype=torch.float64)[[1, 1]])
    assert distance(found, patchify(expected, (8, 8))) < EXACT


def test_a_rotation_follows_the_image_size_and_shares_the_weights():
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 7, "img_size": 32}
    model = timm.create_model("vit_small_patch16_dinov3", dynamic_img_size=True, **settings)
    randomise(model)
    model = model.double().eval()
    first = engine_of(model, dtype=torch.float64)
    images = torch.randn(2, 3, 56, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    engine = engine_of(model, dtype=torch.float64, size=(56, 40), sibling=first.plan)
    one, other = first.plan.attention, engine.plan.attention
    assert other.qkv is one.qkv and len(other.rotation.cos) == 35 + engine.plan.prefix.shape[0] != len(one.rotation.cos)
    _, expected = frozen_vjp(model, images, lambda output: output[:, 1])
    _, found = walks(engine, images, torch.eye(7, dtype=torch.float64)[[1, 1]])
    assert distance(found, patchify(expected, (8, 8))) < EXACT


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_a_size_that_the_caller_sets_resamples_the_bias_table():
    model = ENGINE["beit"].build(torch.float64)
    model.set_input_size(img_size=(40, 56))
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, expected = frozen_vjp(model, images, lambda output: output[:, 1])
    _, found = walks(engine_of(model, dtype=torch.float64), images, torch.eye(7, dtype=torch.float64)[[1, 1]])
    assert distance(found, patchify(expected, (8, 8))) < EXACT


@pytest.mark.parametrize(
    ("name", "tables"),
    [("dinov3", 1), ("rope-mixed", 2), ("relative-position", 2), ("relative-position-shared", 1), ("vit", 0)],
)
def test_blocks_share_what_is_alike(name, tables):
    attentions = [layer for layer in planned(name).layers if isinstance(layer, AttentionLayer)]
    found = {id(a.rotation) for a in attentions if a.rotation} | {id(a.bias) for a in attentions if a.bias is not None}
    assert len(attentions) == 2 and len(found) == tables


@pytest.mark.parametrize("name", FROZEN_ONLY)
def test_other_families_have_no_plan_and_say_why(name):
    reason = why_not(FROZEN_ONLY[name].build())
    assert reason is not None
    with pytest.raises(NoPlanError, match=re.escape(reason)):
        engine_of(FROZEN_ONLY[name].build(), dtype=torch.float32)


def spoil_lora(model):
    class LoRA(nn.Linear):
        pass

    model.blocks[1].attn.qkv = LoRA(32, 96)


def spoil_norm(model):
    model.blocks[0].norm1 = nn.GroupNorm(2, 32)


def spoil_forward(model):
    model.blocks[0].attn.forward = model.blocks[0].attn.forward


def spoil_activation(model):
    model.blocks[1].mlp.act = nn.Hardswish()


def spoil_dropout(model):
    model.blocks[1].attn.proj_drop = nn.Linear(32, 32)


def spoil_type(model):
    model.__class__ = type("Mine", (type(model),), {})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_lora, "blocks.1: a LoRA"),
        (spoil_norm, "blocks.0: norm GroupNorm"),
        (spoil_forward, "blocks.0.attn' has a forward of its own"),
        (spoil_activation, "blocks.1: activation Hardswish"),
        (spoil_dropout, "a Linear stands at 'blocks.1.attn.proj_drop'"),
        (spoil_type, "Mine is none of timm's classes"),
    ],
    ids=lambda value: getattr(value, "__name__", "words"),
)
def test_unsupported_parts_of_vits_are_named(spoil, words):
    model = ENGINE["vit"].build()
    assert why_not(model) is None
    spoil(model)
    with pytest.raises(NoPlanError, match=words):
        engine_of(model, dtype=torch.float32)


def spoil_rotary(model):
    model.rope = type("Mine", (type(model.rope),), {})(dim=16)


def spoil_query_norm(model):
    model.blocks[0].attn.q_norm = nn.GroupNorm(2, 16)


def spoil_block(model):
    model.blocks[1].__class__ = type("Mine", (type(model.blocks[1]),), {})


def spoil_head(model):
    model.blocks[1].attn.rotate_half = True


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("eva02", spoil_rotary, "rotary embedding is a Mine"),
        ("eva02", spoil_query_norm, "blocks.0: norm GroupNorm"),
        ("eva02", spoil_head, "blocks.1: its blocks turn queries and keys in different ways"),
        ("eva02", spoil_block, "blocks.1: a Mine"),
        ("beit", spoil_block, "blocks.1: a Mine"),
        ("beit", spoil_lora, "blocks.1: a LoRA"),
        ("relative-position", spoil_block, "blocks.1: a Mine"),
        ("relative-position", spoil_dropout, "a Linear stands at"),
        ("vit-parallel", spoil_block, "blocks.1: a Mine"),
    ],
)
def test_unsupported_parts_of_other_families_are_named(name, spoil, words):
    model = ENGINE[name].build()
    assert why_not(model) is None
    spoil(model)
    assert re.search(words, why_not(model))


def test_training_alone_does_not_change_a_reading():
    """Stochastic depth, dropout and moved coordinates of training do not enter a plan."""
    model = ENGINE["dinov3"].build(torch.float64)
    augmented = timm.create_model(
        "vit_small_patch16_dinov3", img_size=32, embed_dim=32, depth=2, num_heads=2, patch_size=8, num_classes=7,
        rope_rescale_coords=2.0, drop_path_rate=0.5, attn_drop_rate=0.5,
    ).double()  # fmt: skip
    augmented.load_state_dict(model.state_dict())
    images = ENGINE["dinov3"].images(2, torch.float64)
    cotangent = torch.eye(7, dtype=torch.float64)[[1, 1]]
    found = [walks(engine_of(m, dtype=torch.float64), images, cotangent) for m in (model, augmented.train())]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert augmented.training and augmented.rope.training


def test_an_image_size_without_positions_is_named():
    model = ENGINE["vit"].build()
    assert "64×32" in why_not(model, (64, 32))
    with pytest.raises(NoPlanError, match="33×32"):
        engine_of(model, dtype=torch.float32, size=(33, 32))
