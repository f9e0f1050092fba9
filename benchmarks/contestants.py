"""The contestants that dave-fast is compared with: the plain way, the authors' code, compiled PyTorch, captum.

A contestant that cannot run here stays in the table, with the reason in `not_measured`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import authors, plain
from benchmarks.peers import LADDER, Peer, Tricks
from dave_fast.bench import isas, rates, whole
from dave_fast.bench.shapes import Shapes
from dave_fast.bench.whole import NOISE_ALPHA, Contestant
from dave_fast.errors import DaveFastError
from dave_fast.ops.patches import patchify, unpatchify
from dave_fast.ops.precision import why_not
from dave_fast.sampling import Draws, Sampling, draw, normal

STEPS = 50
# micro-batches (samples) to choose the fastest of: on a GPU multiples that fill its multiprocessors, and multiples of
# S = 50; on a CPU those that stay in its caches
ROWS = {"cuda": (28, 50, 56, 100, 112, 200), "cpu": (2, 4, 8)}
# errors of a library for a model, shape or device that it does not support; shown in the table
LIBRARY_ERRORS = (RuntimeError, NotImplementedError, ImportError, DaveFastError)


def guarded(name: str, precision: str, samples: int, make: Callable[[], Contestant], image: Tensor) -> Contestant:
    """Make a contestant and run a first explanation; if its library raises, return one with the reason."""
    try:
        made = make()
        made.explain(image[None], made.rows[0])
    except LIBRARY_ERRORS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return Contestant(name, precision, samples, not_measured=reason)
    made.name = name
    return made


def why_no(precision: str, device: str) -> str | None:
    """Return why a precision is not measured on this device, or None."""
    if precision == "tf32" and device != "cuda":
        return "TF32 is an arithmetic of NVIDIA GPUs"
    return why_not(precision, torch.device(device)) or isas.why_not(precision, device)


def best_of(device: str) -> str:
    """Return the best precision of PyTorch's own products on a device."""
    return "fp32" if why_no("bf16", device) else "bf16"


def ours(model: nn.Module, image: Tensor, samples: int, shapes: Shapes, device: str) -> list[Contestant]:
    """Return dave-fast in every precision, on CUDA with and without graphs."""
    found = []
    for precision in whole.PLAIN:
        name = f"dave-fast {precision}"
        reason = why_no(precision, device)
        if reason is not None:
            found.append(Contestant(name, precision, samples, not_measured=reason))
            continue
        variants: dict[str, dict[str, Any]] = {name: {}}
        if device == "cuda":
            variants[f"{name}, without graphs"] = {"graphs": False}
        for variant, settings in variants.items():
            make = partial(whole.dave, model, precision, samples, shapes, device=device, **settings)
            made = guarded(variant, precision, samples, make, image)
            made.rows = (None, *ROWS[device]) if device == "cuda" else (None,)
            found.append(made)
    return found


def plain_way(model: nn.Module, image: Tensor, samples: int, shapes: Shapes) -> Contestant:
    """Return the plain way: one sample after the other in float32, by autograd."""
    draws = draw(samples, height=image.shape[1], width=image.shape[2], sampling=Sampling(noise_alpha=NOISE_ALPHA))

    def explain(images: Tensor, rows: int | None) -> Tensor:
        return torch.stack([plain.explain_plain(model, each, 0, draws)[1] for each in images])

    def contributions(images: Tensor, rows: Draws) -> Tensor:
        noise = noise_of(rows, images)
        return torch.stack(
            [plain.explain_plain(model, each, 0, rows[i : i + 1], noise[i : i + 1])[0] for i, each in enumerate(images)]
        )

    kind = "mkl-fp32" if image.device.type == "cpu" else "cublas-fp32"
    work = plain.gigaflops_a_sample(model, image)
    return Contestant("plain", "fp32", samples, explain, contributions, work, ceiling=(kind, 1))


