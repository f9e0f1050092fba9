"""LeGrad and AttnLRP by their own packages: the torchvision twin, what is refused and why, and that nothing else is
changed."""

import json
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dave_fast import effective_gradient
from dave_fast.cli.app import app
from dave_fast.errors import installing
from dave_fast.evaluate import DemoScenes, EvaluationSettings, evaluate, methods, packages
from dave_fast.evaluate.methods import METHODS, MethodSettings
from dave_fast.evaluate.twin import NotTakenError, torchvision_twin
from dave_fast.models.demo import load_demo_model
from tests.evaluate import needs
from tests.tiny import initial_vit, random_vit
from tests.tolerances import EXACT

SETUP = MethodSettings(2, {"precision": "fp32", "noise_alpha": 0.5})


def small(**options):
    return initial_vit(**{"num_heads": 3, "num_classes": 4} | options).requires_grad_(False)


def dinov2():
    return random_vit(num_heads=3, init_values=0.1, patch_size=14, img_size=42).requires_grad_(False)


def averaging():
    return small(global_pool="avg", fc_norm=False)


def images_for(model, n=2):
    size = model.patch_embed.img_size[0]
    drawn = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    return drawn.to(next(model.parameters()))


@pytest.mark.parametrize("made", [load_demo_model, small, lambda: small(norm_layer=nn.LayerNorm), dinov2, averaging])
def test_the_twin_is_the_same_function(made):
    model = made().double()
    images = images_for(model)
    wanted = model(images)
    assert (torchvision_twin(model)(images) - wanted).norm() <= EXACT * wanted.norm()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"qk_norm": True}, "no blocks.0.attn.q_norm.weight"),
        ({"reg_tokens": 2}, "no reg_token"),
        ({"qkv_bias": False}, "in_proj_bias"),
        ({"init_values": 0.1, "proj_bias": False}, "other parameters"),
        ({"no_embed_class": True}, "other parameters"),
        ({"global_pool": "avg"}, "no fc_norm.weight"),
        ({"global_pool": "max", "fc_norm": False}, "gives other logits"),
        ({"act_layer": nn.ReLU}, "gives other logits"),
        ({"img_size": (32, 48)}, "square images"),
    ],
)
def test_a_model_that_torchvision_cannot_express_is_refused_with_the_reason(options, why):
    with pytest.raises(NotTakenError, match=why):
        torchvision_twin(small(**options))


def test_other_models_and_old_packages_are_refused_with_the_reason(monkeypatch):
    with pytest.raises(NotTakenError, match="not Linear"):
        torchvision_twin(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "torchcam.methods", None)
    with pytest.raises(NotTakenError, match=r"torchcam [\d.]+ has no LeGrad"):
        packages.legrad(small(), SETUP)
    monkeypatch.setitem(sys.modules, "lxt.efficient", None)
    with pytest.raises(NotTakenError, match=r"cannot be imported .* needs transformers 4"):
        packages.attnlrp(small(), SETUP)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(NotTakenError, match="torchvision cannot be imported"):
        torchvision_twin(small())


def test_methods_not_run_are_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    how = "--images 1 --groups localisation --methods LeGrad,AttnLRP --n-samples 1 --precision fp32"
    found = CliRunner().invoke(app, ["evaluate", *how.split(), "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "results.json").read_text())["not run"] == {
        "LeGrad": f"the package torchcam is missing: {installing('evaluate')}",
        "AttnLRP": f"the package lxt is missing: {installing('lrp')}",
    }
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text()
        assert "Not run" in page
        assert "the package torchcam is missing" in page
        assert "the package lxt is missing" in page
    assert "not run: LeGrad: the package torchcam is missing" in found.output
    assert "not run: AttnLRP: the package lxt is missing" in found.output


def test_a_method_that_does_not_take_the_model_is_listed_and_the_others_run():
    torch.manual_seed(0)
    model = load_demo_model()
    model.blocks[0].attn.q_norm = nn.LayerNorm(48)
    settings = EvaluationSettings(images=1, groups=("localisation",), methods=("LeGrad",))
    found = evaluate(model.requires_grad_(False), DemoScenes(1, 0), settings, SETUP)
    assert "blocks.0.attn.q_norm.weight" in found.absent["LeGrad"]
    assert set(found.scores) == {"DAVE", "|x|", "uniform"}


def test_legrad_is_run_and_scored_and_leaves_no_hook():
    model = load_demo_model().requires_grad_(False)
    settings = EvaluationSettings(images=2, groups=("localisation",), methods=("LeGrad",))
    found = evaluate(model, DemoScenes(2, 0), settings, SETUP)
    assert len(found.scores["LeGrad"]["as it is"]["EnergyPG"]) == 2
    attribute = METHODS["LeGrad"].make(model, SETUP)
    images = images_for(model)
    with torch.no_grad():
        maps = attribute(images, torch.tensor([1, 2]), (0, 1), 0)
    assert maps.min() >= 0
    assert (maps == maps[:, :1]).all()
    assert not torch.equal(maps[:1], attribute(images[:1], torch.tensor([3]), (0,), 0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@needs.lxt
def test_cp_lrp_is_the_frozen_gradient_times_the_image():
    model = load_demo_model().double().requires_grad_(False)
    images, classes = images_for(model), torch.tensor([1, 4])
    found = packages.attnlrp(model, SETUP, gammas=None)(images, classes, (0, 1), 0)
    wanted = effective_gradient(model, images, classes) * images
    # LXT divides by x + 1e-10 where GELU(x)/x is meant
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    with_gammas = packages.attnlrp(model, SETUP)(images, classes, (0, 1), 0)
    assert (with_gammas - wanted).norm() > 0.1 * wanted.norm()


@needs.lxt
def test_attnlrp_is_run_and_scored_and_patches_nothing_that_others_use():
    from zennit.core import BasicHook
    from zennit.rules import Gamma

    kinds = (nn.GELU, nn.LayerNorm, nn.MultiheadAttention, nn.Linear, nn.Conv2d, BasicHook, Gamma)
    before = [(dict(vars(kind)), kind.forward) for kind in kinds]
    model = load_demo_model().requires_grad_(False)
    settings = EvaluationSettings(images=2, groups=("localisation",), methods=("AttnLRP",))
    found = evaluate(model, DemoScenes(2, 0), settings, SETUP)
    assert len(found.scores["AttnLRP"]["as it is"]["EnergyPG"]) == 2
    assert [(dict(vars(kind)), kind.forward) for kind in kinds] == before
