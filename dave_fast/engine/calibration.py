"""Static scales of e4m3 operands: two powers of two for each product's operand, found when an engine is built.

With a scale that is known beforehand, the kernel that makes a number can store it in e4m3 itself; otherwise every
operand is read once more to find its largest number. The walks run once over images made from a fixed seed, so that
scales, and with them every map, depend on the model alone:

    scale = 2^⌈log₂(room · max|operand| / 448)⌉

One is for the leading tokens that the head reads, one for all others: where a class token is read, its cotangent is
hundreds of times as large as a patch's, and with one scale patches vanish in silence. On a trained DINOv2 the VJP of
one feature, three features tried, was then off by 0.38 to 1.46 of itself; with two scales by 0.20 to 0.27, with scales
of rows by 0.16 to 0.18, in bfloat16 by 0.04.

Room above the largest number seen costs small numbers digits once they fall below 2⁻⁶ of the unit. Forward, photographs
stayed within twice what these images show in all products of a trained DINOv2: the room is 8. Cotangents follow the
attention, which is sharper in a photograph, and went to eleven times as much on the demo model's scenes: theirs is 32.
What lies beyond the room becomes NaN, and the front end refuses it by name: nothing is cut in silence.

Cotangents are divided by their rows' largest number at the tail and multiplied with it at the end of the walk, so that
the size of a question does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.walks import Engine
from dave_fast.errors import NonFiniteError
from dave_fast.ops.fp8 import LARGEST, Codes, Scales, TokenScales
from dave_fast.ops.patches import patchify

# how far beyond the largest number of the calibration images an operand may go, forward and in the VJP
ROOM, VJP_ROOM = 8.0, 32.0
ROWS, SEED = 8, 0


def calibrate(engine: Engine) -> Scales:
    """Return the scales of an engine's operands, as it finds them when it has none."""
    plan, multiply = engine.plan, engine.ops.multiply
    forward: set[int] = set()
    # id of a packed weight -> largest number of leading tokens and of others; of one only where all are alike
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

    images = made_images(ROWS, (plan.channels, *plan.image_size)).to(plan.device)
    engine.ops.multiply = recording
    try:
        output, saved = engine.forward(patchify(images, plan.patch_size).to(plan.dtype))
        forward.update(largest)
        for cotangent in _cotangents(output):
            engine.vjp(saved, cotangent)
    finally:
        engine.ops.multiply = multiply
    operands = {}
    for weight, most in largest.items():
        # an operand that none of these images moves keeps scales of its rows
        if min(most) > 0:
            room = ROOM if weight in forward else VJP_ROOM
            lead, rest = _scale(most[0], room), _scale(most[-1], room)
            of_all = len(most) == 2
            operands[weight] = TokenScales(lead, rest, plan.tokens, plan.read) if of_all else TokenScales.uniform(lead)
    return Scales(operands)


def _scale(largest: float, room: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(room * largest / LARGEST, 2.0**-100)))


def made_images(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Return images (count, C, H, W) float32 from the seed: amplitudes that fall as 1/frequency, as photographs' do.

    Contrasts go from flat to twice a normalised photograph's, and every other image is blended with white noise, as
    DAVE's samples are.
    """
    generator = torch.Generator().manual_seed(SEED)
    channels, height, width = shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    spectrum = 1 / frequency.clamp(min=1 / max(height, width))
    spectrum[0, 0] = 0
    # channels of a photograph are alike
    grey, own = (torch.randn(count, c, height, width, generator=generator) for c in (1, channels))
    images = torch.fft.ifft2(torch.fft.fft2(grey + 0.3 * own) * spectrum).real
    images /= images.flatten(1).std(1)[:, None, None, None]
    images *= torch.linspace(0, 2, count)[:, None, None, None]
    images[1::2] = 0.6 * images[1::2] + 0.8 * torch.randn(images[1::2].shape, generator=generator)
    return images


def _cotangents(output: Tensor) -> list[Tensor]:
    """One element of each row's output, another one for each row, and a random direction."""
    generator = torch.Generator().manual_seed(SEED)
    flat = output.reshape(len(output), -1)
    chosen = torch.randint(flat.shape[1], (len(flat), 1), generator=generator).to(flat.device)
    one = torch.zeros_like(flat).scatter_(1, chosen, 1.0)
    any_direction = torch.randn(flat.shape, generator=generator).to(flat)
    return [one.view_as(output), any_direction.view_as(output)]
