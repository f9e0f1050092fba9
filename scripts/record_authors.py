"""Record a run of the DAVE authors' released code on the demo model, for tests/explain/test_authors.py.

    python -m scripts.record_authors --authors PATH [--out tests/explain/data/authors_pipeline.npz]

PATH is a checkout of github.com/a-vrobell/DAVE; kornia and PyYAML must be installed. Their code has no licence, so this
repository contains none of it, only its numbers.

Their code draws from the global generator. The draws are recorded as numbers, so that dave-fast can use the same: the
warp as its effective matrix, measured by warping coordinates, because versions of kornia normalise them differently;
and the noise. Noise is rounded to sixteenths before their code uses it, which eight bits represent exactly; no
definition under test depends on its distribution.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.authors import load_explainer
from dave_fast.images import preprocessing
from dave_fast.models.demo import load_demo_model
from dave_fast.models.demo.scenes import draw_scenes

SCENE_SEED, SCENE_INDEX = 2026, 0
N_SAMPLES, NOISE_ALPHA = 6, 0.5
GENERATOR_SEED = 20260602
NOISE_STEPS = 16


def weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of the weights, by which a recording is assigned to a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


class Recorder:
    """A recorder of the draws of their explainer: kornia's parameters, warped images, noise, noise levels t.

    Args:
        explainer: theirs.
        replay: a recording whose draws to use again, or None.
    """

    def __init__(self, explainer: Any, replay: Recorder | None = None) -> None:
        self.explainer, self.replay = explainer, replay
        self.parameters: list[Any] = []
        self.warped: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.t: Tensor = torch.empty(0)

    def run(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Run the explainer; record or replay all draws; return raw (1, C, H, W) and map (1, 1, H, W)."""
        explainer = self.explainer
        schedule, geometric = explainer.get_noise_schedule, explainer.aug.geometric
        warp = geometric.forward

        def recorded_schedule(num_steps: int) -> Tensor:
            self.t = schedule(num_steps=num_steps) if self.replay is None else self.replay.t
            return self.t.to(image.dtype)

        def recorded_warp(x: Tensor) -> Tensor:
            step = len(self.parameters)
            out = warp(x) if self.replay is None else warp(x, params=self.replay.parameters[step])
            self.parameters.append(geometric._params)
            self.warped.append(out.detach())
            return out

        def recorded_noise(x: Tensor, **_: Any) -> Tensor:
            draw = torch.randn(x.shape) if self.replay is None else self.replay.noise[len(self.noise)]
            self.noise.append((draw * NOISE_STEPS).round().clamp(-128, 127) / NOISE_STEPS)
            return self.noise[-1].to(x.dtype)

        torch.manual_seed(GENERATOR_SEED)
        with (
            # their code seeds from the clock at every step, which would make a run unrepeatable
            patch("torch.seed"),
            patch("torch.randn_like", recorded_noise),
            patch.object(explainer, "get_noise_schedule", recorded_schedule),
            patch.object(geometric, "forward", recorded_warp),
        ):
            raw = explainer.explain(image, target, num_steps=N_SAMPLES, post_proc=False)
        return raw, explainer.post_proc.to(image.dtype)(raw)


def measure_matrix(geometric: Any, parameters: Any, height: int, width: int) -> Tensor:
    """Measure the destination → source pixel matrix (2, 3), float64, of a recorded augmentation.

    Bilinear sampling reproduces linear functions exactly, so warped coordinates are the matrix's own values wherever no
    sample is outside of the image, that is, where the third channel, of ones, is still 1.
    """
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    source_x, source_y, inside = geometric(torch.stack([x, y, torch.ones_like(x)])[None], params=parameters)[0]
    kept = inside > 1 - 1e-12
    destination = torch.stack([x, y, torch.ones_like(x)], dim=-1)[kept]
    source = torch.stack([source_x, source_y], dim=-1)[kept]
    matrix = torch.linalg.lstsq(destination, source).solution.T
    worst = (destination @ matrix.T - source).abs().max().item()
    if worst > 1e-9:
        raise RuntimeError(f"the recorded augmentation is no affine map: {worst:.1e} pixels off the fitted one")
    return matrix


def sample_bilinear(image: Tensor, matrix: Tensor) -> Tensor:
    """Warp image (C, H, W) by a destination → source pixel matrix (2, 3), zeros outside; in float64."""
    _, height, width = image.shape
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    u, v = torch.einsum("ij,jhw->ihw", matrix, torch.stack([x, y, torch.ones_like(x)]))
    out = torch.zeros(image.shape, dtype=torch.float64)
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = u.floor() + dx, v.floor() + dy
            weight = (1 - (u - column).abs()) * (1 - (v - row).abs())
            weight *= (column >= 0) & (column < width) & (row >= 0) & (row < height)
            rows, columns = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
            out += weight * image.double()[:, rows, columns]
    return out


def record(authors: Path) -> dict[str, np.ndarray]:
    """Record their results for the demo scene, once in float32 and once replayed in float64."""
    scene = draw_scenes(1, SCENE_SEED, start=SCENE_INDEX, split="test")
    model = load_demo_model()
    # before their code runs, which registers buffers of its own on the model
    digest = weights_digest(model)
    image = preprocessing(model)(Image.fromarray(scene.images[0]))[0][None]
    target = torch.from_numpy(scene.labels)

    single = Recorder(load_explainer(authors, model, NOISE_ALPHA))
    raw, maps = single.run(image, target)
    geometric = single.explainer.aug.geometric
    matrices = torch.stack([measure_matrix(geometric, p, *image.shape[-2:]) for p in single.parameters])
    for matrix, warped in zip(matrices, single.warped, strict=True):
        worst = (sample_bilinear(image[0], matrix) - warped[0]).abs().max().item()
        print(f"warped image against the measured matrix: {worst:.1e}")
        if worst > 1e-4:
            raise RuntimeError("the measured matrix does not reproduce the authors' warped image")

    double = Recorder(load_explainer(authors, load_demo_model().double(), NOISE_ALPHA), replay=single)
    raw_double, maps_double = double.run(image.double(), target)
    drift = (raw - raw_double).norm() / raw_double.norm()
    print(f"their float32 against their float64, relative L2 of raw: {drift.item():.1e}")
    return {
        "weights": np.array(digest),
        "image": scene.images,
        "target": target.numpy(),
        "t": single.t.numpy(),
        "matrices": matrices.numpy(),
        "noise_sixteenths": (torch.cat(single.noise) * NOISE_STEPS).to(torch.int8).numpy(),
        "raw": raw.numpy(),
        "maps": maps[:, 0].numpy(),
        "raw_fp64": raw_double.numpy().astype(np.float32),
        "maps_fp64": maps_double[:, 0].numpy().astype(np.float32),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, help="a checkout of their repository")
    parser.add_argument("--out", type=Path, default=Path("tests/explain/data/authors_pipeline.npz"))
    args = parser.parse_args()
    numbers = record(args.authors.resolve())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **numbers)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
