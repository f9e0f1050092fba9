"""Static scales of eight-bit operands: repeatable, wide enough, used by every product, numbers beyond them refused."""

import math

import pytest
import torch

import dave_fast
from dave_fast.engine import calibration
from dave_fast.engine.calibration import Scales, made_images
from dave_fast.errors import NonFiniteError
from dave_fast.ops.fp8 import Codes, TokenScales
from dave_fast.ops.patches import patchify
from tests.tiny import initial_vit
from tests.tolerances import LOW_PRECISION_RATIO
from tests.toys import engine_of
from tests.variants import ENGINE

# plain blocks, two tokens read, all tokens read, a norm ahead of the blocks, norms inside and behind branches, two
# branches in parallel, gated MLPs, rotations, a bias of the scores
NAMES = [
    *("vit", "deit-distilled", "vit-average", "clip", "vit-post-norm", "vit-parallel", "vit-scale-norms-swiglu"),
    *(
        "dinov2-giant-swiglu",
        "eva02-inner-norms",
        "vit-qk-norm",
        "dinov3-untied-bias-token",
        "beit-shared-bias",
        "siglip",
    ),
]


def build(name="vit"):
    return engine_of(ENGINE[name].build(), dtype=torch.bfloat16, backend="torch", narrow="fp8")


def walk(engine, images, size=1.0):
    output, saved = engine.forward(patchify(images, engine.plan.patch_size).bfloat16())
    cotangent = torch.zeros_like(output)
    cotangent.view(len(output), -1)[:, 1] = size
    return output, engine.vjp(saved, cotangent).float()


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_scales_are_powers_of_two_and_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = build()
    torch.manual_seed(2)
    second = build()
    scales = list(first.ops.scales.operands.values())
    assert scales == list(second.ops.scales.operands.values())
    assert all(math.log2(scale).is_integer() for each in scales for scale in (each.lead, each.rest))


def test_images_fall_off_with_frequency_and_are_the_same_twice():
    images = made_images(8, (3, 64, 48))
    assert images.shape == (8, 3, 64, 48) and torch.equal(images, made_images(8, (3, 64, 48)))
    assert images[0].abs().max() == 0 and images[2::2].flatten(1).std(1).tolist() == pytest.approx(
        [4 / 7, 8 / 7, 12 / 7]
    )
    spectrum = torch.fft.fft2(images[6].mean(0)).abs()
    assert spectrum[1:4, 1:4].mean() > 4 * spectrum[16:32, 12:24].mean()


@pytest.mark.parametrize("name", NAMES)
def test_walks_with_static_scales_are_as_near_to_bfloat16_as_with_scales_of_rows(name):
    images = ENGINE[name].images(2)
    engine = build(name)
    exact = walk(engine_of(ENGINE[name].build(), dtype=torch.bfloat16, backend="torch"), images)
    static = walk(engine, images)
    engine.ops.scales = Scales({})
    dynamic = walk(engine, images)
    for found, by_rows, expected in zip(static, dynamic, exact, strict=True):
        assert distance(found, expected) <= LOW_PRECISION_RATIO * distance(by_rows, expected)


def test_no_product_of_a_block_quantises_its_operand_but_the_first_of_the_vjp():
    engine = build("vit")
    multiply, operands = engine.ops.multiply, []

    def recording(x, weight, *given, **epilogue):
        operands.append(isinstance(x, Codes))
        return multiply(x, weight, *given, **epilogue)

    engine.ops.multiply = recording
    output, saved = engine.forward(patchify(ENGINE["vit"].images(2), engine.plan.patch_size).bfloat16())
    assert operands and all(operands)
    operands.clear()
    engine.vjp(saved, torch.ones_like(output))
    assert operands.count(False) == 1 and not operands[0]


def test_the_size_of_a_cotangent_does_not_matter():
    engine, images = build(), ENGINE["vit"].images(2)
    expected = walk(engine, images)[1]
    for power in (-80, 60):
        assert torch.equal(walk(engine, images, 2.0**power)[1], expected * 2.0**power)
    assert not walk(engine, images, 0.0)[1].any()


def test_numbers_beyond_the_room_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(calibration, "ROOM", 2.0**-6)
    explainer = dave_fast.DAVE(ENGINE["vit"].build(), precision="fp8", backend="torch", noise_alpha=0.5)
    with pytest.raises(NonFiniteError, match=r"NaN or infinity.*precision='bf16'"):
        explainer.explain(ENGINE["vit"].images(1), 1, n_samples=3)


def test_patches_keep_their_cotangents_where_a_class_token_with_an_outlier_is_read():
    model = initial_vit(img_size=64, patch_size=4, embed_dim=48, depth=4, num_classes=0).requires_grad_(False)
    model.norm.weight[1] = 40.0
    for block in model.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            linear.weight *= 3
    images = torch.randn(2, 3, 64, 64)
    engines = {
        "exact": engine_of(model, dtype=torch.float32, backend="torch"),
        "static": engine_of(model, dtype=torch.bfloat16, backend="torch", narrow="fp8"),
        "rows": engine_of(model, dtype=torch.bfloat16, backend="torch", narrow="fp8"),
        "one scale": engine_of(model, dtype=torch.bfloat16, backend="torch", narrow="fp8"),
    }
    engines["rows"].ops.scales = Scales({})
    found = engines["one scale"].ops.scales.operands
    most = {key: TokenScales.uniform(max(each.lead, each.rest)) for key, each in found.items()}
    engines["one scale"].ops.scales = Scales(most)
    patches = {}
    for name, engine in engines.items():
        output, saved = engine.forward(patchify(images, engine.plan.patch_size).to(engine.plan.dtype))
        cotangent = torch.zeros_like(output)
        cotangent[:, 1] = 1
        patches[name] = engine.vjp(saved, cotangent).float()
    off = {name: distance(each, patches["exact"]) for name, each in patches.items()}
    assert off["static"] <= 1.5 * off["rows"] < off["one scale"], off


def test_a_reader_without_scales_makes_an_operand_keep_scales_of_its_rows():
    weights = [object() for _ in range(3)]
    scales = Scales({id(weights[0]): TokenScales(1.0, 4.0, 9, 1), id(weights[1]): TokenScales.uniform(2.0)})
    assert scales.of(*weights[:2]) == TokenScales(2.0, 4.0, 9, 1)
    assert scales.of(*weights) is None and scales.of() is None
