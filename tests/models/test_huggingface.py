"""Tests of modules of transformers, and of subclasses of its base class: each is explained by its own forward."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dave_fast import DAVE
from dave_fast.errors import ModelError
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import labels_of
from dave_fast.models.meaning import kind_of, link_of

K = 7
VIT = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=100)
TEXT |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
SWIN = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def explainer(model):
    return DAVE(model, noise_alpha=0.1, precision="fp32", route="frozen")


def check(model, expected, target, size=32):
    """Assert that a model is predicted as it computes itself, and explained for a target."""
    x = images(size=size)
    with torch.no_grad():
        expected = expected(model, x)
    explain = explainer(model)
    torch.testing.assert_close(explain.predict(x), expected)
    made = explain.explain(x, target, 1)
    assert made.raw.shape == x.shape and made.raw.abs().sum() > 0
    return explain, made


# Subclasses of the user's own

Pair = namedtuple("Pair", ["logits", "extra"])


@dataclass
class Result:
    logits: Tensor
    loss: None = None


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


def model_output(z, h):
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=z, hidden_states=(h,))


FORMS = {
    "tensor": lambda z, h: z,
    "ModelOutput": model_output,
    "dict": lambda z, h: {"logits": z, "features": h},
    "dict of another name": lambda z, h: {"scores": z},
    "tuple of one": lambda z, h: (z,),
    "logits and features": lambda z, h: (z, h[:, 0]),
    "features and logits": lambda z, h: (h[:, 0], z),
    "loss and logits": lambda z, h: (z.mean(), z),
    "None and logits": lambda z, h: (None, z),
    "logits and states": lambda z, h: (z, (h, h)),
    "named tuple": lambda z, h: Pair(z, h),
    "data class": lambda z, h: Result(z),
    "namespace": lambda z, h: SimpleNamespace(logits=z),
    "slots": lambda z, h: Slots(z),
}
ARGUMENTS = (
    "x",
    "pixel_values",
    "images",
    "inputs",
    "image, mask=None",
    "*args",
    "**kwargs",
    "labels=None, pixel_values=None",
    "pixel_values, interpolate_pos_encoding=False",
    "x, return_dict=None",
)


def own(argument, form, width=K, config=None):
    """Return a model of a class of the user's whose forward has an argument, and returns a form."""
    from transformers import ViTConfig, ViTModel, ViTPreTrainedModel

    def head(self, x):
        hidden = self.vit(x).last_hidden_state
        return form(self.head(hidden[:, 0]), hidden)

    taken = {"*args": "args[0]", "**kwargs": "kwargs['pixel_values']"}
    name = "pixel_values" if "pixel_values" in argument else argument.partition(",")[0]
    space = {"head": head}
    exec(f"def forward(self, {argument}):\n    return head(self, {taken.get(argument, name)})", space)

    class Own(ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.vit = ViTModel(config, add_pooling_layer=False)
            self.head = nn.Linear(32, width)
            self.post_init()

    Own.forward = space["forward"]
    torch.manual_seed(0)
    model = Own(ViTConfig(**VIT, **({"num_labels": K} | (config or {})))).eval()
    nn.init.normal_(model.head.weight)
    return model


def own_logits(model, x):
    return model.head(model.vit(x).last_hidden_state[:, 0])


@pytest.mark.parametrize(("number", "form"), list(enumerate(FORMS)))
def test_own_classifier_of_any_argument_and_return_is_explained_as_a_classifier(number, form):
    model = own(ARGUMENTS[number % len(ARGUMENTS)], FORMS[form])
    explain, made = check(model, own_logits, None)
    assert kind_of(explain.model) == "classifier" and labels_of(explain.model).count == K
    assert torch.equal(made.target, made.output.argmax(1))
    torch.testing.assert_close(made.probability, made.output.softmax(1).amax(1))
    assert model.head.weight.grad is None and not model.vit._forward_hooks


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_own_forward_with_any_argument_gets_the_images(argument):
    model = own(argument, FORMS["tensor"])
    adapted, _ = load_model(model)
    assert torch.equal(adapted(images()), own_logits(model, images()))


@pytest.mark.parametrize("width", [1, 3, 8, 32])
def test_own_output_of_another_width_than_num_labels_is_an_embedding(width):
    explain, made = check(own("x", FORMS["tensor"], width), own_logits, 0)
    assert kind_of(explain.model) == "embedding" and made.probability.isnan().all()


AMBIGUOUS = {
    "two logits": lambda z, h: (z, 2 * z),
    "two features": lambda z, h: (h, h[:, 0]),
    "dict of two": lambda z, h: {"a": z, "b": z},
    "dict of heads": lambda z, h: {"logits": {"a": z, "b": z}},
    "nothing": lambda z, h: None,
    "empty tuple": lambda z, h: (),
    "empty dict": lambda z, h: {},
    "loss alone": lambda z, h: {"loss": z.mean()},
    "list": lambda z, h: {"all": [z, z]},
    "text": lambda z, h: "cat",
}


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_own_output_that_could_be_several_things_is_refused(form):
    adapted, _ = load_model(own("x", AMBIGUOUS[form]))
    with pytest.raises(ModelError, match="give a module whose forward returns the one that you mean"):
        adapted(images())


def test_forward_replaced_on_the_module_is_called():
    model = own("x", FORMS["tensor"])
    model.forward = MethodType(lambda self, x: -own_logits(self, x), model)
    check(model, lambda model, x: -own_logits(model, x), 3)


def test_subclass_of_a_classifier_that_overrides_its_forward_is_explained_by_it():
    from transformers import ViTConfig, ViTForImageClassification

    class Doubled(ViTForImageClassification):
        def forward(self, pixel_values):
            return 2 * super().forward(pixel_values).logits.flip(1)

    class Renamed(ViTForImageClassification):
        pass

    for kind, factor in ((Doubled, 2), (Renamed, 1)):
        torch.manual_seed(0)
        model = kind(ViTConfig(**VIT, num_labels=K)).eval()
        z = ViTForImageClassification.forward(model, images()).logits
        adapted, _ = load_model(model)
        torch.testing.assert_close(adapted(images()), factor * (z.flip(1) if factor == 2 else z))
        assert kind_of(adapted) == "classifier" and labels_of(adapted).count == K


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [224, 384, 96, 32])
def test_own_configuration_without_a_size_is_tried_at_the_usual_ones(channels, side):
    from transformers import PretrainedConfig, PreTrainedModel

    class OwnConfig(PretrainedConfig):
        model_type = "own"

    class Own(PreTrainedModel):
        config_class = OwnConfig

        def __init__(self, config):
            super().__init__(config)
            self.patches = nn.Conv2d(channels, 8, 16, 16)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, K)

        def forward(self, x):
            assert x.shape[-1] == side, "another size"
            tokens = self.patches(x).flatten(2).mT
            return self.head((tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))

    adapted, _ = load_model(Own(OwnConfig(num_labels=K)).eval())
    assert kind_of(adapted) == "classifier" and adapted.num_classes == K
    assert adapted(torch.randn(2, channels, side, side)).shape == (2, K)


