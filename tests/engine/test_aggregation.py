"""The form in which samples are stored until their robust mean, by free memory, and its effect on the result."""

import logging

import pytest
import torch

import dave_fast
from dave_fast.engine.memory import choose_storage
from dave_fast.errors import InputError
from tests.tiny import random_vit

SHAPE = (3, 16, 24)
ONE = 4 * 3 * 16 * 24  # bytes of a float32 contribution
FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def model():
    return random_vit(img_size=(16, 24))


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("engine", "free", "tokens", "dtype"),
    [
        (HALF, 20 * ONE, False, FLOAT),
        (HALF, 19 * ONE, True, HALF),
        (HALF, 10 * ONE, True, HALF),
        (HALF, 5 * ONE, True, HALF),
        (FLOAT, 20 * ONE, False, FLOAT),
        (FLOAT, 19 * ONE, False, HALF),
        (FLOAT, 5 * ONE, False, HALF),
    ],
    ids=str,
)
def test_the_first_form_that_leaves_half_of_the_memory_free(engine, free, tokens, dtype):
    found = choose_storage(10, SHAPE, FLOAT, engine, free)
    assert (found.tokens, found.dtype) == (tokens, dtype)
    assert found.bytes == 10 * ONE * dtype.itemsize // 4


def test_float64_is_never_rounded():
    assert choose_storage(10, SHAPE, DOUBLE, DOUBLE, 20 * ONE) == choose_storage(10, SHAPE, DOUBLE, DOUBLE, 999 * ONE)
    with pytest.raises(InputError, match=r"10 samples of .* GiB are free"):
        choose_storage(10, SHAPE, DOUBLE, DOUBLE, 19 * ONE)


def explained(model, images, monkeypatch, free=None, **settings):
    explainer = dave_fast.DAVE(model, noise_alpha=0.5, internal_batch_size=4, **settings)
    with monkeypatch.context() as patch:
        if free is not None:
            patch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: free)
        return explainer.explain(images, 1, n_samples=10)


@pytest.mark.parametrize("route", ["engine", "frozen"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_token_cotangents_give_the_same_bits(model, images, monkeypatch, backend, route):
    """Images are explained one by one, so that micro-batches are the same."""
    for image in images:
        settings = dict(precision="bf16", backend=backend, route=route)
        ordinary = explained(model, image, monkeypatch, **settings)
        tiled = explained(model, image, monkeypatch, free=15 * ONE, **settings)
        assert torch.equal(ordinary.raw, tiled.raw) and torch.equal(ordinary.maps, tiled.maps)


def test_images_of_a_batch_go_in_groups(model, images, monkeypatch):
    ordinary = explained(model, images, monkeypatch, precision="bf16")
    tiled = explained(model, images, monkeypatch, free=15 * ONE, precision="bf16")
    assert (ordinary.raw - tiled.raw).norm() < 0.02 * ordinary.raw.norm()


def test_contributions_in_bfloat16_cost_a_little_and_say_so(model, images, monkeypatch, caplog):
    ordinary = explained(model, images, monkeypatch, precision="fp32")
    with caplog.at_level(logging.WARNING, "dave_fast"):
        rounded = explained(model, images, monkeypatch, free=15 * ONE, precision="fp32")
    assert "contributions are kept in bfloat16" in caplog.text
    error = ((rounded.raw - ordinary.raw).norm() / ordinary.raw.norm()).item()
    assert 0 < error < 0.05


def test_several_callables_and_progress_in_groups(model, images, monkeypatch):
    seen = []
    explainer = dave_fast.DAVE(model, noise_alpha=0.5, internal_batch_size=4, precision="bf16")
    monkeypatch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: 15 * ONE)
    targets = [lambda row: row[1], lambda row: row[2]]
    found = explainer.explain(images, targets, n_samples=10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 20), (8, 20), (10, 20), (14, 20), (18, 20), (20, 20)]
    monkeypatch.undo()
    expected = explainer.explain(images, targets, n_samples=10)
    assert (found.raw - expected.raw).norm() < 0.02 * expected.raw.norm()
