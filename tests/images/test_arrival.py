"""Tests of modules of one's own around a model: their images are prepared so that the model gets its own input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel
from torchvision.transforms import Normalize

from dave_fast.images import preprocessing
from dave_fast.models.catalog import load_model
from tests.tiny import random_vit
from tests.wrapped import MEAN, STD, Own, core


class Around(nn.Module):
    """A module around a model, with one function ahead of it and one behind it."""

    def __init__(self, ahead=lambda x: x, behind=lambda x: x, model=None):
        super().__init__()
        self.backbone = core() if model is None else model
        self.ahead, self.behind = ahead, behind

    def forward(self, images):
        return self.behind(self.backbone(self.ahead(images)))


class Features(Around):
    """A module that calls a method of the model, and has a head of its own."""

    def __init__(self, ahead=lambda x: x):
        super().__init__(ahead)
        self.fc = nn.Linear(24, 3)

    def forward(self, images):
        return self.fc(self.backbone.forward_features(self.ahead(images))[:, 0])


class Named(Around):
    """A module that calls the model by the name of its argument."""

    def forward(self, images):
        return self.backbone(x=self.ahead(images))


class Several(nn.Module):
    """A module around a list of modules."""

    def __init__(self, ahead=lambda x: x):
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity(), core()])
        self.ahead = ahead

    def forward(self, images):
        return self.parts[1](self.ahead(images))


def own_tensors(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


WAYS = {
    "none": lambda x: x,
    "plain tensors": own_tensors,
    "module": Own(),
    "torchvision": Normalize(MEAN, STD),
    "minus one to one": lambda x: 2 * x - 1,
    "bytes": lambda x: own_tensors(x / 255),
    "one channel apart": lambda x: x * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
    "own size": lambda x: F.interpolate(x, (32, 32)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Around, Features, Named, Several])
@pytest.mark.parametrize("wrapper", [lambda m: m, DataParallel, lambda m: nn.Sequential(Normalize(STD, MEAN), m)])
def test_the_model_inside_gets_its_own_input(way, kind, wrapper):
    model = wrapper(kind(WAYS[way])).eval()
    prepare = preprocessing(load_model(model)[0])
    assert "is used" in prepare.note and prepare.mean == preprocessing(model).mean
    pixels = torch.rand(1, 3, 32, 32)
    given = (pixels - torch.tensor(prepare.mean).view(3, 1, 1)) / torch.tensor(prepare.std).view(3, 1, 1)
    if isinstance(model, nn.Sequential):
        given = model[0](given)
    assert (WAYS[way](given) - own_tensors(pixels)).abs().max() < 1e-4


def test_a_model_that_is_called_as_it_is_keeps_its_numbers():
    for kind in (Around, Features, Named, Several):
        prepare = preprocessing(kind())
        assert (prepare.mean, prepare.std, prepare.size) == (MEAN, STD, (32, 32))
    usual = preprocessing(Around(own_tensors))
    assert (usual.mean, usual.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Around(lambda x: x.clamp(0, 1)),
        lambda: Around(lambda x: x - x.mean()),
        lambda: Around(lambda x: x.flip(1)),
        lambda: Around(lambda x: x.flip(3)),
        lambda: Around(lambda x: x + torch.rand_like(x)),
        lambda: Around(lambda x: x.missing),
        lambda: Around(lambda x: F.interpolate(x, (16, 16))),
        lambda: Around(lambda x: x / 255 if x.max() > 2 else x),
        lambda: Around(model=random_vit()),
        lambda: nn.Sequential(core(), core()),
        lambda: Around(lambda x: x * 0),
        lambda: Around(lambda x: x.detach()),
    ],
)
def test_other_ways_are_not_guessed(model):
    made = model()
    state = torch.get_rng_state()
    prepare = preprocessing(made)
    assert prepare.note is not None and "ImageNet" in prepare.note
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_not_changed():
    model = Around(own_tensors)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    preprocessing(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