def test_trial_of_a_forward_leaves_the_module_and_the_generator_alone():
    model = own("x", FORMS["tensor"])
    inner = model.forward

    def counting(self, x):
        self.seen = x
        torch.rand(1)
        return inner(x)

    model.forward = MethodType(counting, model)
    state = torch.get_rng_state()
    load_model(model)
    assert not hasattr(model, "seen") and torch.equal(torch.get_rng_state(), state)


# Classes of transformers


def made(name, config, **settings):
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def field(name):
    return lambda model, x: getattr(model(x), name)


def class_token(model, x):
    return model(x).last_hidden_state[:, 0]


SEGFORMER = dict(depths=[1] * 4, hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16)
DINOV2 = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
DPT = VIT | dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8])
DPT |= dict(fusion_hidden_size=8, is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5])
YOLOS = VIT | dict(image_size=[32, 32], num_detection_tokens=5)
# name of the class, configuration, its settings, own output, target of one element
THEIRS = [
    ("ViTForImageClassification", "ViTConfig", VIT, field("logits"), None),
    ("DeiTForImageClassification", "DeiTConfig", VIT, field("logits"), None),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT, field("logits"), None),
    ("SwinForImageClassification", "SwinConfig", SWIN, field("logits"), None),
    ("BeitForImageClassification", "BeitConfig", VIT, field("logits"), None),
    ("CLIPForImageClassification", "CLIPConfig", dict(vision_config=VIT, text_config=TEXT), field("logits"), None),
    ("SiglipForImageClassification", "SiglipConfig", dict(vision_config=VIT, text_config=TEXT), field("logits"), None),
    ("SegformerForImageClassification", "SegformerConfig", SEGFORMER, field("logits"), None),
    ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, field("logits"), (2, 3, 4)),
    ("DPTForDepthEstimation", "DPTConfig", DPT, field("predicted_depth"), (31, 31)),
    ("YolosForObjectDetection", "YolosConfig", YOLOS, field("logits"), (1, 2)),
    ("ViTForMaskedImageModeling", "ViTConfig", VIT | dict(encoder_stride=8), field("reconstruction"), (0, 3, 4)),
    ("BeitForMaskedImageModeling", "BeitConfig", VIT | dict(vocab_size=11), field("logits"), (3, 4)),
    ("ViTModel", "ViTConfig", VIT, class_token, 3),
    ("SwinModel", "SwinConfig", SWIN, field("pooler_output"), 3),
    ("Dinov2Model", "Dinov2Config", DINOV2, field("pooler_output"), 3),
    ("SegformerModel", "SegformerConfig", SEGFORMER, field("last_hidden_state"), (1, 0, 0)),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT | dict(projection_dim=16), field("image_embeds"), 3),
    ("Dinov2Backbone", "Dinov2Config", DINOV2, lambda model, x: model(x).feature_maps[0], (1, 2, 3)),
    ("IJepaModel", "IJepaConfig", VIT, field("last_hidden_state"), (1, 2)),
]


