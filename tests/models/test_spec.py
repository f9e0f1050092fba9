"""Tests of model names, and of files of weights and class names: accepted forms, and errors for all others."""

import json
import os
import pickle
import socket
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dave_fast import DAVE
from dave_fast.errors import InputError, UnknownModelError
from dave_fast.images import preprocessing
from dave_fast.models import hub
from dave_fast.models.adapter import Adapter
from dave_fast.models.catalog import load_model, noise_alpha_for
from dave_fast.models.labels import labels_of
from dave_fast.models.meaning import kind_of, require_classifier
from dave_fast.models.spec import ModelSpec, class_names
from dave_fast.models.weights_file import load_weights, read_weights
from tests.tiny import initial_vit

HERE = "tests.models.test_spec"


def made():
    """Return a small model, for the name MODULE:FUNCTION of this function."""
    return initial_vit(img_size=16, embed_dim=16, depth=1, num_classes=3)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("demo", ("demo", "")),
        ("deit3_base_patch16_224.fb_in1k", ("timm", "deit3_base_patch16_224.fb_in1k")),
        ("timm:vit_tiny_patch16_224", ("timm", "vit_tiny_patch16_224")),
        ("hf:facebook/dinov2-base@main", ("hf", "facebook/dinov2-base@main")),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", ("hf", "timm/vit_tiny_patch16_224.augreg_in21k")),
        ("hf:./mine", ("hf", "./mine")),
        ("torchvision:vit_b_16:IMAGENET1K_V1", ("torchvision", "vit_b_16:IMAGENET1K_V1")),
        ("open_clip:ViT-B-16:openai", ("open_clip", "ViT-B-16:openai")),
        ("package.module:function", ("python", "package.module:function")),
    ],
)
def test_names(name, source):
    assert ModelSpec(name).source == source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (" ", "is empty"),
        ("hf:", "names nothing"),
        ("mine.safetensors", "--model vit_base_patch16_224 --weights mine.safetensors"),
        (os.path.dirname(__file__), "write hf:"),
        ("vit_tiny_patch16_225", "did you mean .*vit_tiny_patch16_224"),
        ("torchvision:vit_b_61", "did you mean vit_b_16"),
        ("torchvision:vit_b_16:V9", "it has IMAGENET1K_V1"),
        ("open_clip:ViT-B-61", "open_clip has no model"),
        ("open_clip:ViT-B-16", "does not say which weights.*open_clip:ViT-B-16:"),
        ("open_clip:ViT-B-16:V9", "has no weights 'V9'"),
        ("hf:./no_such_folder", "there is no folder"),
        (3, "the model is a int"),
    ],
)
def test_invalid_names_are_refused(name, message):
    with pytest.raises(UnknownModelError, match=f"(?s){message}"):
        load_model(name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(weights="none.pth"), "there is no such file"),
        (dict(weights=__file__, random_weights=True), "exclude each other"),
        (dict(num_classes=3), "a head of random numbers"),
        (dict(num_classes=0, random_weights=True), "expected an integer ≥ 1"),
        (dict(image_size=0), "image_size, in pixels, is 0; expected an integer"),
    ],
)
def test_contradictory_settings_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        ModelSpec("vit_tiny_patch16_224", **wrong)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {n: t * 0 for n, t in state.items()}, "model_ema": state},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_weights_as_training_scripts_write_them(wrap, tmp_path):
    own = {name: torch.randn_like(tensor) for name, tensor in made().state_dict().items()}
    torch.save(wrap(own), tmp_path / "w.ckpt")
    model, name = load_model(ModelSpec(f"{HERE}:made", str(tmp_path / "w.ckpt")))
    assert name == f"{HERE}:made" and not model.training
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items())


def test_safetensors_are_told_by_their_content(tmp_path):
    own = {name: torch.randn_like(tensor) for name, tensor in made().state_dict().items()}
    save_file(own, tmp_path / "weights.bin")
    assert all(torch.equal(tensor, own[name]) for name, tensor in read_weights(tmp_path / "weights.bin").items())


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_no_pickled_object_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "done"))
    torch.save({"state_dict": made().state_dict(), "callback": Evil()}, tmp_path / "zip.pth")
    torch.save(Evil(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save(made(), tmp_path / "whole.pth")
    for file in ("zip.pth", "old.pth", "plain.pkl", "whole.pth"):
        with pytest.raises(InputError, match="weights"):
            read_weights(tmp_path / file)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense", b"\x08\0\0\0\0\0\0\0{not js}"])
def test_files_that_are_no_weights(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")


def test_weights_that_do_not_fit_are_named(tmp_path):
    own = made().state_dict()
    for change, message in (
        (lambda s: s.pop("norm.weight"), r"1 are missing \(norm.weight\)"),
        (lambda s: s.update(more=torch.ones(1)), r"1 have no place in it \(more\)"),
        (
            lambda s: s.update({"head.weight": torch.ones(7, 16)}),
            r"shapes differ \(head.weight is \(7, 16\), expected \(3, 16\)\).*--num-c",
        ),
    ):
        state = dict(own)
        change(state)
        torch.save(state, tmp_path / "w.pth")
        model = made()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=f"do not fit mine: {message}"):
            load_weights(model, tmp_path / "w.pth", "mine")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fine_tuned_timm_model_with_its_own_classes(tmp_path):
    import timm

    names = ["ant", "bee", "wasp"]
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "w.pth")
    (tmp_path / "names.txt").write_text("ant\nbee\nwasp\n")
    spec = ModelSpec("vit_tiny_patch16_224", str(tmp_path / "w.pth"), 3, str(tmp_path / "names.txt"), 160)
    model, _ = load_model(pickle.loads(pickle.dumps(spec)))
    assert [labels_of(model).name(i) for i in range(3)] == names and labels_of(model).count == 3
    assert preprocessing(model).size == (160, 160) and preprocessing(model).note is None
    with pytest.raises(InputError, match="3 class names were given, and vit_tiny_patch16_224 has 1000 classes"):
        load_model(ModelSpec("vit_tiny_patch16_224", labels=names, random_weights=True))
    with pytest.raises(InputError, match="do not fit"):
        load_model(ModelSpec("vit_tiny_patch16_224", str(tmp_path / "w.pth"), 4))


@pytest.mark.parametrize("text", ["a\nb b\nc\n\n", '["a", "b b", "c"]', '{"1": "b b", "0": "a", "2": "c"}'])
def test_files_of_class_names(text, tmp_path):
    (tmp_path / "names").write_text(text)
    assert class_names(str(tmp_path / "names")) == ("a", "b b", "c")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b b", "2": "c"}}))
    assert class_names(str(tmp_path / "config.json")) == ("a", "b b", "c")


@pytest.mark.parametrize("text", ["", "a\n\nb", '{"0": "a", "2": "b"}', '["a", 3]', "[", "\xff"])
def test_files_that_are_no_class_names(text, tmp_path):
    (tmp_path / "names").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="names"):
        class_names(str(tmp_path / "names"))


