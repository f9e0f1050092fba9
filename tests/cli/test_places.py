"""Tests of `dave-fast explain` for a class at a place, of models of transformers in folders."""

import json

import numpy as np
import pytest
import torch

from tests.cli.test_cli import run, write

PROCESSOR = {
    "size": {"height": 64, "width": 64},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "do_normalize": True,
    # only images of one shape are prepared by name
    "do_pad": False,
}
NAMES = {0: "cat", 1: "dog", 2: "tiger"}


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def detector(tmp_path):
    from transformers import YolosConfig, YolosForObjectDetection

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config = YolosConfig(**sizes, image_size=[64, 64], patch_size=16, num_detection_tokens=5, id2label=NAMES)
    torch.manual_seed(0)
    return save(YolosForObjectDetection(config), tmp_path / "yolos")


@pytest.fixture
def segmenter(tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = dict(depths=[1] * 4, hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16)
    torch.manual_seed(0)
    return save(SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=NAMES)), tmp_path / "segformer")


def explained(folder, tmp_path, *targets):
    photo = write(tmp_path / "in/photo.png")
    asked = [each for target in targets for each in ("--target", target)]
    settings = ("--n-samples", 3, "--precision", "fp32", "--out", tmp_path / "out")
    run("explain", photo, "--model", f"hf:{folder}", *settings, *asked)
    found = []
    for path in sorted((tmp_path / "out").glob("*.npz")):
        with np.load(path) as arrays:
            found.append((arrays["class_names"].item(), arrays["targets"].item(), np.abs(arrays["raw"]).sum()))
    return found


@pytest.mark.filterwarnings("ignore:the frozen route")
def test_class_of_a_detection_is_explained_by_name(detector, tmp_path):
    ((name, target, total),) = explained(detector, tmp_path, "box:tiger@10,10,54,54")
    assert name == "tiger in the box 10, 10, 54, 54" and target == -1 and total > 0


@pytest.mark.filterwarnings("ignore:the frozen route")
def test_classes_at_a_point_and_their_difference_are_explained_by_name(segmenter, tmp_path):
    asked = ("segment:tiger@30,10", "segment:cat@30,10 - segment:1@30,10")
    found = explained(segmenter, tmp_path, *asked)
    names = {name for name, _, _ in found}
    assert names == {"tiger at 30, 10", "cat at 30, 10 − class 1 at 30, 10"} and all(total > 0 for *_, total in found)


def test_boxes_and_classes_are_one_run_each(detector, tmp_path):
    photo = write(tmp_path / "in/photo.png")
    asked = ("--target", "box:0@1,2,3,4", "--target", "segment:0@1,2")
    result = run("explain", photo, "--model", f"hf:{detector}", "--out", tmp_path / "out", *asked, code=2)
    assert "one run for each kind" in " ".join(result.stderr.split())