def detr():
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"])
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    layers |= dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=K)
    torch.manual_seed(0)
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, use_timm_backbone=False, **layers)).eval()


def test_object_of_a_detector_with_a_convolutional_backbone_is_explained():
    check(detr(), field("logits"), (1, 2), 64)


@pytest.mark.parametrize(("name", "config", "settings", "expected", "target"), THEIRS, ids=[row[0] for row in THEIRS])
def test_class_of_transformers_is_explained_by_its_own_output(name, config, settings, expected, target):
    size = 64 if "Segformer" in name else 32
    explain, result = check(made(name, config, **settings, num_labels=K), expected, target, size)
    classifier = "ForImageClassification" in name
    assert kind_of(explain.model) == ("classifier" if classifier else "embedding")
    assert result.probability.isnan().all() != classifier


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize(
    ("problem", "labels", "link"),
    [
        ("single_label_classification", 5, "softmax"),
        (None, 5, "softmax"),
        ("multi_label_classification", 5, "sigmoid"),
        ("regression", 5, None),
        ("regression", 1, None),
        (None, 1, "sigmoid"),
    ],
)
def test_probability_follows_the_problem_type(problem, labels, link, theirs):
    settings = dict(problem_type=problem, num_labels=labels)
    if theirs:
        model = made("ViTForImageClassification", "ViTConfig", **VIT, **settings)
    else:
        model = own("x", FORMS["tensor"], labels, settings)
    adapted, _ = load_model(model)
    assert kind_of(adapted) == "classifier" and link_of(adapted, labels) == link


@pytest.mark.parametrize("width", [1, 2, 5, 8, 100])
def test_replaced_head_has_as_many_classes_as_outputs_and_no_names(width):
    names = {i: f"bird {i}" for i in range(K)}
    model = made("ViTForImageClassification", "ViTConfig", **VIT, id2label=names)
    assert labels_of(load_model(model)[0]).name(3) == "bird 3"
    model.classifier = nn.Linear(32, width)
    labels = labels_of(load_model(model)[0])
    assert labels.count == width and labels.names is None
