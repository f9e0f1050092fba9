"""Models of other libraries: real constructors with random weights, offline; what they give, and how it is prepared."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast import DAVE
from dave_fast.errors import InputError, ModelError, UnknownModelError
from dave_fast.images import preprocessing
from dave_fast.labels import labels_of
from dave_fast.models.adapter import TextImageModel, kind_of
from dave_fast.models.catalog import load_model
from dave_fast.models.spec import ModelSpec
from dave_fast.replay import prove_frozen

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=100)
TEXT |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
DINOV2 = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
NAMES = ("cat", "dog", "newt")
ID2LABEL = dict(enumerate(NAMES))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL, id2label=ID2LABEL))


def deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL, id2label=ID2LABEL))


def dinov2_registers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    return Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**DINOV2, id2label=ID2LABEL))


def dinov2_swiglu():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**DINOV2, use_swiglu_ffn=True))


def dinov3():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    gated = dict(use_gated_mlp=True, hidden_act="silu")
    return DINOv3ViTModel(DINOv3ViTConfig(**SMALL, num_register_tokens=4, **gated))


def vit_without_head():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SMALL))


def clip():
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SMALL, projection_dim=16))


def siglip():
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SMALL))


CLASSIFIERS = {"vit": vit, "deit": deit, "dinov2 with registers": dinov2_registers}
EMBEDDINGS = {"dinov2": dinov2_swiglu, "dinov3": dinov3, "vit without head": vit_without_head}
EMBEDDINGS |= {"clip": clip, "siglip": siglip}
HUGGING_FACE = CLASSIFIERS | EMBEDDINGS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as `save_pretrained` writes it."""
    made = {}
    for name, build in HUGGING_FACE.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("hf") / name.replace(" ", "_")
        build().save_pretrained(made[name])
    return made


@pytest.fixture
def photo():
    """A photograph with edges, whose sides leave odd remainders."""
    noise = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
    return Image.fromarray(noise).resize((301, 207), Image.Resampling.BICUBIC)


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_give_their_own_output_and_pass_the_proof_at_two_sizes(folders, name):
    model, called = load_model(f"hf:{folders[name]}")
    assert called == f"hf:{folders[name]}"
    assert not model.training and kind_of(model) == ("classifier" if name in CLASSIFIERS else "embedding")
    output = model(images())
    assert torch.equal(output, theirs(model.model, images()))
    for size in ((32, 32), (32, 48)):
        report = prove_frozen(model, images(*size)[:1])
        assert report.passed and report.has_attention, report
    assert model(images(32, 48)).shape == output.shape


def theirs(model, pixels):
    """The output by the library's own words."""
    from transformers import CLIPModel, SiglipModel

    if isinstance(model, CLIPModel | SiglipModel):
        # the similarity matrix wants a text; the image side does not depend on it
        found = model(pixel_values=pixels, input_ids=torch.tensor([[0, 5, 1]])).image_embeds
        projected = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(found, projected / projected.norm(dim=-1, keepdim=True))
        return projected
    found = model(pixel_values=pixels)
    return found.logits if "logits" in found else found.last_hidden_state[:, 0]
