"""Tests of the embedded model: its size, preprocessing, and accuracy on scenes that it was not trained on."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from timm.data import create_transform, resolve_model_data_config

from dave_fast.models.demo import CLASS_NAMES, demo_scene, draw_scenes, load_demo_model

WEIGHTS = files("dave_fast.models.demo") / "weights.safetensors"
# No training script or other test draws from this seed.
FRESH_SEED = 90_210


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def logits_of(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """Return logits (n, 10) for pixels uint8 (n, H, W, 3)."""
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_weights_fit_in_the_package():
    assert len(WEIGHTS.read_bytes()) < 4e6


def test_loaded_ready_for_use(model):
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.num_classes == len(CLASS_NAMES) == 10


def test_each_call_gives_its_own_model(model):
    other = load_demo_model()
    with torch.no_grad():
        other.head.bias.add_(1)
    other.pretrained_cfg["mean"] = (0.0, 0.0, 0.0)
    assert not torch.equal(other.head.bias, model.head.bias)
    assert load_demo_model().pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_timm_finds_the_preprocessing(model):
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 128, 128)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 1.0


def test_timm_transform_is_the_training_normalisation(model):
    image = demo_scene().image
    given = create_transform(**resolve_model_data_config(model))(image)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


def test_accuracy_on_held_out_scenes(model):
    scenes = draw_scenes(400, FRESH_SEED, split="test")
    predicted = logits_of(model, scenes.images).argmax(1).numpy()
    # The card's 96.9 % of 4,000 scenes, less three standard errors of 400.
    assert np.mean(predicted == scenes.labels) >= 0.943


def test_two_digits_both_get_evidence(model):
    scenes = draw_scenes(200, FRESH_SEED, n_digits=2, split="test")
    order = logits_of(model, scenes.images).argsort(1, descending=True).numpy()
    for labels in (scenes.labels, scenes.other_labels):
        assert np.mean((order[:, :3] == labels[:, None]).any(axis=1)) >= 0.88


def test_demo_scene_is_recognised(model):
    scene = demo_scene()
    top = logits_of(model, np.array(scene.image)[None]).topk(2).indices[0].tolist()
    assert set(top) == {scene.label, scene.other_label}
