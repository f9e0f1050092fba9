"""Static scales of e4m3 operands: one power of two for each product's operand, found when an engine is built.

With a scale that is known beforehand, the kernel that makes a number can store it in e4m3 itself; otherwise every
operand is read once more to find its largest number. The walks run once over images made from a fixed seed, so that
scales, and with them every map, depend on the model alone:

    scale = 2^⌈log₂(HEADROOM · max|operand| / 448)⌉

e4m3 is a floating format, so that room above the largest number seen costs nothing until small numbers fall below 2⁻⁶
of the unit: maps of the demo model are the same with a room of 8 and of 32. Photographs stay within twice what these
images show in all products of a trained DINOv2, but cotangents of values, which add up over the queries that look at
one token, went to eight times as much on the demo model's scenes. What lies beyond the room becomes NaN, and the front
end refuses it by name: nothing is cut in silence.

Cotangents are divided by their rows' largest number at the tail and multiplied with it at the end of the walk, so that
the size of a question does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dave_fast.errors import NonFiniteError
from dave_fast.ops.fp8 import LARGEST, Codes
from dave_fast.ops.patches import patchify

if TYPE_CHECKING:
    from dave_fast.engine import Engine

# how far beyond the largest number of the calibration images an operand may go
HEADROOM = 32.0
ROWS, SEED = 8, 0


@dataclass(frozen=True)
class Scales:
    """operands: id of a packed weight -> the scale of what it is multiplied with."""

    operands: dict[int, float]

    def of(self, *weights: Any) -> float | None:
        """Return the one scale for an operand that all of these packed weights read; None where one has none."""
        found = [self.operands.get(id(weight)) for weight in weights]
        return max((scale for scale in found if scale is not None), default=None) if None not in found else None


def calibrate(engine: Engine) -> Scales:
    """Return the scales of an engine's operands, as it finds them when it has none."""
    plan, largest = engine.plan, dict[int, float]()
    multiply = engine.multiply

    def recording(x: Tensor | Codes, weight: Any, *given: Any, **epilogue: Any) -> Any:
        assert isinstance(x, Tensor)
        found = float(x.abs().amax())
        if not math.isfinite(found):
            raise NonFiniteError(
                "the model has NaN or infinity inside for the images that eight-bit scales are found with. Check the "
                "weights, or try precision='bf16'"
            )
        largest[id(weight)] = max(largest.get(id(weight), 0.0), found)
        return multiply(x, weight, *given, **epilogue)

    images = made_images(ROWS, (plan.channels, *plan.image_size)).to(plan.device)
    engine.multiply = recording
    try:
        output, saved = engine.forward(patchify(images, plan.patch_size).to(plan.dtype))
        # where the head reads leading tokens alone, the others' cotangents are thousands of times smaller: no one scale
        # holds both, and they keep scales of their rows
        for cotangent in _cotangents(output) if plan.read == plan.tokens else ():
            engine.vjp(saved, cotangent)
    finally:
        engine.multiply = multiply
    # an operand that none of these images moves keeps scales of its rows
    return Scales({weight: _scale(most) for weight, most in largest.items() if most > 0})


def _scale(largest: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(HEADROOM * largest / LARGEST, 2.0**-100)))


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
