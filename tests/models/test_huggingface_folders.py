"""Tests of folders in the form of Hugging Face: the class that was saved is explained, or the folder is refused."""

from __future__ import annotations

import builtins
import json
import os

import pytest
import torch

from dave_fast import DAVE
from dave_fast.errors import DaveFastError, InputError, ModelError, UnknownModelError
from dave_fast.images import preprocessing
from dave_fast.models.catalog import load_model
from dave_fast.models.spec import ModelSpec
from tests.models.test_huggingface import (
    DINOV2,
    SWIN,
    TEXT,
    THEIRS,
    VIT,
    K,
    images,
    made,
    own,
)

TOWERS = dict(vision_config=VIT, text_config=TEXT)
CLASSIFIERS = [row[:3] for row in THEIRS if "ForImageClassification" in row[0]]


@pytest.fixture(autouse=True)
def _no_questions(monkeypatch):
    """Fail a test in which a library asks on the terminal."""

    def ask(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", ask)


def saved(model, folder, **changes):
    """Save a model, and change values of its configuration; None removes one."""
    model.save_pretrained(folder)
    rewrite(folder / "config.json", changes)
    return f"hf:{folder}"


def rewrite(path, changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    values = {name: value for name, value in (values | changes).items() if value is not None}
    path.write_text(json.dumps(values))


def refused(name, kind=DaveFastError, match=""):
    with pytest.raises(kind, match=match) as caught:
        load_model(name)
    return str(caught.value)


@pytest.mark.parametrize(("name", "config", "settings", "expected", "target"), THEIRS, ids=[row[0] for row in THEIRS])
def test_folder_is_loaded_as_the_class_that_saved_it(name, config, settings, expected, target, tmp_path):
    model = made(name, config, **settings, num_labels=K)
    loaded, _ = load_model(saved(model, tmp_path))
    x = images(size=64 if "Segformer" in name else 32)
    assert type(loaded.model).__name__ == name and loaded.num_classes == (K if "ImageClass" in name else 0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected(model, x))


@pytest.mark.parametrize("changes", [{}, {"model_type": "vit", "architectures": ["MyViT"]}, {"num_labels": 3}])
def test_folder_of_an_own_class_is_refused_and_not_loaded_as_another(changes, tmp_path):
    message = refused(saved(own("x", lambda z, h: z), tmp_path, **changes), ModelError, "import your own class")
    assert "MODULE:FUNCTION" in message


@pytest.mark.parametrize(
    "architecture", ["DeiTForImageClassification", "SwinModel", "BertForSequenceClassification", "AutoModel", "nn"]
)
def test_folder_whose_class_is_for_another_configuration_is_refused(architecture, tmp_path):
    model = made("ViTForImageClassification", "ViTConfig", **VIT)
    refused(saved(model, tmp_path, architectures=[architecture]), ModelError, "config.json|import your own class")


# Code of its own

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
AUTO_MAPS = (
    {"AutoConfig": "evil.C", "AutoModel": "evil.M"},
    {"AutoImageProcessor": "evil.P"},
    {"AutoModelForImageClassification": "evil.M"},
    {"AutoConfig": "somebody/else--evil.C"},
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("auto_map", AUTO_MAPS)
@pytest.mark.parametrize("model_type", ["vit", "evil"])
def test_folder_with_code_is_refused_and_its_code_is_not_run(file, auto_map, model_type, tmp_path):
    folder = tmp_path / "model"
    saved(made("ViTForImageClassification", "ViTConfig", **VIT), folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if file == "config.json":
        rewrite(folder / file, {"auto_map": auto_map, "model_type": model_type})
    else:
        rewrite(folder / file, {"auto_map": auto_map, "image_processor_type": "P"})
    refused(f"hf:{folder}", ModelError, f"code of its own .{file} has auto_map., which is not run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["evil.T", None]}, {"AutoTokenizer": [None, "evil.T"]}, ["evil.T", None]]
)
def test_tokenizer_with_code_is_refused_and_its_code_is_not_run(auto_map, tmp_path):
    folder = tmp_path / "model"
    saved(made("CLIPModel", "CLIPConfig", **TOWERS, projection_dim=16), folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    rewrite(folder / "tokenizer_config.json", {"auto_map": auto_map, "tokenizer_class": "T"})
    loaded, _ = load_model(f"hf:{folder}")
    with pytest.raises(ModelError, match=r"code of its own .tokenizer_config.json has auto_map"):
        loaded.text_embedding(["a cat"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["hf_model_name", "hf_tokenizer_name"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_open_clip_folder_whose_text_tower_has_code_is_refused_and_its_code_is_not_run(part, pretrained, tmp_path):
    pytest.importorskip("open_clip")
    folder, evil = tmp_path / "model", tmp_path / "evil"
    folder.mkdir()
    evil.mkdir()
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]}
    rewrite(evil / "config.json", {"model_type": "evil", "auto_map": auto_map})
    rewrite(evil / "tokenizer_config.json", {"auto_map": auto_map, "tokenizer_class": "T"})
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, part: str(evil)}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    rewrite(folder / "open_clip_config.json", config)
    with pytest.raises(DaveFastError, match=r"code of its own|could not be loaded"):
        load_model(ModelSpec(f"hf:{folder}", random_weights=not pretrained))[0].text_embedding(["a cat"])
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_folder_with_a_pickle_of_other_objects_is_refused_and_its_code_is_not_run(file, tmp_path):
    folder = tmp_path / "model"
    saved(made("ViTForImageClassification", "ViTConfig", **VIT), folder)
    os.remove(folder / "model.safetensors")
    torch.save({"a": Evil(str(tmp_path / "ran"))}, folder / file)
    refused(f"hf:{folder}", UnknownModelError, "could not be loaded")
    assert not (tmp_path / "ran").exists()


def test_folder_with_a_pickle_of_tensors_is_loaded(tmp_path):
    model = made("ViTForImageClassification", "ViTConfig", **VIT)
    name = saved(model, tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(load_model(name)[0](images()), model(images()).logits)


# Weights that are not all there


def weights_of(name, config, **settings):
    return made(name, config, **settings, num_labels=K)


HEADLESS = [
    ("ViTModel", "ViTConfig", VIT, "ViTForImageClassification"),
    ("ViTForMaskedImageModeling", "ViTConfig", VIT | dict(encoder_stride=8), "ViTForImageClassification"),
    ("ViTMAEModel", "ViTMAEConfig", VIT, "ViTForImageClassification"),
    (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        VIT
        | dict(
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=16,
        ),
        "ViTForImageClassification",
    ),
    ("DeiTModel", "DeiTConfig", VIT, "DeiTForImageClassification"),
    ("DeiTForImageClassification", "DeiTConfig", VIT, "DeiTForImageClassificationWithTeacher"),
    ("BeitForMaskedImageModeling", "BeitConfig", VIT | dict(vocab_size=11), "BeitForImageClassification"),
    ("Dinov2Model", "Dinov2Config", DINOV2, "Dinov2ForImageClassification"),
    ("SwinModel", "SwinConfig", SWIN, "SwinForImageClassification"),
    ("CLIPModel", "CLIPConfig", TOWERS, "CLIPForImageClassification"),
    ("SiglipModel", "SiglipConfig", TOWERS, "SiglipForImageClassification"),
    ("ViTMSNModel", "ViTMSNConfig", VIT, "ViTMSNForImageClassification"),
]


@pytest.mark.parametrize(
    ("name", "config", "settings", "wanted"), HEADLESS, ids=[f"{row[0]}-{row[3]}" for row in HEADLESS]
)
def test_classifier_whose_head_would_be_random_is_refused(name, config, settings, wanted, tmp_path):
    import transformers

    model = made(name, config, **settings, num_labels=K)
    model_type = getattr(transformers, wanted).config_class.model_type
    message = refused(saved(model, tmp_path, architectures=[wanted], model_type=model_type), InputError, "are missing")
    assert "classifier" in message


@pytest.mark.parametrize("part", ["text_projection", "text_model.final_layer_norm.weight", "logit_scale"])
def test_weights_of_a_text_tower_are_needed(part, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(made("CLIPModel", "CLIPConfig", **TOWERS, projection_dim=16), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key: each for key, each in load_file(file).items() if part not in key}, file, {"format": "pt"})
    assert part in refused(folder, InputError, "1 are missing")


UNUSED = {
    "ViTModel": ["pooler.dense.weight", "pooler.dense.bias"],
    "DPTForDepthEstimation": ["neck.fusion_stage.layers.0.residual_layer1.convolution1.weight"],
    "DeiTForImageClassification": ["deit.embeddings.mask_token"],
}


@pytest.mark.parametrize("name", UNUSED)
def test_weights_that_the_output_does_not_depend_on_may_be_missing(name, tmp_path):
    from safetensors.torch import load_file, save_file

    config, settings, expected = next(row[1:4] for row in THEIRS if row[0] == name)
    model = made(name, config, **settings, num_labels=K)
    folder = saved(model, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if key not in UNUSED[name]}, file, {"format": "pt"})
    loaded, _ = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images()), expected(model, images()))
    assert not any(tensor.isnan().any() for tensor in loaded.state_dict().values())


@pytest.mark.parametrize(("name", "config", "settings"), CLASSIFIERS, ids=[row[0] for row in CLASSIFIERS])
def test_classifier_with_a_weight_less_or_more_or_of_another_shape_is_refused(name, config, settings, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(made(name, config, **settings, num_labels=K), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    key = next(key for key in whole if "classifier" in key and key.endswith("weight"))
    save_file({k: t for k, t in whole.items() if k != key}, file, {"format": "pt"})
    assert key in refused(folder, InputError, "1 are missing")
    save_file(whole | {key: torch.zeros(K + 1, whole[key].shape[1])}, file, {"format": "pt"})
    assert f"{key} is ({K + 1}, " in refused(folder, InputError, "shapes differ")
    save_file(whole | {"head.weight": torch.zeros(3, 3)}, file, {"format": "pt"})
    refused(folder, InputError, "1 have no place in it .head.weight")
    save_file(whole | {"embeddings.position_ids": torch.arange(3)}, file, {"format": "pt"})
    assert load_model(folder)[0].num_classes == K


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTForImageClassification", "SwinForImageClassification"]
)
def test_classifier_that_does_not_name_its_class_is_refused_and_not_loaded_without_its_head(name, tmp_path):
    config, settings = next(row[1:] for row in CLASSIFIERS if row[0] == name)
    model = made(name, config, **settings, num_labels=K)
    message = refused(saved(model, tmp_path, architectures=None), InputError, "have no place in it")
    assert "classifier" in message


# Configurations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "SwinForImageClassification", "CLIPForImageClassification"]
)
def test_folder_of_any_precision_is_loaded_in_float32(dtype, name, tmp_path):
    config, settings = next(row[1:] for row in CLASSIFIERS if row[0] == name)
    model = made(name, config, **settings, num_labels=K).to(dtype)
    loaded, _ = load_model(saved(model, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(images()), model.float()(images()).logits)


OUTPUTS = [
    {"output_attentions": True},
    {"output_hidden_states": True},
    {"return_dict": False},
    {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    {"_attn_implementation": "eager"},
    {"attn_implementation": "eager", "output_attentions": True},
    {"attn_implementation": "flash_attention_2"},
]


@pytest.mark.parametrize("changes", OUTPUTS)
@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel", "SwinForImageClassification"])
def test_folder_whose_configuration_asks_for_more_outputs_gives_the_same_output(changes, name, tmp_path):
    config, settings, expected = next(row[1:4] for row in THEIRS if row[0] == name)
    model = made(name, config, **settings, num_labels=K)
    wanted = expected(model, images())
    loaded, _ = load_model(saved(model, tmp_path, **changes))
    torch.testing.assert_close(loaded(images()), wanted)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel", "SwinForImageClassification", "SwinModel"])
def test_module_whose_configuration_asks_for_more_outputs_has_the_same_explanation(name):
    config, settings = next(row[1:3] for row in THEIRS if row[0] == name)
    explanations = []
    for changes in ({}, {"output_hidden_states": True}, {"output_attentions": True, "attn_implementation": "eager"}):
        model = made(name, config, **settings, num_labels=K, **changes)
        explain = DAVE(model, noise_alpha=0.1, precision="fp64", route="frozen")
        explanations.append(explain.explain(images(1), 3, 2).raw)
    for other in explanations[1:]:
        torch.testing.assert_close(other, explanations[0])


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "hqq"},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        {"quant_method": "quanto", "weights": "int8"},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors"},
        {"bits": 8},
    ],
)
def test_quantised_folder_is_refused(quantised, tmp_path):
    model = made("ViTForImageClassification", "ViTConfig", **VIT)
    folder = saved(model, tmp_path, quantization_config=quantised)
    refused(folder, ModelError, "are quantised")
    refused(ModelSpec(folder, random_weights=True), ModelError, "are quantised")


@pytest.mark.parametrize("image_size", [32, [32, 48], [48, 32]])
def test_folder_with_sides_that_differ_is_explained_at_its_size(image_size, tmp_path):
    model = made("ViTForImageClassification", "ViTConfig", **(VIT | {"image_size": image_size}))
    loaded, _ = load_model(saved(model, tmp_path))
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    assert loaded.own_size == size and preprocessing(loaded).size == size
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(loaded(x), model(x).logits)


def test_unsupported_image_processor_does_not_keep_tensors_from_being_explained(tmp_path):
    name = saved(made("ViTForImageClassification", "ViTConfig", **VIT), tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "do_rescale": False}
    rewrite(tmp_path / "preprocessor_config.json", processor)
    explain = DAVE(name, noise_alpha=0.1, route="frozen")
    assert explain.explain(images(), 1, 1).raw.isfinite().all()
    with pytest.raises(ModelError, match="do_rescale=False, which is not supported"):
        preprocessing(explain.model)


# More than images


def decoder():
    from transformers import BertConfig, BertLMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    text = BertConfig(**(TEXT | dict(is_decoder=True, add_cross_attention=True)))
    return VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**VIT)), decoder=BertLMHeadModel(text))