def test_a_bare_module_with_preprocessing_and_names_of_its_own():
    from dave_fast.images import describe_preprocessing

    size = describe_preprocessing((16, 16), (0.2, 0.3, 0.4), (0.5, 0.5, 0.5), resize=18)
    wrapped = Adapter(made(), kind="classifier", num_classes=3, pretrained_cfg=size | {"label_names": ("a", "b", "c")})
    explainer = DAVE(wrapped, noise_alpha=0.1, precision="fp64")
    assert preprocessing(explainer.model).size == (16, 16) and labels_of(explainer.model).name(2) == "c"
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = explainer.explain(image, 1, n_samples=2)
    assert explainer.route == "engine"
    bare = DAVE(made(), noise_alpha=0.1, precision="fp64").explain(image, 1, n_samples=2)
    torch.testing.assert_close(ours.raw, bare.raw, rtol=0, atol=1e-6)


def test_embeddings_have_no_classes():
    model = Adapter(nn.Identity(), kind="embedding")
    assert kind_of(model) == "embedding"
    with pytest.raises(InputError, match="mine gives embeddings and has no classes"):
        require_classifier(model, "mine")
    with pytest.raises(InputError, match="has no classes"):
        load_model(ModelSpec("open_clip:ViT-B-16", num_classes=3, random_weights=True))


def test_what_the_hub_has_under_another_name_keeps_its_level():
    assert noise_alpha_for("hf:timm/deit3_base_patch16_224.fb_in1k") == 0.9
    assert noise_alpha_for("hf:facebook/deit-base-patch16-224") == 0.7


def waiting_connections(server):
    """Return the number of connections that are not accepted yet."""
    server.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            count += 1
    return count


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """Set up a hub that never answers and an empty cache; return a function that counts connections to the hub."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
        monkeypatch.setattr(hub, "answers", lambda url, ask=hub.answers: ask(constants.ENDPOINT))
        yield partial(waiting_connections, server)
        assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "hf:facebook/dinov2-with-registers-base-imagenet1k-1-layer",
        "torchvision:vit_b_16",
        "open_clip:ViT-B-32:laion2b_s34b_b79k",
    ],
)
def test_a_hub_that_does_not_answer_is_asked_once(name, silent):
    """The libraries' own clients would retry for 23 to 47 s."""
    with pytest.raises(
        UnknownModelError, match=r"does not answer, and .*(is|are) not on this machine.*--weights FILE"
    ) as raised:
        load_model(name)
    assert name in str(raised.value) and "\n" not in str(raised.value)
    assert silent() == 1


def test_the_pipeline_gives_labels_scores_maps_and_overlays(tmp_path):
    import dave_fast
    from dave_fast.models.demo import demo_scene

    scene = demo_scene().image
    scene.save(tmp_path / "scene.png")
    pipe = dave_fast.pipeline("demo")
    four, six = pipe(tmp_path / "scene.png", top_k=2, n_samples=2)
    assert {four["label"], six["label"]} == {"four", "six"} and four["score"] > six["score"] > 0
    assert four["map"].shape == (128, 128) and four["map"].max() == pytest.approx(1)
    assert four["overlay"].mode == "RGB" and four["overlay"].width >= 128
    ((again,),) = pipe([scene], target=four["label"], n_samples=2)
    assert again["target"] == four["target"] and abs(again["map"] - four["map"]).max() < 1e-4
    with pytest.raises(InputError, match="one class and top_k several"):
        pipe(scene, target=4, top_k=2)
    with pytest.raises(InputError, match="the model has 10 classes"):
        pipe(scene, top_k=11)


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA"])
def test_the_pipeline_sees_a_picture_as_it_sees_its_file(tmp_path, mode):
    import dave_fast
    from dave_fast.models.demo import demo_scene

    scene = demo_scene().image
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257)
    else:
        picture = scene.convert(mode)
        picture.putalpha(100)
    picture.save(tmp_path / "scene.png")
    pipe = dave_fast.pipeline("demo")
    given, (read,) = pipe(picture, n_samples=1), pipe(tmp_path / "scene.png", n_samples=1)
    assert given[0]["score"] == read["score"] and (given[0]["map"] == read["map"]).all()