def noise_of(draws: Draws, images: Tensor) -> Tensor:
    """Return the engine's noise ε, (R, C, H, W)."""
    device = images.device
    deviates = normal(draws.keys.to(device), draws.samples.to(device), images[0].numel())
    return deviates.view(len(draws), *images.shape[1:])


def authors_code(
    checkout: Path | None, model: nn.Module, image: Tensor, samples: int, work: float | None
) -> list[Contestant]:
    """Return their code in float32 and TF32; it takes no draws, so tests/explain/test_authors.py compares results."""
    found = []
    device = image.device.type
    for precision in ("fp32", "tf32"):
        name = f"the authors' code, {precision}"
        reason = why_no(precision, device)
        if checkout is None:
            reason = "give --authors PATH, a checkout of github.com/a-vrobell/DAVE"
        if reason is not None or checkout is None:
            found.append(Contestant(name, precision, samples, not_measured=reason))
            continue

        def make(precision: str = precision, checkout: Path = checkout, name: str = name) -> Contestant:
            theirs = authors.load_explainer(checkout, copy.deepcopy(model), NOISE_ALPHA, device)

            def explain(images: Tensor, rows: int | None) -> Any:
                with rates.tf32(precision == "tf32"):
                    target = torch.zeros(len(images), dtype=torch.int64, device=images.device)
                    return theirs.explain(images, target, samples)

            kind = "mkl-fp32" if device == "cpu" else f"cublas-{precision}"
            return Contestant(name, precision, samples, explain, None, work, ceiling=(kind, 1))

        found.append(guarded(name, precision, samples, make, image))
    return found


def precisions_of(tricks: Tricks, usual: Iterable[str]) -> list[str]:
    """Return the precisions that a peer is measured in: eight bits where that is its trick, else the usual ones."""
    return [tricks.eight_bits] if tricks.eight_bits else list(usual)


def peers(
    model: nn.Module, image: Tensor, samples: int, shapes: Shapes, steps: tuple[str, ...] = tuple(LADDER)
) -> list[Contestant]:
    """Return the ladder of `benchmarks.peers`, in fp32 and in the best precision of the device, or in eight bits."""
    device = image.device.type
    usual = dict.fromkeys(("fp32", best_of(device)))
    found = []
    for step, precision in [(name, each) for name in steps for each in precisions_of(LADDER[name], usual)]:
        tricks = LADDER[step]
        name = f"PyTorch {step}, {precision}"
        reason = why_no(precision, device)
        if reason is not None:
            found.append(Contestant(name, precision, samples, not_measured=reason))
            continue
        make = partial(peer, model, tricks, precision, samples, shapes, image)
        found.append(guarded(name, precision, samples, make, image))
    return found


def peer(
    model: nn.Module,
    tricks: Tricks,
    precision: str,
    samples: int,
    shapes: Shapes,
    image: Tensor,
    mode: str | None = None,
) -> Contestant:
    """Return one step of the ladder, counted with the engine's arithmetic, the least that the result needs.

    Args:
        model: the model.
        tricks: of the step.
        precision: its name.
        samples: S.
        shapes: of the model.
        image: (C, H, W), on the device.
        mode: of torch.compile.
    """
    device = image.device.type
    dtype = rates.DTYPES[best_of(device) if precision == "int8" else precision]
    walks = Peer(model, tricks, dtype, device, mode=mode)
    sampling = Sampling(noise_alpha=NOISE_ALPHA)

    def contributions(images: Tensor, draws: Draws, noise: Tensor | None = None) -> Tensor:
        given = noise_of(draws, images) if noise is None else noise
        return _peer_rows(walks, images, draws, given)

    def explain(images: Tensor, rows: int | None) -> Tensor:
        keys, (height, width) = [0] * len(images), images.shape[2:]
        draws = draw(samples, height=height, width=width, image_keys=keys, sampling=sampling)
        parts = []
        for start in range(0, len(draws), rows or len(draws)):
            part = draws[start : start + (rows or len(draws))]
            short = (rows or len(draws)) - len(part)
            if short:
                # the peer is compiled for one shape: pad the last part with rows that are dropped
                part = draws[torch.cat([torch.arange(start, len(draws)), torch.zeros(short, dtype=torch.int64)])]
            noise = torch.randn(len(part), *images.shape[1:], device=images.device)
            parts.append(contributions(images, part, noise)[: len(part) - short])
        every = torch.cat(parts).unflatten(0, (len(images), samples))
        return torch.stack([plain.smooth(plain.masked_mean(each)) for each in every])

    return Contestant("", precision, samples, explain, contributions, shapes.gigaflops(), rows=ROWS[device])


