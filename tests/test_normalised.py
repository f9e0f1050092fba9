"""Tests of a normalisation ahead of a model: it is found by calling it, and folded into the patch projection."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import GaussianBlur, Normalize, RandomHorizontalFlip, Resize

from dave_fast import DAVE, effective_gradient
from dave_fast.given.wrappers import Normalised, unwrapped
from dave_fast.images import preprocessing
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import labels_of
from dave_fast.models.meaning import kind_of, link_of
from tests.tiny import random_vit
from tests.tolerances import EXACT
from tests.toys import relative
from tests.variants import ENGINE, randomise
from tests.wrapped import IMAGES, MEAN, NAMES, STD, WRAPPERS, Function, Own, core, lora, nestings


def batch_norm():
    norm = nn.BatchNorm2d(3).eval()
    randomise(norm)
    return norm


def depthwise():
    return nn.Conv2d(3, 3, 1, groups=3)


NORMALISERS = {
    "torchvision": lambda: Normalize(MEAN, STD),
    "torchvision in place": lambda: Normalize(MEAN, STD, inplace=True),
    "own": Own,
    "half": lambda: Own().half(),
    "bytes": lambda: nn.Sequential(Function(lambda x: x / 255), Own()),
    "chain": lambda: nn.Sequential(nn.Sequential(Own(), nn.Identity()), Normalize((0.1, 0.2, 0.3), (2.0, 3.0, 4.0))),
    "minus one to one": lambda: Function(lambda x: 2 * x - 1),
    "negative": lambda: Function(lambda x: 1 - x),
    "parameters": lambda: depthwise(),
    "batch norm": batch_norm,
    "compiled": lambda: torch.compile(Own(), backend="eager"),
    "with dropout": lambda: nn.Sequential(Own(), nn.Dropout(0.5)),
    "parallel": lambda: DataParallel(Own()),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "vit") for kind in NORMALISERS), ("own", "vit-patch-norm"), ("own", "vit-patch-norm-centred")],
)
def test_normalisation_is_folded_into_the_patch_projection(kind, name):
    torch.manual_seed(0)
    variant = ENGINE[name]
    images = variant.images(dtype=torch.float64)
    model = nn.Sequential(NORMALISERS[kind](), variant.build()).eval()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1, route="engine")
    ours = explainer.effective_gradient(images, 1)
    if "in place" in kind:
        model[0].inplace = False
    if kind == "compiled":
        model[0] = model[0]._orig_mod
    assert relative(ours, effective_gradient(Function(model.double()).eval(), images, 1)) < EXACT


@pytest.mark.parametrize("kind", NORMALISERS)
def test_normalisation_and_preprocessing_make_the_input_that_the_model_expects(kind):
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    model = nn.Sequential(NORMALISERS[kind](), core()).eval()
    prepare = preprocessing(load_model(model)[0])
    assert preprocessing(model).std == prepare.std
    given = (pixels - torch.tensor(prepare.mean).view(3, 1, 1)) / torch.tensor(prepare.std).view(3, 1, 1)
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert (model[0].double()(given) - expected).abs().max() < 1e-4


def test_usual_normalisation_takes_pixels_as_they_are():
    prepare = preprocessing(nn.Sequential(Own(), core()))
    assert (prepare.mean, prepare.std) == ((0.0,) * 3, (1.0,) * 3) and prepare.note is None
    found, name = load_model(nn.Sequential(Own(), core()))
    assert name == "tiny.own" and labels_of(found).names == NAMES
    bare = random_vit()
    assert preprocessing(nn.Sequential(Own(), bare)).std == (1.0,) * 3
    of_bytes = preprocessing(nn.Sequential(Function(lambda x: x / 255), Own(), bare))
    assert of_bytes.std == (1 / 255,) * 3 and "0 to 255" in of_bytes.note


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_normalised_models_inside_and_around_wrappers(step, group):
    for inner, outer in nestings(2)[::step]:
        model = WRAPPERS[outer](nn.Sequential(Own(), WRAPPERS[inner](core())).eval())
        found, name = load_model(model)
        assert type(found) is Normalised and type(found.model) is type(core()) and name == "tiny.own"
        assert preprocessing(model).mean == (0.0,) * 3 and labels_of(found).names == NAMES


OTHERS = {
    "clamp": lambda x: x.clamp(0, 1),
    "far clamp": lambda x: x.clamp(-50, 50),
    "mixed channels": lambda x: x.flip(1),
    "mean of the image": lambda x: x - x.mean((2, 3), keepdim=True),
    "deviation of the image": lambda x: x / x.std(),
    "place": lambda x: x * torch.arange(x.shape[-1]),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "flip": RandomHorizontalFlip(),
    "turn": lambda x: x.flip(3),
    "blur": GaussianBlur(3, 1.0),
    "resize": Resize((32, 32)),
    "bytes or not": lambda x: x / 255 if x.max() > 2 else x,
    "batch": lambda x: x - x.mean(0, keepdim=True),
    "size": lambda x: x / x.shape[-1],
    "grey": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "rounded": lambda x: (x * 255).round() / 255,
    "single": lambda x: (x.float() / 3).double(),
    "gamma": lambda x: x.abs() ** 2.2,
    "detached": lambda x: x.detach() * 2,
    "no gradient of a part": lambda x: x + x.detach(),
    "zero": lambda x: x * 0,
    "infinite": lambda x: x / 0,
    "error": lambda x: x.no_such_attribute,
    "upscaled": lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_map_of_single_channels_is_not_seen_through(kind):
    model = nn.Sequential(Function(OTHERS[kind]), core())
    state = torch.get_rng_state()
    assert unwrapped(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert preprocessing(model).note is not None


@pytest.mark.parametrize("wrapper", [DataParallel, AveragedModel, nn.Sequential, lora])
def test_a_wrapper_that_says_what_it_is_stays(wrapper):
    model = wrapper(core())
    model.pretrained_cfg = {"mean": (0.1, 0.1, 0.1), "label_names": tuple("abcde")}
    model.num_classes = 5
    assert unwrapped(model) is model
    assert preprocessing(model).mean == (0.1,) * 3 and labels_of(model).names == tuple("abcde")


@pytest.mark.parametrize("wrapper", [DataParallel, AveragedModel, nn.Sequential, lora, torch.compile])
@pytest.mark.parametrize("classes", [0, 1, 5, 9])
def test_the_meaning_of_the_output_is_that_of_the_model(wrapper, classes):
    model = core()
    model.reset_classifier(classes)
    around = wrapper(model)
    for each in (around, nn.Sequential(Own(), around), load_model(nn.Sequential(Own(), around))[0]):
        assert kind_of(each) == kind_of(model) and labels_of(each) == labels_of(model)
        assert link_of(each, classes) == link_of(model, classes)


def test_normalisation_with_a_hook_is_not_seen_through():
    model = nn.Sequential(Own(), core())
    model[0].register_forward_hook(lambda module, given, output: output + 1)
    assert unwrapped(model) is model


def test_a_changed_normalisation_is_explained_by_the_next_call():
    model = nn.Sequential(Own(), random_vit()).eval()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1)
    explainer.effective_gradient(IMAGES, 1)
    model[0].mean += 0.3
    assert relative(explainer.effective_gradient(IMAGES, 1), effective_gradient(model, IMAGES, 1)) < EXACT
    assert explainer.route == "engine"


def test_a_normalisation_that_is_no_longer_one_takes_the_frozen_route():
    scale = Function(lambda x: 2 * x)
    model = nn.Sequential(scale, random_vit()).eval()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1)
    scale.function = lambda x: 2 * x.clamp(-1, 1)
    with pytest.warns(UserWarning, match="no map of single channels"):
        explainer.effective_gradient(IMAGES, 1)


def test_tokens_of_a_normalised_model_are_those_of_the_model():
    from dave_fast.targets import Patch, tokens_of

    model = nn.Sequential(Own(), random_vit()).eval()
    tokens = tokens_of(unwrapped(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = DAVE(tokens, precision="fp64", noise_alpha=0.1).explain(IMAGES, Patch(1, 2), n_samples=2)
    assert found.output.shape == (2, 17, 24)


def test_a_copy_of_a_normalised_model_is_one_of_the_whole():
    import copy
    import pickle

    class Careful(nn.Module):
        def __deepcopy__(self, memo):
            raise AssertionError

    found = unwrapped(nn.Sequential(Own(), random_vit()).eval())
    for made in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(made) is Normalised and torch.equal(made(IMAGES.float()), found(IMAGES.float()))
    with pytest.raises(AssertionError):
        copy.deepcopy(Normalised(Own(), Careful()))
