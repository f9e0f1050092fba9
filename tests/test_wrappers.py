"""Tests of models in wrappers: each is explained as the model inside, or as it is called."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import GaussianBlur, Normalize

from dave_fast import DAVE, effective_gradient
from dave_fast.errors import ModelError
from dave_fast.given.wrappers import unwrapped
from dave_fast.images import preprocessing
from dave_fast.models.catalog import load_model, model_name
from dave_fast.models.labels import labels_of
from tests.tiny import random_vit
from tests.tolerances import EXACT
from tests.toys import relative
from tests.wrapped import (
    IMAGES,
    MEAN,
    NAMES,
    STD,
    WRAPPERS,
    Function,
    Own,
    assert_routes_agree,
    core,
    lora,
    nestings,
    wrap,
)


@pytest.mark.parametrize("depth", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_nesting_of_wrappers_has_the_preprocessing_and_names_of_its_model(depth, group):
    for names in nestings(depth):
        model = wrap(core(), names)
        found, name = load_model(model)
        assert type(found) is type(core()), names
        assert name == model_name(model) == "tiny.own"
        assert preprocessing(model).mean == preprocessing(found).mean == MEAN
        assert labels_of(found).names == NAMES
        assert any(found is each for each in model.modules())


@pytest.mark.parametrize("names", [(name,) for name in WRAPPERS if "ompile" not in name] + [("LoRA", "DataParallel")])
def test_wrapped_models_take_the_engine_and_agree_with_the_frozen_route(names, group):
    assert_routes_agree(wrap(random_vit(), names))


def averaged_by_timm(model):
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model)


def mixed_adapters(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"]), mixed=True).eval()


def tuner_alone(model):
    return lora(model).base_model


def no_adapter_left(model):
    wrapper = lora(model)
    wrapper.delete_adapter("default")
    return wrapper.eval()


@pytest.mark.parametrize("wrapper", [averaged_by_timm, mixed_adapters, tuner_alone])
def test_rarer_wrappers_are_seen_through(wrapper):
    model = wrapper(core())
    found, name = load_model(DataParallel(model))
    assert type(found) is type(core()) and name == "tiny.own" and preprocessing(model).mean == MEAN
    assert torch.equal(found(IMAGES.float()), model(IMAGES.float()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", [lambda m: m, DataParallel, nn.Sequential, lambda m: nn.Sequential(Own(), m)])
def test_torchscript_in_wrappers_is_refused(wrapper):
    model = wrapper(torch.jit.trace(random_vit(), IMAGES.float()))
    with pytest.raises(ModelError, match="TorchScript"):
        DAVE(model, noise_alpha=0.1, precision="fp32").explain(IMAGES.float(), n_samples=1)


def test_a_wrapper_whose_adapter_was_deleted_is_explained_as_its_model():
    model = no_adapter_left(random_vit())
    assert relative(effective_gradient(model, IMAGES, 1), effective_gradient(random_vit(), IMAGES, 1)) < EXACT


def call_twice(model):
    class Twice(DataParallel):
        def forward(self, images):
            return 2 * self.module(images)

    return Twice(model)


def with_hook(model):
    wrapper = DataParallel(model)
    wrapper.register_forward_hook(lambda module, given, output: 2 * output)
    return wrapper


def with_early_hook(model):
    wrapper = DataParallel(model)
    wrapper.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return wrapper


def with_forward(model):
    wrapper = AveragedModel(model)
    wrapper.forward = lambda images: 2 * wrapper.module(images)
    return wrapper


def sequential_with_hook(model):
    wrapper = nn.Sequential(Normalize(MEAN, STD), model).eval()
    wrapper.register_forward_hook(lambda module, given, output: 2 * output)
    return wrapper


def compiled_with_hook(model):
    wrapper = torch.compile(model, backend="eager")
    wrapper.register_forward_hook(lambda module, given, output: 2 * output)
    return wrapper


def compiled_with_forward(model):
    wrapper = torch.compile(model, backend="eager")
    wrapper.forward = lambda images: 2 * wrapper._orig_mod(images)
    return wrapper


def lora_with_hook(model):
    wrapper = lora(model)
    wrapper.register_forward_hook(lambda module, given, output: 2 * output)
    return wrapper


def sequential_with_more(model):
    return nn.Sequential(model, nn.Linear(5, 5)).eval()


def nested_with_hook(model):
    return nn.Sequential(with_hook(model)).eval()


@pytest.mark.parametrize(
    "wrapper",
    [
        call_twice,
        with_hook,
        with_early_hook,
        with_forward,
        sequential_with_hook,
        compiled_with_hook,
        compiled_with_forward,
        lora_with_hook,
        sequential_with_more,
        nested_with_hook,
    ],
)
def test_a_wrapper_that_computes_something_is_not_seen_through(wrapper):
    model = wrapper(random_vit()).double()
    found = unwrapped(model)
    assert found is model or found in list(model.children())
    assert torch.equal(found(IMAGES), model(IMAGES))


def compile_blocks(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block)
    return model


def compile_inside(model):
    return Function(torch.compile(compile_blocks(model)))


def compile_in_place(model):
    for block in model.blocks:
        block.compile()
    return Function(model)


@pytest.mark.parametrize("wrapper", [compile_blocks, compile_inside, compile_in_place])
@pytest.mark.filterwarnings("ignore:the frozen route")
def test_compiled_parts_of_a_model_are_run_as_they_were_written(wrapper):
    expected = effective_gradient(random_vit(), IMAGES, 1)
    model = wrapper(random_vit()).eval()
    assert relative(DAVE(model, precision="fp64", noise_alpha=0.1).effective_gradient(IMAGES, 1), expected) < EXACT


@pytest.mark.parametrize("wrapper", [compiled_with_forward, compiled_with_hook])
@pytest.mark.filterwarnings("ignore:the frozen route")
def test_a_compiled_model_whose_copy_would_be_another_is_refused(wrapper):
    with pytest.raises(ModelError, match=r"OptimizedModule cannot be copied.*has hooks or a forward of its own"):
        DAVE(wrapper(random_vit()), precision="fp32", noise_alpha=0.1).predict(IMAGES)


def test_a_patched_class_of_wrappers_is_not_seen_through(monkeypatch):
    model = DataParallel(random_vit())
    monkeypatch.setattr(DataParallel, "forward", lambda self, images: 2 * self.module(images))
    assert unwrapped(model) is model


def replace_module(model):
    model.module = random_vit(1)


def replace_compiled(model):
    model._orig_mod = random_vit(1)


def replace_part(model):
    model[-1] = random_vit(1)


def replace_normalisation(model):
    model[0] = Normalize(STD, MEAN)


def add_hook(model):
    model.register_forward_hook(lambda module, given, output: 2 * output)


def replace_forward(model):
    model.forward = lambda images: images.mean((2, 3))


def append(model):
    model.append(nn.Linear(5, 5))


def replace_deep_part(model):
    model.module[1] = random_vit(1)


def hook_on_deep_part(model):
    add_hook(model.module)


def one(model):
    return nn.Sequential(model).eval()


def two(model):
    return nn.Sequential(Own(), model).eval()


@pytest.mark.parametrize(
    ("wrapper", "change"),
    [
        (DataParallel, replace_module),
        (AveragedModel, replace_module),
        (torch.compile, replace_compiled),
        (one, replace_part),
        (two, replace_part),
        (two, replace_normalisation),
        (two, append),
        (DataParallel, add_hook),
        (lora, add_hook),
        (two, add_hook),
        (AveragedModel, replace_forward),
        (lambda model: DataParallel(two(model)), replace_deep_part),
        (lambda model: DataParallel(two(model)), hook_on_deep_part),
    ],
)
def test_a_wrapper_that_was_changed_is_refused(wrapper, change):
    model = wrapper(random_vit())
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1)
    before = explainer.predict(IMAGES)
    assert torch.equal(explainer.predict(IMAGES), before)
    change(model)
    for call in (explainer.predict, explainer.effective_gradient, explainer.explain):
        with pytest.raises(ModelError, match=r"that was given has been changed since.*make a new DAVE"):
            call(IMAGES)


def test_a_part_of_a_sequence_that_is_not_seen_through_may_change():
    blur = GaussianBlur(3, 1.0)
    model = nn.Sequential(blur, random_vit()).eval()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1, route="frozen")
    before = explainer.predict(IMAGES)
    model[1] = random_vit(1)
    assert relative(explainer.predict(IMAGES), before) > 0.1
