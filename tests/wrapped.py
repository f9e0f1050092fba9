"""Models in wrappers, and what the tests of them share."""

import itertools

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dave_fast import DAVE, effective_gradient
from tests.tiny import named_vit
from tests.tolerances import EXACT
from tests.toys import relative

NAMES = ("ant", "bee", "wasp", "newt", "cat")
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def core():
    """Return a timm model with names and a mean and standard deviation of its own."""
    model = named_vit(NAMES)
    model.pretrained_cfg |= {"architecture": "tiny", "tag": "own", "mean": MEAN, "std": STD}
    return model


def lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": ["qkv", "fc1"]} | settings)))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(0, 0.3)
    return made.eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_routes_agree(model, images=IMAGES):
    """Assert that both routes give one gradient in float64, without a warning, and the output of the model itself."""
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1)
    ours = explainer.effective_gradient(images, 1)
    assert explainer.route == "engine"
    assert relative(ours, effective_gradient(model, images, 1)) < EXACT
    own = model.double()(images)
    assert relative(explainer.predict(images).double(), own) < 1e-6


class Own(nn.Module):
    """Normalisation as people write it: a buffer and a plain tensor."""

    def __init__(self, mean=MEAN, std=STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    def forward(self, images):
        return (images - self.mean) / self.std


def compiled(model):
    model.compile()
    return model


class Function(nn.Module):
    """A module that is one function, or calls another module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


WRAPPERS = {
    "torch.compile": torch.compile,
    "module.compile()": compiled,
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "LoRA": lora,
    "Sequential of one": lambda model: nn.Sequential(model).eval(),
    "Sequential with an identity": lambda model: nn.Sequential(nn.Identity(), model, nn.Identity()).eval(),
}


def nestings(depth):
    """Return the names of as many wrappers in every order; adapters are added once, and a module is compiled once."""
    every = itertools.product(WRAPPERS, repeat=depth)
    return [names for names in every if max(map(names.count, ("LoRA", "torch.compile", "module.compile()"))) < 2]


def wrap(model, names):
    """Return a model in wrappers, the innermost first."""
    for name in names:
        model = WRAPPERS[name](model)
    return model
