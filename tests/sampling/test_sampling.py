"""The draws: Philox against its published vectors, the pinned streams, splitting, geometry, the normal deviates."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dave_fast.errors import InputError
from dave_fast.ops import _ext
from dave_fast.sampling import Draws, Sampling, draw, identity, normal
from dave_fast.sampling.philox import WORD, philox4x32, splitmix64, uniform

SIZE = {"height": 30, "width": 44}
FAST = settings(max_examples=25, deadline=None)


def same(a: Draws, b: Draws) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Draws))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_splitmix64_known_answers():
    # the first outputs of the generator with state 0
    golden = 0x9E3779B97F4A7C15
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(golden) == 0x6E789E6AA1B965F4
    assert splitmix64(2 * golden) == 0x06C45D188009454F


def test_streams_blocks_and_order_are_the_pinned_ones():
    seed, image_key, s = 7, 11, 5
    key = splitmix64(seed ^ splitmix64(image_key))
    words = (key & WORD, key >> 32)
    block0 = [float(uniform(word)) for word in philox4x32((0, s, 0, 0), words)]
    shift_y = float(uniform(philox4x32((1, s, 0, 0), words)[0]))
    shift = float(uniform(philox4x32((0, 0, 2, 0), words)[0]))
    draws = draw(1, seed=seed, image_keys=[image_key], first_sample=s, **SIZE)

    angle = math.radians((2 * block0[1] - 1) * 20)
    scale = 0.9 + 0.2 * block0[2]
    mirror = -1 if block0[0] < 0.5 else 1
    forward = scale * torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double()
    forward = forward @ torch.diag(torch.tensor([mirror, 1.0])).double()
    moved = torch.tensor([(2 * block0[3] - 1) * 0.1 * SIZE["width"], (2 * shift_y - 1) * 0.1 * SIZE["height"]]).double()
    centre = torch.tensor([(SIZE["width"] - 1) / 2, (SIZE["height"] - 1) / 2]).double()
    p = torch.tensor([3.0, 5.0]).double()
    q = centre + moved + forward @ (p - centre)
    back = draws.matrices[0, :, :2] @ q + draws.matrices[0, :, 2]
    torch.testing.assert_close(back, p, rtol=0, atol=1e-6)

    t = 0.5 * ((0.625 + shift) % 1)  # 5 = 101 in binary, reversed .101
    assert float(draws.signal) == pytest.approx(1 - t, abs=1e-15)
    assert float(draws.noise) == pytest.approx(math.sqrt(1 - (1 - t) ** 2), abs=1e-13)
    assert draws.keys.tolist() == [list(words)]
    assert draws.samples.tolist() == [s]


def test_a_rotation_is_counter_clockwise_on_screen():
    only_rotation = Sampling(rotation=20, scale=(1, 1), translation=0, flip=0)
    draws = draw(64, height=9, width=9, sampling=only_rotation)
    # the source of a destination right of the centre: below the centre where content turned counter-clockwise, since
    # y points down
    right_of_centre = torch.tensor([6.0, 4.0, 1.0]).double()
    source_y = (draws.matrices @ right_of_centre)[:, 1] - 4
    angle = 2 * uniform(philox4x32((0, draws.samples, 0, 0), (draws.keys[:, 0], draws.keys[:, 1]))[1]) - 1
    assert torch.equal(source_y > 0, angle > 0)


@FAST
@given(seed=st.integers(-(2**70), 2**70), key=st.integers(-(2**65), 2**65), first=st.integers(0, 2**32 - 9))
def test_seeds_and_keys_are_integers_modulo_two_to_the_64(seed, key, first):
    draws = draw(8, seed=seed, image_keys=[key], first_sample=first, **SIZE)
    assert same(draws, draw(8, seed=seed % 2**64, image_keys=[key % 2**64], first_sample=first, **SIZE))
    assert int(draws.keys.min()) >= 0
    assert int(draws.keys.max()) <= WORD


@FAST
@given(cut=st.integers(1, 19), order=st.permutations([3, 1, 4]))
def test_any_split_and_order_gives_the_same_draws(cut, order):
    whole = draw(20, seed=3, image_keys=[3, 1, 4], **SIZE)
    by_key = {key: whole[20 * i : 20 * (i + 1)] for i, key in enumerate([3, 1, 4])}
    for key in order:
        parts = (
            draw(cut, seed=3, image_keys=[key], **SIZE),
            draw(20 - cut, seed=3, image_keys=[key], first_sample=cut, **SIZE),
        )
        for name in ("matrices", "signal", "noise", "keys", "samples"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(by_key[key], name))


def test_the_first_samples_of_a_longer_run_are_those_of_a_shorter_one():
    assert same(draw(50, **SIZE)[:16], draw(16, **SIZE))
    paper = Sampling(schedule="paper")
    assert same(draw(50, sampling=paper, **SIZE)[:16], draw(16, sampling=paper, schedule_length=50, **SIZE))


def test_rows_are_image_major():
    draws = draw(3, image_keys=[5, 6], **SIZE)
    assert len(draws) == 6
    assert draws.image_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert draws.samples.tolist() == [0, 1, 2, 0, 1, 2]
    assert not torch.equal(draws[:3].matrices, draws[3:].matrices)


def test_the_paper_schedule():
    draws = draw(5, sampling=Sampling(schedule="paper", noise_alpha=0.8), **SIZE)
    torch.testing.assert_close(1 - draws.signal, 0.2 * torch.arange(5).double(), rtol=0, atol=1e-15)
    assert float(draw(1, sampling=Sampling(schedule="paper"), **SIZE).noise) == 0


def test_every_prefix_of_the_sequence_is_spread_evenly():
    t = (1 - draw(256, seed=9, sampling=Sampling(noise_alpha=1.0), **SIZE).signal).sort().values
    assert float((t[1:] - t[:-1]).max()) <= 1 / 256 + 1e-12
    first = (1 - draw(16, seed=9, sampling=Sampling(noise_alpha=1.0), **SIZE).signal).sort().values
    assert float((first[1:] - first[:-1]).max()) <= 1 / 16 + 1e-12


def test_transforms_stay_in_their_ranges_and_fill_them():
    sampling = Sampling(rotation=30, scale=(0.5, 2.0), translation=0.25, flip=0.25)
    draws = draw(4000, sampling=sampling, height=31, width=51)
    linear = torch.linalg.inv(draws.matrices[:, :, :2])
    determinant = torch.linalg.det(linear)
    scale, flipped = determinant.abs().sqrt(), determinant < 0
    centre = torch.tensor([25.0, 15.0]).double()
    moved = torch.einsum("rij,rj->ri", linear, centre - draws.matrices[:, :, 2]) - centre
    angle = torch.rad2deg(torch.atan2(linear[:, 0, 1], linear[:, 1, 1]))
    assert float(flipped.double().mean()) == pytest.approx(0.25, abs=0.03)
    for values, low, high in (
        (scale, 0.5, 2.0),
        (angle, -30, 30),
        (moved[:, 0] / 51, -0.25, 0.25),
        (moved[:, 1] / 31, -0.25, 0.25),
    ):
        assert stats.kstest(values.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_without_ranges_there_is_no_warp():
    still = draw(4, sampling=Sampling(rotation=0, scale=(1, 1), translation=0, flip=0), **SIZE)
    assert torch.equal(still.matrices, identity(4).matrices)
    assert identity(2).noise.tolist() == [0, 0]
    assert identity(2).signal.tolist() == [1, 1]


def test_no_generator_of_torch_is_touched():
    before = torch.random.get_rng_state()
    draws = draw(4, **SIZE)
    normal(draws.keys, draws.samples, 100)
    assert torch.equal(before, torch.random.get_rng_state())


def test_normal_deviates_have_the_distribution():
    draws = draw(8, seed=1, **SIZE)
    deviates = normal(draws.keys, draws.samples, 100_001)
    assert deviates.shape == (8, 100_001)
    assert deviates.dtype == torch.float32
    moments = [float((deviates.double() ** k).mean()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)
    assert stats.kstest(deviates[0].numpy(), stats.norm.cdf).pvalue > 1e-3
    pairs = torch.corrcoef(deviates.double())
    assert float((pairs - torch.eye(8)).abs().max()) < 0.02


def test_normal_deviates_are_accurate():
    draws = draw(1, **SIZE)
    deviates = normal(draws.keys, draws.samples, 400_000).double()
    blocks = torch.arange(100_000)
    words = philox4x32((blocks, 0, 1, 0), (draws.keys[0, 0], draws.keys[0, 1]))
    truth = []
    for even, odd in (words[:2], words[2:]):
        radius, angle = torch.sqrt(-2 * torch.log(uniform(even))), 2 * torch.pi * uniform(odd)
        truth += [radius * angle.cos(), radius * angle.sin()]
    # near u = 1 the float32 uniform itself is what is rounded
    error = (deviates.view(-1, 4) - torch.stack(truth, dim=-1)).abs()
    assert float(error.max()) < 2e-5
    assert float(error.mean()) < 1e-7


@pytest.mark.parametrize("n_elements", [1, 3, 4, 255, 1027])
def test_native_deviates_are_the_same_bits(backend, n_elements):
    if backend == "torch":
        pytest.skip("is what the others are compared with")
    draws = draw(6, seed=5, image_keys=[1, 2], **SIZE)
    deviates = torch.full((len(draws), n_elements), torch.nan)
    _ext.run_native("normal", draws.keys, draws.samples, n_elements, deviates)
    assert torch.equal(deviates, normal(draws.keys, draws.samples, n_elements))


@pytest.mark.parametrize(
    "settings_",
    [
        {"noise_alpha": -0.1},
        {"noise_alpha": 1.5},
        {"noise_alpha": float("nan")},
        {"noise_alpha": "0.5"},
        {"schedule": "papers"},
        {"rotation": -1},
        {"rotation": float("inf")},
        {"scale": (0, 1)},
        {"scale": (1.1, 0.9)},
        {"scale": 1.0},
        {"translation": -0.1},
        {"flip": 2},
        {"flip": True},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings_):
    with pytest.raises(InputError, match=next(iter(settings_))):
        Sampling(**settings_)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples"),
        ({"n_samples": 2.5}, "n_samples"),
        ({"n_samples": 1, "first_sample": -1}, "first_sample"),
        ({"n_samples": 2, "first_sample": 2**32 - 1}, "below 2³²"),
        ({"n_samples": 1, "image_keys": []}, "image_keys"),
        ({"n_samples": 1, "height": 0}, "height"),
        ({"n_samples": 4, "first_sample": 2, "sampling": Sampling(schedule="paper")}, "schedule_length"),
        ({"n_samples": 4, "schedule_length": 3, "sampling": Sampling(schedule="paper")}, "schedule_length"),
    ],
    ids=str,
)
def test_draws_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        draw(**(SIZE | arguments))
