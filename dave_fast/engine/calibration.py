"""Calibration: which products are in eight-bit integers, and static scales of e4m3 operands.

Both are found when an engine is built, by walks over images made from a fixed seed, so that they, and with them every
map, depend on the model alone.

Integers (`coarse_products`): a product that they put off by more than INT8_ERROR stays in bfloat16.

e4m3 (`calibrate`): two powers of two for each product. With a scale that is known beforehand, the kernel that makes a
number can store it in e4m3 itself; otherwise every operand is read once more to find its largest number:

    scale = 2^⌈log₂(room · max|operand| / 448)⌉

One scale is for the leading tokens that the head reads, one for all others: the cotangent of a class token that is
read is hundreds of times as large as a patch's, and with one scale those of patches become zero. On a trained DINOv2,
VJPs of three features then had relative errors of 0.38 to 1.46; with two scales 0.20 to 0.27, with scales of rows 0.16
to 0.18, in bfloat16 0.04.

Room above the largest number seen costs precision: e4m3 has fewer digits below 2⁻⁶ of the scale. In the forward walk,
operands of photographs stayed within twice those of these images in all products of a trained DINOv2: the room is 8.
Cotangents follow the attention, which is sharper in a photograph, and were up to eleven times as large on the demo
model's scenes: their room is 32. A number beyond the room becomes NaN, which raises NonFiniteError at the end of a
call.

Cotangents are divided by their rows' largest number at the tail and multiplied by it at the end of the walk, so that
the scale of a question does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dave_fast.engine.walks import Engine
from dave_fast.errors import NonFiniteError
from dave_fast.ops.fp8 import LARGEST, Codes, Scales, TokenScales
from dave_fast.ops.int8 import in_integers, rounding
from dave_fast.ops.patches import patchify

# largest operand allowed, as a multiple of the largest of the calibration images, forward and in the VJP
ROOM, VJP_ROOM = 8.0, 32.0
ROWS, SEED = 8, 0
# Relative error of a product in eight bits above which it is taken in bfloat16, and the most tokens that it is measured
# with. On a trained DINOv2 products are off by 0.8 to 5 %.
INT8_ERROR, INT8_ROWS = 0.1, 256


def calibrate(engine: Engine) -> Scales:
    """Return static scales for the operands of an engine that has none, found by one walk over made images.

    Raises NonFiniteError where an operand has NaN or infinity.
    """
    plan = engine.plan
    images = made_images(ROWS, (plan.channels, *plan.image_size)).to(plan.device)
    with _recording(engine) as largest:
        output, saved = engine.forward(patchify(images, plan.patch_size).to(plan.dtype))
        forward = set(largest)
        for cotangent in _cotangents(output):
            engine.vjp(saved, cotangent)
    operands = {}
    for weight, most in largest.items():
        # an operand that is zero for all of these images gets no static scale; it is scaled row by row
        if min(most) > 0:
            room = ROOM if weight in forward else VJP_ROOM
            lead, rest = _scale(most[0], room), _scale(most[-1], room)
            of_all = len(most) == 2
            operands[weight] = TokenScales(lead, rest, plan.tokens, plan.read) if of_all else TokenScales.uniform(lead)
    return Scales(operands)


@contextmanager
def _recording(engine: Engine) -> Iterator[dict[int, tuple[float, ...]]]:
    """Record the operands of an engine's products while it walks ROWS rows.

    Yields id of a packed weight -> largest number of its operand's leading tokens and of the others; one number where
    all tokens are alike.
    """
    plan, multiply = engine.plan, engine.ops.multiply
    largest: dict[int, tuple[float, ...]] = {}

    def recording(x: Tensor | Codes, weight: Any, *given: Any, **epilogue: Any) -> Any:
        assert isinstance(x, Tensor)
        by_token = x.abs().reshape(ROWS, -1, x.shape[1])
        both = by_token.shape[1] == plan.tokens > plan.read
        parts = [by_token[:, : plan.read], by_token[:, plan.read :]] if both else [by_token]
        found = torch.stack([part.amax() for part in parts]).tolist()
        if not all(map(math.isfinite, found)):
            raise NonFiniteError(
                "the model has NaN or infinity inside for the images that eight-bit scales are found with. Check the "
                "weights, or try precision='bf16'"
            )
        largest[id(weight)] = tuple(map(max, found, largest.get(id(weight), (0.0,) * len(found))))
        return multiply(x, weight, *given, **epilogue)

    engine.ops.multiply = recording
    try:
        yield largest
    finally:
        engine.ops.multiply = multiply


def _scale(largest: float, room: float) -> float:
    """Return the power of two with which `room` times the largest number fits e4m3."""
    return 2.0 ** math.ceil(math.log2(max(room * largest / LARGEST, 2.0**-100)))


def coarse_products(engine: Engine) -> list[Any]:
    """Return the packed weights whose operands eight-bit integers are too coarse for, among those that are in integers.

    An operand with a channel that is hundreds of times as large as the others, as some large models have in their
    residual stream, leaves too few integers to the others. What it loses is multiplied in integers as well.
    """
    plan, multiply = engine.plan, engine.ops.multiply
    coarse: dict[int, Any] = {}

    def comparing(x: Tensor, weight: Any, *given: Any, **epilogue: Any) -> Any:
        if in_integers(weight) and id(weight) not in coarse:
            some = x[:: math.ceil(len(x) / INT8_ROWS)]
            kept, lost = (multiply(each, weight).float() for each in (some, rounding(some)))
            size, off = (float(torch.linalg.vector_norm(y, dtype=torch.float64)) for y in (kept.add_(lost), lost))
            # NaN is no reason: maps of such a model are refused in any precision
            if off > INT8_ERROR * size:
                coarse[id(weight)] = weight
        return multiply(x, weight, *given, **epilogue)

    engine.ops.multiply = comparing
    try:
        images = _image_with_noise(plan.channels, *plan.image_size)
        output, saved = engine.forward(patchify(images, plan.patch_size).to(plan.dtype))
        for cotangent in _cotangents(output):
            engine.vjp(saved, cotangent)
    finally:
        engine.ops.multiply = multiply
    return list(coarse.values())


def _image_with_noise(channels: int, height: int, width: int) -> Tensor:
    """Return an image (1, C, H, W) of smooth parts and white noise, float32, with little memory besides."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(1, channels, max(2, height // 16), max(2, width // 16), generator=generator)
    noise = torch.randn(1, channels, height, width, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return noise.mul_(0.6).add_(smooth)


def made_images(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Make images with amplitudes that fall as 1/frequency, as those of photographs do, from the fixed seed.

    Contrasts go from zero to twice that of a normalised photograph, and every other image is blended with white noise,
    as DAVE's samples are.

    Args:
        count: number of images.
        shape: (C, H, W).

    Returns:
        Images (count, C, H, W) in float32.
    """
    generator = torch.Generator().manual_seed(SEED)
    channels, height, width = shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    spectrum = 1 / frequency.clamp(min=1 / max(height, width))
    spectrum[0, 0] = 0
    # channels of a photograph are correlated
    grey, own = (torch.randn(count, c, height, width, generator=generator) for c in (1, channels))
    images = torch.fft.ifft2(torch.fft.fft2(grey + 0.3 * own) * spectrum).real
    images /= images.flatten(1).std(1)[:, None, None, None]
    images *= torch.linspace(0, 2, count)[:, None, None, None]
    images[1::2] = 0.6 * images[1::2] + 0.8 * torch.randn(images[1::2].shape, generator=generator)
    return images


def _cotangents(output: Tensor) -> list[Tensor]:
    """Return two cotangents: one random element of each row's output, and a random direction."""
    generator = torch.Generator().manual_seed(SEED)
    flat = output.reshape(len(output), -1)
    chosen = torch.randint(flat.shape[1], (len(flat), 1), generator=generator).to(flat.device)
    one = torch.zeros_like(flat).scatter_(1, chosen, 1.0)
    any_direction = torch.randn(flat.shape, generator=generator).to(flat)
    return [one.view_as(output), any_direction.view_as(output)]