def _peer_rows(walks: Peer, images: Tensor, draws: Draws, noise: Tensor) -> Tensor:
    """Return contributions (R, C, H, W) of rows of draws, with torch's warp and its adjoint around the peer."""
    device, (height, width) = images.device, images.shape[2:]
    rows = images[draws.image_index.to(device)]
    leaf = rows.clone().requires_grad_()
    grid = F.affine_grid(_normalised(draws.matrices, height, width).to(images), list(rows.shape), align_corners=False)
    warped = F.grid_sample(leaf, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    signal, level = (t.to(images).view(-1, 1, 1, 1) for t in (draws.signal, draws.noise))
    tokens = patchify(signal * warped.detach() + level * noise, walks.patch).to(walks.dtype)
    cotangent = unpatchify(walks.cotangents(tokens, 0).to(images.dtype), walks.patch, height, width)
    (gradient,) = torch.autograd.grad(warped, leaf, signal * cotangent)
    return gradient * rows


def _normalised(matrices: Tensor, height: int, width: int) -> Tensor:
    """Convert pixel matrices (R, 2, 3) to the coordinates of `affine_grid` with align_corners=False."""
    to_pixels = torch.tensor([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
    to_pixels = to_pixels.double()
    last = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(len(matrices), 1, 3)
    return (torch.linalg.inv(to_pixels) @ torch.cat([matrices, last], dim=1) @ to_pixels)[:, :2]


class Within(nn.Module):
    """A copy of a model that runs in `dtype`, for images, outputs and gradients in float32.

    captum converts narrower images to float32 when it adds noise, which weights of another dtype do not accept. Only
    images and logits are converted, so the model's whole forward and backward passes stay in `dtype`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits in float32."""
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def captum_methods(model: nn.Module, image: Tensor) -> list[Contestant]:
    """Return integrated gradients and SmoothGrad with STEPS forward and backward passes, on the same model."""
    device = image.device.type
    names = (f"captum IG-{STEPS}", f"captum SmoothGrad-{STEPS}")
    try:
        from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
    except ImportError as error:
        return [Contestant(name, "fp32", STEPS, not_measured=f"captum is not installed ({error})") for name in names]
    best = best_of(device)
    found = []
    for precision in dict.fromkeys(("fp32", best)):
        inner = Within(model, rates.DTYPES[precision])
        integrated, tunnel = IntegratedGradients(inner), NoiseTunnel(Saliency(inner))

        def gradients(images: Tensor, rows: int | None, method: Any = integrated) -> Any:
            return method.attribute(images, target=0, n_steps=STEPS, internal_batch_size=rows or STEPS)

        def smooth(images: Tensor, rows: int | None, method: Any = tunnel) -> Any:
            given = images.detach().requires_grad_()
            settings = {"nt_samples": STEPS, "nt_samples_batch_size": rows or STEPS}
            return method.attribute(given, target=0, stdevs=0.3, **settings)

        for name, explain in zip(names, (gradients, smooth), strict=True):
            made = Contestant(f"{name}, {precision}", precision, STEPS, explain, rows=ROWS[device])
            found.append(guarded(made.name, precision, STEPS, lambda made=made: made, image))
    return found
