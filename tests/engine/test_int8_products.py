"""Products of eight-bit integers that are too coarse stay in bfloat16 (`engine.calibration.coarse_products`)."""

import timm
import torch

from dave_fast.engine import calibration
from dave_fast.engine.build import build_engine
from dave_fast.ops.linear import NativeWeight
from dave_fast.ops.patches import patchify
from dave_fast.plan import families


def outlier_model(size: float) -> torch.nn.Module:
    """Return a small ViT whose residual stream has one channel `size` times as large as the others; norms damp it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=3).eval()
    with torch.no_grad():
        model.pos_embed[:, :, 7] += size
        for norm in [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]:
            # what the channel takes from the others in σ, the weights give back
            norm.weight *= size / 192**0.5
            norm.weight[7] = 1 / size
    return model


def errors(model: torch.nn.Module, **settings: object) -> tuple[float, float]:
    """Return the relative errors of an engine's output and VJP against those in float32."""
    reading = families.read(model)
    generator = torch.Generator().manual_seed(1)
    tokens = patchify(torch.randn(3, 3, *reading.image_size, generator=generator), reading.patch_size)
    results = []
    for given in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "narrow": "int8", **settings}):
        engine = build_engine(reading, **given)
        output, saved = engine.forward(tokens.to(given["dtype"]))
        cotangent = torch.ones_like(output) * torch.arange(10)
        results.append((output, engine.vjp(saved, cotangent).float()))
    return tuple(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))


def test_products_of_a_stream_with_a_huge_channel_stay_in_bfloat16(monkeypatch):
    model = outlier_model(1000.0)
    output, slope = errors(model)
    assert output < 0.02
    assert slope < 0.1
    monkeypatch.setattr(calibration, "INT8_ERROR", float("inf"))
    coarse_output, coarse_slope = errors(model)
    assert coarse_output > 4 * output
    assert coarse_slope > 4 * slope


def test_products_of_an_ordinary_stream_are_all_in_eight_bits(caplog):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=3).eval()
    with caplog.at_level("INFO", "dave_fast"):
        errors(model)
    assert "stay in bfloat16" not in caplog.text


def test_products_in_bfloat16_are_told(caplog):
    with caplog.at_level("INFO", "dave_fast"):
        errors(outlier_model(1000.0))
    assert "products stay in bfloat16" in caplog.text


def test_emulated_products_make_the_same_choice():
    assert errors(outlier_model(1000.0), backend="torch")[0] < 0.02


def test_no_product_is_left_to_tiles_whose_bits_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    plan = build_engine(families.read(outlier_model(1000.0)), dtype=torch.bfloat16, narrow="int8").plan
    packed = [weight for p in plan.projections() for weight in (p.weight, p.transposed)]
    assert {weight.operand for weight in packed if isinstance(weight, NativeWeight)} == {"bf16", "int8"}
    assert all(isinstance(weight, NativeWeight) for weight in packed)
