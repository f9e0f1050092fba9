"""Tests of files from somebody else: what no model has is refused in words, before memory is taken or a pipe waits."""

import json
import os

import pytest
import torch

from dave_fast.errors import DaveFastError, InputError, ModelError
from dave_fast.files import read_json, read_plain
from dave_fast.models.limits import check_configuration, check_folder, limited_memory
from dave_fast.models.weights_file import read_weights


@pytest.mark.parametrize(
    "values",
    [
        *([], 3, None, "x", {"hidden_size": 10**12}, {"num_hidden_layers": 10**6}, {"depths": [600, 600]}),
        *({"image_size": 10**5}, {"a": {"vocab_size": 10**9}}, {"size": {"height": 10**9}}, {"num_labels": 10**400}),
        *({"transformers_weights": "../x.safetensors"}, {"transformers_weights": "/etc/passwd"}),
        *({"configuration_files": each} for each in (["config.4.0.0.json"], ["config.0.0.json"], [], None, "x", {})),
    ],
    ids=lambda values: str(type(values).__name__),
)
def test_configurations_of_no_model_are_refused(values):
    with pytest.raises(ModelError, match="expected"):
        check_configuration(values, "config.json")


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "", "\xff", '{"a": ' * 100_000, "9" * 5000, "nul", "{'a': 1}"])
def test_files_that_are_no_json_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is no JSON file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\x00", "..\\x"])
def test_indices_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="in the same folder"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "nowhere"])
def test_special_files_are_refused(name, kind, tmp_path):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "nowhere": tmp_path / "none"}[kind])
    with pytest.raises(DaveFastError, match=r"no regular file|cannot read"):
        check_folder(tmp_path)
    with pytest.raises(InputError):
        read_plain(path)


def test_models_larger_than_their_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ModelError, match="far larger than its weights"), limited_memory(tmp_path):
        torch.empty(10**6, 10**6)


def cycle():
    found = {"w": torch.ones(3)}
    found["model"] = found
    return found


def shared():
    found = {"w": torch.ones(3)}
    for _ in range(60):
        found = {"a": found, "b": found}
    return found


@pytest.mark.parametrize(
    ("made", "words"),
    [(cycle, None), (shared, "no weights"), (lambda: {"w": torch.ones(1).expand(2**40)}, "contiguous"),
     (lambda: {"w" * 501: torch.ones(3)}, "letters")],
)  # fmt: skip
def test_odd_checkpoints_end(made, words, tmp_path):
    torch.save(made(), tmp_path / "w.pt")
    if words is None:
        assert torch.equal(read_weights(tmp_path / "w.pt")["w"], torch.ones(3))
        return
    with pytest.raises(InputError, match=words):
        read_weights(tmp_path / "w.pt")
