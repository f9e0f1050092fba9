"""Test that pull_back_mean equals robust_mean(pull_back(...)) to the bit without storing the contributions."""

from __future__ import annotations

import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.pull_back_mean import pull_back_mean
from dave_fast.ops.robust_mean import robust_mean
from dave_fast.sampling import draw
from tests.ops.test_perturb import FLOATS, SETTINGS, image_batch
from tests.ops.test_pull_back import cotangents_of

# one pixel; less than a tile; several tiles and a rest in both directions; one token
SHAPES = [(1, 1, 1, (1, 1)), (3, 28, 42, (14, 7)), (2, 66, 135, (11, 27)), (3, 40, 70, (40, 70))]
IDS = ["one-pixel", "patch-14x7", "tiles-and-rests", "one-token"]


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_equals_the_two_ops_to_the_bit(backend, shape):
    channels, height, width, patch = shape
    for sampling, dtype in SETTINGS:
        images = image_batch(channels, height, width, dtype)
        draws = draw(7, height=height, width=width, seed=6, image_keys=[1, 2], sampling=sampling)
        tokens = cotangents_of(len(draws), shape, dtype)
        raw = pull_back_mean(tokens, images, draws, patch, 7, backend=backend)
        contributions = pull_back(tokens, images, draws, patch, backend=backend)
        expected = robust_mean(contributions.unflatten(0, (2, 7)), backend=backend)
        assert raw.dtype == dtype and torch.equal(raw, expected), (sampling, dtype)


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_cotangents_of_any_type_and_any_number_of_samples(backend, samples):
    shape = (3, 40, 24, (8, 8))
    images = image_batch(3, 40, 24, torch.float32)
    draws = draw(samples, height=40, width=24, image_keys=[4, 5])
    for given in FLOATS:
        tokens = cotangents_of(len(draws), shape, given)
        raw = pull_back_mean(tokens, images, draws, 8, samples, backend=backend)
        contributions = pull_back(tokens, images, draws, 8, backend=backend)
        assert torch.equal(raw, robust_mean(contributions.unflatten(0, (2, samples)), backend=backend)), given


def test_a_part_of_a_batch_with_all_its_images(backend):
    shape = (3, 16, 24, (8, 8))
    images = image_batch(3, 16, 24, torch.float32, count=3)
    draws = draw(5, height=16, width=24, image_keys=[1, 2, 3])
    tokens = cotangents_of(len(draws), shape, torch.float32)
    whole = pull_back_mean(tokens, images, draws, 8, 5, backend=backend)
    part = pull_back_mean(tokens[5:], images, draws[5:], 8, 5, backend=backend)
    assert torch.equal(part, whole[1:])
    assert pull_back_mean(tokens[:0], images, draws[:0], 8, 5, backend=backend).shape == (0, 3, 16, 24)


def test_more_threads_change_nothing(backend):
    shape = (3, 70, 70, (35, 14))
    images = image_batch(3, 70, 70, torch.float32)
    draws = draw(4, height=70, width=70, image_keys=[1, 2])
    tokens = cotangents_of(len(draws), shape, torch.float32)
    one = pull_back_mean(tokens, images, draws, (35, 14), 4, backend=backend)
    torch.set_num_threads(3)
    try:
        assert torch.equal(pull_back_mean(tokens, images, draws, (35, 14), 4, backend=backend), one)
    finally:
        torch.set_num_threads(1)


def test_nan_propagates_to_the_pixels_that_read_it_only(backend):
    shape = (1, 12, 12, (6, 6))
    images = image_batch(1, 12, 12, torch.float32, count=1) + 3
    draws = draw(5, height=12, width=12)
    tokens = cotangents_of(5, shape, torch.float32)
    clean = pull_back_mean(tokens, images, draws, 6, 5, backend=backend)
    tokens[3, 1, 14] = torch.nan
    raw = pull_back_mean(tokens, images, draws, 6, 5, backend=backend)
    seen = pull_back(tokens, images, draws, 6, backend=backend)[3].isnan()
    assert bool(seen.any())
    assert torch.equal(raw[0].isnan(), seen)
    assert torch.equal(raw[0][~seen], clean[0][~seen])


def test_bad_inputs_are_refused():
    images, draws = torch.zeros(1, 3, 8, 8), draw(6, height=8, width=8)
    tokens = torch.zeros(6, 4, 48)
    for samples in (0, 4, -1, 2.0):
        with pytest.raises(InputError, match="n_samples must divide the 6 rows"):
            pull_back_mean(tokens, images, draws, 4, samples)
    with pytest.raises(InputError, match=r"\(6, 4, 48\); got \(6, 3, 48\)"):
        pull_back_mean(tokens[:, 1:], images, draws, 4, 6)
