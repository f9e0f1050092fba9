"""Tests of B-cos ViTs: the frozen route holds their dynamic scaling constant, as their own explanation does."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dave_fast
from dave_fast.errors import InputError, ModelError
from dave_fast.frozen.proof import prove_frozen
from dave_fast.images import from_config, preprocessing
from dave_fast.models.from_bcos import adapt, add_inverse, inherent_contributions
from tests.tolerances import EXACT
from tests.toys import relative

pytest.importorskip("bcos", reason="the bcos package is an extra: pip install 'dave-fast[bcos]'")

CLASSES = 7


def tiny(stem: bool = False, b: float = 2, max_out: int = 1) -> nn.Module:
    """Build the package's SimpleViT with B-cos layers, as bcos.models.pretrained does, but small."""
    from bcos.models.vit import SimpleViT
    from bcos.modules import BcosConv2d, BcosLinear, DetachableGNLayerNorm2d, LogitLayer, norms
    from bcos.modules.common import BcosSequential

    size = {"image_size": 8, "patch_size": 1, "conv_stem": [8, 16]} if stem else {"image_size": 32, "patch_size": 8}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # it warns users who do not take the entry points, which have no small model
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        body = SimpleViT(
            **size,
            num_classes=CLASSES,
            dim=32,
            depth=2,
            heads=2,
            mlp_dim=64,
            channels=6,
            linear_layer=partial(BcosLinear, b=b, max_out=max_out),
            conv2d_layer=partial(BcosConv2d, b=b, max_out=max_out),
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            norm2d_layer=norms.NoBias(DetachableGNLayerNorm2d),
            act_layer=nn.Identity,
        )
    return BcosSequential(body, LogitLayer(logit_bias=math.log(1 / (CLASSES - 1)))).eval()


def pictures(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return add_inverse(torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype))


VARIANTS = {
    "vit": {},
    "vit-conv-stem": {"stem": True},
    "b-1.5": {"b": 1.5},
    "b-2.5-conv-stem": {"b": 2.5, "stem": True},
    "max-out": {"max_out": 2},
    "max-out-conv-stem": {"max_out": 2, "stem": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_frozen_gradient_is_the_models_own_explanation(name):
    model, images = tiny(**VARIANTS[name]).double(), pictures(dtype=torch.float64)
    classes = torch.tensor([3, 5])
    found = dave_fast.effective_gradient(model, images, classes, precision="fp64") * images
    own = inherent_contributions(model, images, classes)
    assert relative(found, own) < EXACT
    # the package explains image by image
    for i in range(2):
        said = model.explain(images[i : i + 1].requires_grad_(), idx=int(classes[i]))["contribution_map"]
        assert relative(found[i : i + 1].sum(1), said.detach()) < EXACT
        images = images.detach()
    leaf = images.clone().requires_grad_()
    (full,) = torch.autograd.grad(model(leaf).gather(1, classes[:, None]).sum(), leaf)
    assert relative(full * images, own) > 0.05


@pytest.mark.parametrize("name", VARIANTS)
def test_the_affine_replay_passes(name):
    assert prove_frozen(tiny(**VARIANTS[name]), pictures()).has_attention


def test_without_bias_the_contributions_are_the_logit():
    """LayerNorm has no bias here, and the position embedding, the only added constant, is set to zero."""
    model, images = tiny().double(), pictures(dtype=torch.float64)
    model[0].positional_embedding.forward = lambda patches: patches.new_zeros(())
    contributions = inherent_contributions(model, images, torch.tensor([0, 1])).sum((1, 2, 3))
    logits = model(images).detach()[[0, 1], [0, 1]] - math.log(1 / (CLASSES - 1))
    assert relative(contributions, logits) < EXACT


def test_dave_explains_six_channels():
    model, images = tiny(), pictures()
    explainer = dave_fast.DAVE(model, device="cpu", precision="fp32", noise_alpha=0.05)
    with pytest.warns(UserWarning, match="frozen route is taken"):
        found = explainer.explain(images, n_samples=3)
    assert explainer.route == "frozen"
    assert found.raw.shape == (2, 6, 32, 32) and found.maps.shape == (2, 32, 32)
    assert torch.equal(found.target, model(images).argmax(1))
    assert found.maps.amax((1, 2)).allclose(torch.ones(2))


def test_dave_without_perturbations_is_the_models_own_map():
    model, images = tiny(stem=True), pictures()
    still = dict(noise_alpha=0.0, rotation=0.0, scale=(1.0, 1.0), translation=0.0, flip=0.0)
    explainer = dave_fast.DAVE(model, device="cpu", precision="fp32", route="frozen", **still)
    raw = explainer.explain(images, [1, 2], n_samples=1).raw
    assert relative(raw, inherent_contributions(model, images, torch.tensor([1, 2]))) < 1e-5


def test_a_photograph_gets_six_channels():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    prepare = preprocessing(adapt(tiny()))
    assert prepare.size == (224, 224)
    inputs, crop = prepare(Image.fromarray(pixels))
    assert inputs.shape == (6, 224, 224) and crop.shape == (224, 224, 3)
    assert torch.equal(inputs[3:], 1 - inputs[:3])
    assert np.array_equal(np.rint(inputs[:3].permute(1, 2, 0).numpy() * 255), crop)
    assert torch.equal(prepare.normalised(prepare.crop(Image.fromarray(pixels))), inputs)
    again = from_config(dict(prepare.config))
    assert torch.equal(again(Image.fromarray(pixels))[0], inputs)


def test_the_preprocessing_is_the_packages_own():
    from bcos.data.presets import ImageNetClassificationPresetEval

    model = tiny()
    model.transform = ImageNetClassificationPresetEval(crop_size=96, resize_size=120, is_bcos=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (130, 170, 3), np.uint8))
    assert torch.equal(preprocessing(adapt(model))(picture)[0], model.transform(picture))


def test_the_adapter_is_the_model():
    model, images = tiny(), pictures()
    adapted = adapt(model)
    assert adapted.num_classes == CLASSES and adapted.kind == "classifier"
    assert torch.equal(adapted(images), model(images))
    classes = torch.tensor([0, 1])
    assert torch.equal(inherent_contributions(adapted, images, classes), inherent_contributions(model, images, classes))


def test_a_model_of_the_package_is_known_by_its_class():
    from dave_fast.models.catalog import load_model

    model, name = load_model(tiny())
    assert type(model).__name__ == "BcosModel" and name == "BcosSequential"


def test_plain_errors():
    with pytest.raises(InputError, match=r"pixels from -\d.* do not normalise"):
        add_inverse(torch.randn(1, 3, 4, 4))
    with pytest.raises(InputError, match="expected three channels"):
        add_inverse(torch.rand(1, 6, 4, 4))
    model = tiny()
    with model.explanation_mode(), pytest.raises(ModelError, match="explanation mode"):
        adapt(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simple_vit_ti_patch16_224", "vitc_ti_patch1_14"])
def test_the_packages_entry_points(name):
    from bcos.models import pretrained

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(pretrained, name)(pretrained=False).eval().double()
    images = add_inverse(torch.rand(1, 3, 224, 224, dtype=torch.float64))
    found = dave_fast.effective_gradient(model, images, 7, precision="fp64", route="frozen") * images
    assert relative(found, inherent_contributions(model, images, torch.tensor([7]))) < EXACT
