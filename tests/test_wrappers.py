"""Tests of models in wrappers: each is explained as the model inside, or as it is called."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import GaussianBlur, Normalize, RandomHorizontalFlip, Resize

from dave_fast import DAVE, effective_gradient
from dave_fast.images import preprocessing
from dave_fast.models.catalog import load_model, model_name
from dave_fast.models.labels import labels_of
from dave_fast.models.meaning import kind_of, link_of
from dave_fast.wrappers import Normalised, unwrapped
from tests.tiny import named_vit, random_vit
from tests.tolerances import EXACT
from tests.toys import relative
from tests.variants import ENGINE, randomise

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


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Set up a process group of this process alone, which DistributedDataParallel needs."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    model.compile()
    return model


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


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_routes_agree(model, images=IMAGES):
    """Assert that both routes give one gradient in float64, without a warning, and the output of the model itself."""
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1)
    ours = explainer.effective_gradient(images, 1)
    assert explainer.route == "engine"
    assert relative(ours, effective_gradient(model, images, 1)) < EXACT
    own = model.double()(images)
    assert relative(explainer.predict(images).double(), own) < 1e-6


@pytest.mark.parametrize("names", [(name,) for name in WRAPPERS if "ompile" not in name] + [("LoRA", "DataParallel")])
def test_wrapped_models_take_the_engine_and_agree_with_the_frozen_route(names, group):
    assert_routes_agree(wrap(random_vit(), names))


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


def test_a_patched_class_of_wrappers_is_not_seen_through(monkeypatch):
    model = DataParallel(random_vit())
    monkeypatch.setattr(DataParallel, "forward", lambda self, images: 2 * self.module(images))
    assert unwrapped(model) is model


# adapters


ADAPTERS = {
    "plain": {},
    "all layers": {"target_modules": ["qkv", "attn.proj", "fc1", "fc2"]},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.5},
    "bias": {"lora_bias": True},
    "head": {"target_modules": ["qkv", "head"]},
    "saved head": {"modules_to_save": ["head"]},
    "saved head and norm": {"modules_to_save": ["head", "fc_norm"]},
    "ranks": {"rank_pattern": {"fc1": 5}, "alpha_pattern": {"qkv": 7}},
    "initialised": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_is_read_as_its_merged_weight(kind):
    from peft import PeftModel

    model = lora(random_vit(), **ADAPTERS[kind])
    assert isinstance(model, PeftModel)
    assert_routes_agree(model)


@pytest.mark.parametrize(
    "name",
    ["vit-parallel", "vit-parallel-things", "vit-swiglu", "vit-post-norm", "dinov3", "rope", "relative-position"],
)
def test_lora_in_other_families_is_read_as_its_merged_weight(name):
    variant = ENGINE[name]
    model = variant.build(torch.float64)
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith("blocks")]
    assert_routes_agree(lora(model, target_modules=layers), variant.images(dtype=torch.float64))


def several():
    from peft import LoraConfig

    model = lora(random_vit(), lora_dropout=0.1)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["fc1", "fc2"]))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "second" in name:
                weight.normal_(0, 0.3)
    return model.eval()


def second(model):
    model.set_adapter("second")


def both(model):
    model.base_model.set_adapter(["default", "second"])


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def scaled(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)


@pytest.mark.parametrize("change", [second, both, disabled, merged, scaled])
def test_the_adapters_that_are_active_are_explained(change):
    model = several()
    before = effective_gradient(model, IMAGES, 1, route="engine")
    change(model)
    assert_routes_agree(model)
    after = effective_gradient(model, IMAGES, 1, route="engine")
    assert (relative(after, before) < 1e-6) == (change is merged)


def test_injected_adapters_are_read_as_merged_weights():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"]), random_vit())
    randomise(model)
    assert_routes_agree(model.eval())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("vit", {"use_dora": True}, "none of the plain form"),
        ("vit", {"target_modules": ["patch_embed.proj"]}, "patch embedding has a Conv2d of another form"),
        ("eva02", {"target_modules": ["qkv"]}, "separate biases"),
        ("beit", {"target_modules": ["qkv"]}, "separate biases"),
    ],
)
def test_adapters_without_a_merged_weight_take_the_frozen_route(name, settings, reason):
    variant = ENGINE[name]
    explainer = DAVE(lora(variant.build(), **settings), precision="fp64", noise_alpha=0.1)
    with pytest.warns(UserWarning, match=f"frozen.*{reason}"):
        explainer.effective_gradient(variant.images(dtype=torch.float64), 1)


def test_adapters_that_would_be_unmerged_by_a_call_are_not_read():
    model = several()
    merged(model)
    disabled(model)
    from dave_fast.plan.families import why_not

    assert "merged and disabled" in why_not(unwrapped(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_of_a_transformers_model_is_adapted():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    inner = ViTForImageClassification(config).eval()
    names = [name for name, module in inner.named_modules() if type(module) is nn.Linear and "classifier" not in name]
    model = lora(inner, target_modules=names, modules_to_save=["classifier"])
    found, name = load_model(DataParallel(model))
    assert name == "ViTForImageClassification" and found.kind == "classifier"
    assert torch.equal(found(IMAGES.float()), model(IMAGES.float()).logits)
    found, _ = load_model(nn.Sequential(Normalize(MEAN, STD), model).eval())
    assert isinstance(found, Normalised) and found.kind == "classifier" and labels_of(found).count == 2
    assert torch.equal(found(IMAGES.float()), model(Normalize(MEAN, STD)(IMAGES.float())).logits)


# normalisation ahead of a model


class Own(nn.Module):
    """Normalisation as people write it: a buffer and a plain tensor."""

    def __init__(self, mean=MEAN, std=STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    def forward(self, images):
        return (images - self.mean) / self.std


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


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


def test_normalised_models_inside_and_around_wrappers(group):
    for inner, outer in nestings(2):
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
