"""The pipeline against numbers recorded from the authors' released code (scripts/record_authors.py).

Their warps, their noise and their levels t go through our operations, one after the other; the result must be
theirs. In float64 that tests the definitions, every pixel of them. In float32 a few values of a hundred thousand lie
so close to the outlier threshold that either code may keep or drop them; those are left out, and counted.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dave_fast
from dave_fast.models.demo import load_demo_model
from dave_fast.ops.patches import patchify, unpatchify
from dave_fast.ops.perturb import perturb
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.robust_mean import EPSILON, KEPT_SIGMAS, MAD_TO_SIGMA, robust_mean
from dave_fast.ops.smooth import smooth
from dave_fast.sampling import Draws, Sampling, draw
from scripts.record_authors import weights_digest

PATCH = 16
# the recording is stored in float32, and their Gaussian window was rounded to it
STORED = 1e-6
# their float32 warp places a sample up to 1e-5 pixels away from where ours does
SINGLE = 1e-5
THRESHOLD_MARGIN = 1e-3


class Recording:
    """The inputs, draws and results of the authors' run, in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        with np.load(Path(__file__).parent / "data" / "authors_pipeline.npz") as archive:
            self.weights = str(archive["weights"])
            self.numbers = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "weights"}
        pixels = self.numbers["image"].permute(0, 3, 1, 2).float() / 255
        self.image = ((pixels - 0.5) / 0.5).to(dtype).contiguous()
        self.noise = self.numbers["noise_sixteenths"].to(dtype) / 16
        self.target = self.numbers["target"]
        suffix = "_fp64" if dtype == torch.float64 else ""
        self.raw, self.maps = self.numbers["raw" + suffix].to(dtype), self.numbers["maps" + suffix].to(dtype)
        t = self.numbers["t"].double()
        rows = len(t)
        self.draws = Draws(
            image_index=torch.zeros(rows, dtype=torch.int64),
            matrices=self.numbers["matrices"],
            signal=1 - t,
            noise=torch.zeros(rows, dtype=torch.float64),
            keys=torch.zeros(rows, 2, dtype=torch.int64),
            samples=torch.arange(rows),
        )
        self.noise_level = (1 - (1 - t) ** 2).sqrt()


def contributions_of(recording: Recording, dtype: torch.dtype, route: str) -> Tensor:
    """Return this project's contributions (1, S, C, H, W) for the authors' draws."""
    image, draws = recording.image, recording.draws
    tokens = perturb(image, draws, PATCH, dtype=dtype)
    tokens += recording.noise_level.to(dtype)[:, None, None] * patchify(recording.noise, PATCH)
    perturbed = unpatchify(tokens, PATCH, *image.shape[2:])
    precision = "fp64" if dtype == torch.float64 else "fp32"
    gradients = dave_fast.effective_gradient(
        load_demo_model(), perturbed, recording.target.expand(len(draws)), precision=precision, route=route
    )
    return pull_back(patchify(gradients.to(dtype), PATCH), image, draws, PATCH)[None]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def near_threshold(contributions: Tensor) -> Tensor:
    """Return where a sample lies within the margin of the outlier threshold: (1, C, H, W) bool."""
    deviations = (contributions - contributions.median(dim=1, keepdim=True).values).abs()
    limit = KEPT_SIGMAS * (MAD_TO_SIGMA * deviations.median(dim=1, keepdim=True).values + EPSILON)
    return ((deviations - limit).abs() < THRESHOLD_MARGIN * limit).any(dim=1)


def test_the_recording_is_of_the_embedded_model():
    recorded = Recording(torch.float32).weights
    assert weights_digest(load_demo_model()) == recorded, "the demo weights have changed: run scripts/record_authors.py"


def test_levels_are_those_of_the_paper_schedule():
    t = Recording(torch.float64).numbers["t"].double()
    ours = draw(len(t), height=128, width=128, sampling=Sampling(noise_alpha=0.5, schedule="paper"))
    torch.testing.assert_close(1 - ours.signal, t, rtol=1e-6, atol=1e-7)


def test_warps_lie_in_the_ranges_that_we_draw_from():
    matrices = Recording(torch.float64).numbers["matrices"]
    linear = matrices[:, :, :2]
    scale = 1 / torch.linalg.det(linear).abs().sqrt()
    assert ((scale > 0.9) & (scale < 1.1)).all()
    # without the flip: x axis back to the right-handed side
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0] * linear[:, 0, 0].sign(), linear[:, 1, 1]))
    assert (angle.abs() < 20).all()
    whole = torch.cat([matrices, torch.tensor([0.0, 0.0, 1.0]).double().expand(len(matrices), 1, 3)], dim=1)
    centre = torch.tensor([63.5, 63.5, 1.0]).double()
    moved = (torch.linalg.inv(whole) @ centre)[:, :2] - 63.5
    assert (moved.abs() < 12.8).all()
    assert (torch.linalg.det(linear) < 0).any()
    assert (torch.linalg.det(linear) > 0).any()


@pytest.mark.parametrize("route", ["frozen", "engine"])
def test_raw_and_maps_are_theirs_in_float64(route):
    recording = Recording(torch.float64)
    raw = robust_mean(contributions_of(recording, torch.float64, route))
    assert relative(raw, recording.raw) < STORED
    assert relative(smooth(raw), recording.maps) < STORED
    assert (smooth(raw) - recording.maps).abs().max() < STORED


@pytest.mark.parametrize("route", ["frozen", "engine"])
def test_raw_is_theirs_in_float32_but_for_values_on_the_threshold(route):
    recording = Recording(torch.float32)
    contributions = contributions_of(recording, torch.float32, route)
    open_values = near_threshold(contributions)
    assert open_values.float().mean() < 0.01
    difference = (robust_mean(contributions) - recording.raw).masked_fill(open_values, 0)
    assert difference.norm() < SINGLE * recording.raw.norm()
    assert difference.abs().max() < 2 * SINGLE * recording.raw.abs().max()


def test_smoothing_is_theirs_in_float32():
    recording = Recording(torch.float32)
    assert (smooth(recording.raw) - recording.maps).abs().max() < 1e-5