MORE = {
    "VisionEncoderDecoder": decoder,
    "Bert": lambda: made("BertForSequenceClassification", "BertConfig", **TEXT),
    "Vilt": lambda: made("ViltForQuestionAnswering", "ViltConfig", **VIT, vocab_size=100),
    "Blip": lambda: made("BlipForConditionalGeneration", "BlipConfig", **TOWERS),
    "CLIPSeg": lambda: made("CLIPSegForImageSegmentation", "CLIPSegConfig", **TOWERS, extract_layers=[0]),
    "CLIP text": lambda: made("CLIPTextModel", "CLIPTextConfig", **TEXT),
    "ImageGPT": lambda: made("ImageGPTForImageClassification", "ImageGPTConfig", n_embd=16, n_layer=1, n_head=2),
    "OwlViT": lambda: made("OwlViTForObjectDetection", "OwlViTConfig", **TOWERS),
    "audio": lambda: made(
        "ASTForAudioClassification", "ASTConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    ),
    "own with texts": lambda: own("input_ids, pixel_values=None", lambda z, h: z),
    "own with more": lambda: own("x, age", lambda z, h: z),
}


@pytest.mark.parametrize("name", MORE)
def test_model_that_takes_more_than_images_is_refused(name):
    with pytest.raises(ModelError, match="takes more than images, or none"):
        load_model(MORE[name]().eval())
