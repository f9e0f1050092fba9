"""Tests of other libraries' models, built offline with random weights: outputs, proofs and preprocessing."""

import string

import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.frozen.proof import prove_frozen
from dave_fast.images import preprocessing
from dave_fast.models.adapter import TextImageModel
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import labels_of
from dave_fast.models.meaning import kind_of
from dave_fast.models.spec import ModelSpec

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
    """Write each model by `save_pretrained`; return the folders."""
    made = {}
    for name, build in HUGGING_FACE.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("hf") / name.replace(" ", "_")
        build().save_pretrained(made[name])
    return made


@pytest.fixture
def photo():
    """Return a picture with edges, whose sides are odd, so that crops leave odd remainders."""
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
    """Return the output as the library itself gives it."""
    from transformers import CLIPModel, SiglipModel

    if isinstance(model, CLIPModel | SiglipModel):
        # the model's forward needs a text, on which the image's embedding does not depend
        found = model(pixel_values=pixels, input_ids=torch.tensor([[0, 5, 1]])).image_embeds
        projected = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(found, projected / projected.norm(dim=-1, keepdim=True))
        return projected
    found = model(pixel_values=pixels)
    return found.logits if "logits" in found else found.last_hidden_state[:, 0]


def test_prompts_of_a_hugging_face_folder_are_embedded_as_the_model_does(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[])
    ends = dict(vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53)
    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(text_config=TEXT | ends, vision_config=SMALL, projection_dim=16)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a cat", "two newts on a stone"]
    model, _ = load_model(f"hf:{tmp_path}")
    assert isinstance(model, TextImageModel) and model.logit_bias == 0
    expected = theirs(pixel_values=images()[:1], **tokenizer(texts, padding=True, return_tensors="pt")).text_embeds
    torch.testing.assert_close(model.text_embedding(texts), expected.detach())


def test_torchvision_models_come_with_preprocessing_and_pass_the_proof():
    for name, size in (("vit_b_16", 224), ("swin_t", 224), ("swin_v2_t", 256), ("maxvit_t", 224)):
        with torch.device("meta"):
            model, _ = load_model(ModelSpec(f"torchvision:{name}", random_weights=True))
        prepare = preprocessing(model)
        assert prepare.size == (size, size) and prepare.note is None
        assert labels_of(model).count == 1000 and labels_of(model).name(0) == "tench"


@pytest.mark.parametrize("build", ["vit", "swin", "maxvit"])
def test_torchvision_architectures_pass_the_proof(build):
    from torchvision.models import MaxVit, SwinTransformer, VisionTransformer

    torch.manual_seed(0)
    model = {
        "vit": lambda: VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=3),
        "swin": lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3),
        "maxvit": lambda: MaxVit((32, 32), 8, 2, [16], [1], 8, 0.0, num_classes=3),
    }[build]()
    torch.nn.init.normal_(model.heads[0].weight) if build == "vit" else None
    assert prove_frozen(load_model(model)[0].eval(), images()[:1]).has_attention


def open_clip_model():
    import open_clip

    torch.manual_seed(0)
    vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


def test_open_clip_models_pass_the_proof_and_embed_texts():
    bare = open_clip_model()
    model, _ = load_model(bare)
    assert kind_of(model) == "embedding" and isinstance(model, TextImageModel)
    assert torch.equal(model(images()), bare.encode_image(images()))
    assert prove_frozen(model, images()[:1]).has_attention
    embedded = model.text_embedding(["a cat", "two newts on a stone"])
    assert embedded.shape == (2, 16) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32")(["a cat"])
    torch.testing.assert_close(bare.encode_text(tokens, normalize=True), embedded[:1])
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-5) and model.logit_bias == 0


# Preprocessing against the library's own. Pillow resizes here; processors that resize tensors round differently.
LEVELS = 2.01


PROCESSORS = {
    "ViTImageProcessor": dict(size=dict(height=32, width=40)),
    "DeiTImageProcessor": dict(size=dict(height=36, width=36), crop_size=dict(height=32, width=32)),
    "BitImageProcessor": dict(size=dict(shortest_edge=37), crop_size=dict(height=32, width=32)),
    "CLIPImageProcessor": dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)),
    "SiglipImageProcessor": dict(size=dict(height=32, width=32)),
    "ConvNextImageProcessor": dict(size=dict(shortest_edge=32)),
    "DINOv3ViTImageProcessor": dict(size=dict(height=32, width=32)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_by_the_image_processor(name, photo):
    import transformers

    from dave_fast.images import from_config
    from dave_fast.models.huggingface_images import preprocessing_of

    processor = getattr(transformers, name)(**PROCESSORS[name])
    prepare = from_config(preprocessing_of(processor.to_dict()))
    for turned in (photo, photo.transpose(Image.Transpose.ROTATE_90), photo.resize((64, 61))):
        ours = prepare.transform(turned)
        theirs = processor(turned, return_tensors="pt")["pixel_values"][0]
        assert ours.shape == theirs.shape
        levels = (ours - theirs).abs().amax(dim=(1, 2)) * 255 * torch.tensor(prepare.std)
        assert levels.max() < LEVELS, levels
        other = getattr(transformers, f"{name}Pil", None)
        if other is not None:
            same = other(**PROCESSORS[name])(turned, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(ours, same, rtol=0, atol=1e-6)
        assert torch.equal(prepare.normalised(prepare.crop(turned)), ours)


def test_images_are_prepared_as_by_torchvision_bit_for_bit(photo):
    from torchvision.models import MaxVit_T_Weights, Swin_T_Weights, Swin_V2_T_Weights, ViT_B_16_Weights

    from dave_fast.images import from_config
    from dave_fast.models.from_torchvision import preprocessing_of

    for known in (*ViT_B_16_Weights, *Swin_T_Weights, *Swin_V2_T_Weights, *MaxVit_T_Weights):
        prepare = from_config(preprocessing_of(known))
        assert torch.equal(prepare.transform(photo), known.transforms()(photo)), known


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_images_are_prepared_as_by_open_clip_bit_for_bit(mode, photo):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=33, resize_mode=mode, interpolation="bilinear" if mode == "squash" else "bicubic")
    model = open_clip_model()
    model.visual.preprocess_cfg = vars(settings)
    prepare = preprocessing(load_model(model)[0])
    assert torch.equal(prepare.transform(photo), image_transform_v2(settings, is_train=False)(photo))
