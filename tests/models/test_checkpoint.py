"""Tests of checkpoints as training scripts write them: the right weights are loaded, or the reason is said."""

import argparse
import copy
import itertools
import json
import pathlib
import random
from collections import OrderedDict
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from dave_fast.errors import InputError
from dave_fast.models.catalog import load_model
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights, read_weights
from tests.tiny import initial_vit


@cache
def made(**settings):
    """Return a small model, whose weights are those that were loaded last."""
    return initial_vit(**({"img_size": 16, "embed_dim": 16, "depth": 1, "num_classes": 3} | settings))


@cache
def state(seed=0, **settings):
    """Return random weights of the small model; they are not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in made(**settings).state_dict().items()}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_loads(saved, expected, folder, **settings):
    """Assert that a file of torch.save loads these weights."""
    torch.save(saved, folder / "w.pth")
    model = made(**settings)
    load_weights(model, folder / "w.pth", "mine")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def refusal(saved, folder, **settings):
    """Return what is said of a file, after which the model must be as it was."""
    torch.save(saved, folder / "w.pth")
    model = made(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as raised:
        load_weights(model, folder / "w.pth", "mine")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(raised.value)
    assert "\n" not in message and "w.pth" in message
    return message


CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "weights", "params", "module", "state", "my_network")
AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "swa_model", "params_ema", "averaged_model")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "vit.")
OTHERS = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "best": 0.5}


@pytest.mark.parametrize("container", [None, *CONTAINERS])
def test_every_container_and_order_of_prefixes(container, tmp_path):
    own = state()
    orders = [*itertools.permutations(PREFIXES, 1), *itertools.permutations(PREFIXES, 2)]
    chosen = random.Random(str(container))
    # all of them for the most frequent container
    orders = [(), *(orders if container == "state_dict" else chosen.sample(orders, 15))]
    orders += chosen.sample(list(itertools.product(PREFIXES, repeat=3)), 5)
    for order in orders:
        tensors = prefixed("".join(order), own)
        assert_loads(tensors if container is None else {container: tensors, **OTHERS}, own, tmp_path)


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_come_before_last_weights(average, tmp_path):
    own, last = state(0), state(1)
    for container, prefix in zip(CONTAINERS, itertools.cycle(("", "module.", "_orig_mod.module.")), strict=False):
        assert_loads({container: last, average: prefixed(prefix, own), **OTHERS}, own, tmp_path)
    assert_loads({"checkpoint": {"model": last, average: own}}, own, tmp_path)


def averaged():
    model = copy.deepcopy(made())
    model.load_state_dict(state())
    return model


@pytest.mark.parametrize(
    "saved",
    [
        lambda own, last: AveragedModel(averaged()).state_dict(),
        lambda own, last: {"model": AveragedModel(DataParallel(averaged())).state_dict()},
        lambda own, last: DataParallel(AveragedModel(averaged())).state_dict(),
        lambda own, last: {"state_dict": prefixed("model.", AveragedModel(averaged()).state_dict())},
        lambda own, last: torch.compile(averaged()).state_dict(),
        lambda own, last: torch.compile(DataParallel(averaged())).state_dict(),
        # an average as a module of its own, with the model that is trained
        lambda own, last: (
            prefixed("ema_model.", own)
            | prefixed("online_model.", last)
            | {"initted": torch.tensor(True), "step": torch.tensor(7)}
        ),
        lambda own, last: {"ema": prefixed("ema_model.", own) | prefixed("online_model.", last)},
        # a LightningModule
        lambda own, last: {"state_dict": prefixed("model.", last) | prefixed("model_ema.", own), "loops": {}},
        lambda own, last: {"state_dict": prefixed("net.", own), "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
        lambda own, last: {"state_dict": prefixed("student.", last) | prefixed("teacher.", own)},
        # a teacher and a student
        lambda own, last: {"teacher": own, "student": prefixed("module.", last)},
        lambda own, last: {"student": own, "epoch": 3},
        lambda own, last: {"teacher": prefixed("backbone.", own), "student": prefixed("module.backbone.", last)},
        # DeepSpeed
        lambda own, last: {"module": own, "optimizer": None, "ds_config": {}, "dp_world_size": 1},
        # compiled blocks, sharded and checkpointed modules
        lambda own, last: {name.replace("blocks.0", "blocks.0._orig_mod"): each for name, each in own.items()},
        lambda own, last: prefixed("_fsdp_wrapped_module.", own),
        lambda own, last: {name.replace("mlp", "mlp._checkpoint_wrapped_module"): each for name, each in own.items()},
        # what is beside the weights
        lambda own, last: {"model": own, "mean": torch.ones(3), "loss_history": torch.ones(99)},
        lambda own, last: {"model": own, "loss_ema": {"history": torch.ones(99)}},
        lambda own, last: {"model": own, "ema": None, "model_ema": {}},
        lambda own, last: {"model": own, "same": dict(own), "module": OrderedDict(own)},
        lambda own, last: {"model": own, "optim_state": {"exp_avg": last}, "exp_avg": last},
        lambda own, last: {"model": own, "discriminator": {"weight": torch.ones(3, 3)}},
        lambda own, last: {name: nn.Parameter(each) for name, each in own.items()},
    ],
)
def test_checkpoints_as_libraries_write_them(saved, tmp_path):
    own, last = state(0), state(1)
    assert_loads(saved(own, last), own, tmp_path)


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_backbones_of_self_supervised_training_without_their_heads(who, prefix, tmp_path):
    own, last = state(0, num_classes=0), state(1, num_classes=0)
    heads = {"head.mlp.0.weight": torch.ones(4, 16), "head.last_layer.weight_g": torch.ones(9, 1)}
    other = {"teacher": "student", "student": "nothing"}[who]
    outer = prefix.removesuffix("backbone.")
    saved = {who: prefixed(prefix, own) | prefixed(outer, heads), other: prefixed(prefix, last) | heads}
    assert_loads(saved, own, tmp_path, num_classes=0)
    assert "'teacher'" in refusal(saved | {"teacher": saved[who]}, tmp_path)


@pytest.mark.parametrize("pair", list(itertools.combinations(CONTAINERS, 2)))
def test_two_that_fit_and_differ_are_refused_by_name(pair, tmp_path):
    first, second = pair
    message = refusal({first: state(0), second: state(1), **OTHERS}, tmp_path)
    assert "several weights" in message and repr(first) in message and repr(second) in message


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (lambda own, last: {"model_ema": own, "ema_state_dict": last}, "several weights"),
        (lambda own, last: {"state_dict": own, "best_state_dict": last}, "several weights"),
        (lambda own, last: own | {"model": last}, "several weights, the names without a key and 'model'"),
        # an average that does not fit is not replaced in silence
        (
            lambda own, last: {"model": own, "model_ema": {n: t for n, t in last.items() if "head" not in n}},
            "'model_ema'",
        ),
        (lambda own, last: {"model": own, "ema": {"shadow_params": list(last.values())}}, "'shadow_params' in 'ema'"),
        (
            lambda own, last: {"model": {n: t for n, t in own.items() if "head" not in n}, "velocity": last},
            "2 are missing",
        ),
        (lambda own, last: own | {"criterion.weight": torch.ones(3)}, r"1 have no place in it (criterion.weight)"),
        (lambda own, last: prefixed("model.", own) | {"loss.weight": torch.ones(3)}, "have no place"),
        (lambda own, last: prefixed("backbone.", own) | {"fc.weight": torch.ones(3, 3)}, "have no place"),
        (lambda own, last: prefixed("encoder.", own) | prefixed("decoder.", last), "have no place"),
        (lambda own, last: prefixed("model.", own) | prefixed("net.", last), "have no place"),
        (lambda own, last: {"optimizer": own}, "has no weights"),
        (lambda own, last: {"epoch": 3}, "has no weights"),
        (lambda own, last: {"loss": torch.tensor(3.0)}, "has no weights"),
        (lambda own, last: list(own.values()), "has no weights"),
        (
            lambda own, last: {"model": own | {"head.weight": torch.ones(7, 16)}},
            "head.weight is (7, 16), expected (3, 16)",
        ),
        (lambda own, last: own | {"norm.weight": own["norm.weight"][None]}, "norm.weight is (1, 16), expected (16,)"),
        (
            lambda own, last: own | {"norm.weight": own["norm.weight"] + 0j},
            "norm.weight is complex64, expected float32",
        ),
        (lambda own, last: own | {"norm.weight": own["norm.weight"].to(torch.int8)}, "norm.weight is int8"),
        pytest.param(
            lambda own, last: own | {"head.weight": own["head.weight"].to_sparse()},
            "head.weight is sparse float32",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        (lambda own, last: own | {"norm.weight": own["norm.weight"].to("meta")}, "norm.weight is without values"),
        (lambda own, last: prefixed("base_model.model.", {"qkv.lora_A.weight": torch.ones(2, 16)}), "LoRA adapters"),
        (lambda own, last: own | {"blocks.0.lora_B.default.weight": torch.ones(2, 16)}, "merge_and_unload"),
    ],
)
def test_weights_that_would_be_others_are_refused(saved, says, tmp_path):
    assert says in refusal(saved(state(0), state(1)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_other_precisions_are_converted(dtype, prefix, tmp_path):
    own = {name: tensor.to(dtype) for name, tensor in state().items()}
    assert_loads({"model": prefixed(prefix, own)}, {name: tensor.float() for name, tensor in own.items()}, tmp_path)


def test_own_single_numbers_are_weights(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.step = nn.Linear(2, 2), nn.Parameter(torch.tensor(3.0))
            self.register_buffer("n_averaged", torch.tensor(4))

    model, other = Own(), Own()
    torch.save({"model": DataParallel(other).state_dict()}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", "mine")
    assert torch.equal(model.linear.weight, other.linear.weight)


def test_a_model_whose_parts_are_called_as_averages_is_loaded_whole(tmp_path):
    torch.manual_seed(0)
    made = [nn.ModuleDict({"teacher": nn.Linear(2, 2), "model_ema": nn.Linear(2, 2)}) for _ in range(2)]
    torch.save({"state_dict": prefixed("module.", made[0].state_dict())}, tmp_path / "w.pth")
    load_weights(made[1], tmp_path / "w.pth", "mine")
    for name, tensor in made[1].state_dict().items():
        assert torch.equal(tensor, made[0].state_dict()[name])


@pytest.mark.parametrize("prefix", ["", *PREFIXES, "_orig_mod.module.", "module._orig_mod.module."])
def test_prefixes_in_safetensors(prefix, tmp_path):
    own = state()
    save_file(prefixed(prefix, own), tmp_path / "w.safetensors")
    model = made()
    load_weights(model, tmp_path / "w.safetensors", "mine")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.module."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_ema", "my_network"])
def test_without_the_names_of_the_model_only_wrappers_are_taken_off(container, prefix, tmp_path):
    for kept in ("", "model.", "vit.backbone."):
        own = prefixed(kept, state())
        tensors = prefixed(prefix, own)
        torch.save(tensors if container is None else {container: tensors, **OTHERS}, tmp_path / "w.pth")
        assert read_weights(tmp_path / "w.pth").keys() == own.keys()
        assert read_weights(tmp_path / "w.pth", state()).keys() == state().keys()


def test_without_the_names_of_the_model_two_that_differ_are_refused(tmp_path):
    torch.save({"model": state(0), "net": state(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="several weights, 'model' and 'net'"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("thing", [argparse.Namespace(lr=1), pathlib.Path("x"), np.float64(3), np.arange(3), nn.ReLU()])
def test_other_objects_are_named_and_not_made(thing, tmp_path):
    message = refusal({"model": state(), "args": thing}, tmp_path)
    module = type(thing).__module__.partition(".")[0]
    assert f"other objects than tensors ({module}" in message and "save model.state_dict()" in message


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 346284714\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "is a Git LFS pointer of 346284714 bytes, not the weights: run git lfs pull"),
        (POINTER[:60], "is a Git LFS pointer, not the weights"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page"),
        (b"\n\n  <html lang='en'>", "is a web page"),
        (b"\xef\xbb\xbf<!doctype HTML>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode(), "index of weights in several"),
        (b'{"metadata": {"total_size": 3}, "weight_map": {}}', "give the folder as the model"),
        (b'{"hidden_size": 768}', "is JSON, not weights"),
        (b'{"error": "Repository not found"}', "is JSON, not weights"),
        (b"[1, 2]", "is JSON, not weights"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08\x00abc", "compressed by gzip"),
        (b"\0" * 4096, "damaged"),
        (b"404: Not Found.....................", "damaged"),
        (b"404: Not Found", "w.pth"),
        (b"{not json", "w.pth"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "pytorch_model.bin"])
def test_files_in_the_place_of_weights_are_named(content, says, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_weights(made(), tmp_path / name, "mine")
    assert says.replace("w.pth", name) in str(raised.value)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00002-of-00012.bin"])
def test_one_file_of_several_is_named(name, tmp_path):
    save_file({"norm.weight": torch.ones(16)}, tmp_path / name)
    with pytest.raises(InputError, match=r"is file \d of \d+, and \d+ weights of mine are not in it.*hf:FOLDER"):
        load_weights(made(), tmp_path / name, "mine")


@pytest.mark.parametrize("form", ["zip", "pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_files_that_were_cut_short(form, share, tmp_path):
    if form == "safetensors":
        save_file(state(), tmp_path / "whole")
    else:
        torch.save({"model": state()}, tmp_path / "whole", _use_new_zipfile_serialization=form == "zip")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cannot read the weights .*cut\.pth.*(cut short|damaged)"):
        load_weights(made(), tmp_path / "cut.pth", "mine")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="is a TorchScript archive"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.model.", "model._orig_mod.", "net.module."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_ema"])
def test_checkpoints_of_hugging_face_models(container, prefix, tmp_path_factory, hugging_face):
    model, folder = hugging_face
    own = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    tensors = prefixed(prefix, own)
    file = tmp_path_factory.mktemp("weights") / "w.ckpt"
    torch.save(tensors if container is None else {container: tensors, **OTHERS}, file)
    found, _ = load_model(ModelSpec(f"hf:{folder}", str(file)))
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.model.state_dict().items())


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """Return a model of transformers, and the folder that it was saved in."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    folder = tmp_path_factory.mktemp("folder")
    model.save_pretrained(folder)
    return model, folder
