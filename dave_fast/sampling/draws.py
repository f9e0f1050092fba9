"""The draws of the method: the transformations τ_s, the noise levels t_s and the keys of the noise ε_s.

Sample s of an image is a function of (seed, image key, s) alone (and of the total number of samples for
schedule="paper"), so that the perturbations are the same for any split into batches, any order and any backend. No
generator of torch is read or set.

    key       splitmix64(seed xor splitmix64(image key)), low word then high word
    counter   (block, sample, stream, 0)
    stream 0  blocks 0 and 1: flip, angle, scale, x-translation, y-translation
    stream 1  the noise, block e div 4 for element e
    stream 2  block 0 of sample 0: the shift of the schedule

Seeds and image keys are any integers, taken modulo 2⁶⁴. Source: DAVE, arXiv 2602.06613, Eq. 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.sampling.philox import WORD, philox4x32, splitmix64, uniform
from dave_fast.transfers import moved

SCHEDULES = ("sequence", "paper")
# Stream 1 is the noise's: `philox.normal`.
TRANSFORM_STREAM, SCHEDULE_STREAM = 0, 2


def _require(condition: bool, what: str, given: object) -> None:
    if not condition:
        raise InputError(f"{what}; got {given!r}")


def _is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Return whether a value is a finite number, not a bool, from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and least <= value <= most  # type: ignore[operator]


@dataclass(frozen=True)
class Sampling:
    """The settings of the perturbations.

    Attributes:
        noise_alpha: largest t, in [0, 1]; the input keeps the share 1 - t and gets noise of √(1 - (1 - t)²).
            Explainers do not use this default (see `dave_fast.explain.noise_level`).
        schedule: "sequence" (t_s = α·v_s, v a shifted van der Corput sequence: the first S samples are spread evenly
            for any S) or "paper" (t_s = s·α/(S - 1)).
        rotation: largest angle in degrees.
        scale: smallest and largest zoom.
        translation: largest shift as a share of the width and of the height.
        flip: probability of a horizontal flip.
    """

    noise_alpha: float = 0.5
    schedule: str = "sequence"
    rotation: float = 20.0
    scale: tuple[float, float] = (0.9, 1.1)
    translation: float = 0.1
    flip: float = 0.5

    def __post_init__(self) -> None:
        _require(_is_number(self.noise_alpha, 0, 1), "noise_alpha must be in [0, 1]", self.noise_alpha)
        _require(self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}", self.schedule)
        _require(_is_number(self.rotation, 0), "rotation must be an angle ≥ 0 in degrees", self.rotation)
        pair = isinstance(self.scale, tuple | list) and len(self.scale) == 2 and all(map(_is_number, self.scale))
        ordered = pair and 0 < self.scale[0] <= self.scale[1]
        _require(ordered, "scale must be (smallest, largest) with 0 < smallest ≤ largest", self.scale)
        _require(_is_number(self.translation, 0), "translation must be a share ≥ 0", self.translation)
        _require(_is_number(self.flip, 0, 1), "flip must be a probability in [0, 1]", self.flip)


# The fields of Draws: dtype, and shape of a row.
ROWS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "image_index": (torch.int64, ()),
    "matrices": (torch.float64, (2, 3)),
    "signal": (torch.float64, ()),
    "noise": (torch.float64, ()),
    "keys": (torch.int64, (2,)),
    "samples": (torch.int64, ()),
}


@dataclass(frozen=True, eq=False)
class Draws:
    """R perturbations, one a row, on the CPU until `to` moves them together; `draws[start:stop]` is a Draws again.

    Attributes:
        image_index: (R,) int64, which image of the batch.
        matrices: (R, 2, 3) float64, destination → source, in pixels, the flip composed in.
        signal: (R,) float64, 1 - t.
        noise: (R,) float64, √(1 - (1 - t)²).
        keys: (R, 2) int64, Philox key words, low and high, each below 2³².
        samples: (R,) int64, the sample's number, word 1 of the Philox counter.

    Raises:
        TypeError: a field is no tensor, or one of another dtype.
        InputError: the fields have other shapes, or are on several devices.
    """

    image_index: Tensor
    matrices: Tensor
    signal: Tensor
    noise: Tensor
    keys: Tensor
    samples: Tensor

    def __post_init__(self) -> None:
        self.check()

    def __len__(self) -> int:
        return len(self.signal)

    def __getitem__(self, rows: slice | Tensor) -> Draws:
        return Draws(*(tensor[rows] for tensor in self.tensors()))

    def check(self) -> None:
        """Raise TypeError or InputError where the tensors do not fit each other; no value is read."""
        tensors = self.tensors()
        for tensor, (name, (dtype, _)) in zip(tensors, ROWS.items(), strict=True):
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"draws.{name} must be a tensor of {dtype}; got {kind}")
        rows = self.signal.shape[:1]
        if not rows or any(
            tensor.shape != rows + shape for tensor, (_, shape) in zip(tensors, ROWS.values(), strict=True)
        ):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise InputError(f"draws must have the shapes that dave_fast.sampling.Draws documents; got {shapes}")
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise InputError(f"draws must be on one device; got {', '.join(sorted(map(str, devices)))}")

    def tensors(self) -> list[Tensor]:
        """Return the six tensors in the order of the fields."""
        return [getattr(self, name) for name in ROWS]

    def to(self, device: torch.device) -> Draws:
        """Return the same draws on a device; a GPU gets them in one asynchronous copy."""
        return Draws(*moved(self.tensors(), torch.device(device)))


def draw(
    n_samples: int,
    *,
    height: int,
    width: int,
    seed: int = 0,
    image_keys: Sequence[int] = (0,),
    first_sample: int = 0,
    sampling: Sampling | None = None,
    schedule_length: int | None = None,
) -> Draws:
    """Return the perturbations of samples first_sample … first_sample + n_samples - 1 of every image.

    Args:
        n_samples: number of samples an image.
        height: of the images in pixels.
        width: of the images in pixels.
        seed: any integer.
        image_keys: one integer an image; equal keys get equal draws.
        first_sample: number of the first sample.
        sampling: settings; None for the defaults.
        schedule_length: the total number of samples S; schedule="paper" needs it where first_sample > 0, and takes
            n_samples where it is None.

    Returns:
        len(image_keys)·n_samples rows, image-major.

    Raises:
        InputError: a number is outside of its range.
    """
    sampling = Sampling() if sampling is None else sampling
    _require(isinstance(n_samples, int) and n_samples >= 1, "n_samples must be an integer ≥ 1", n_samples)
    _require(isinstance(first_sample, int) and first_sample >= 0, "first_sample must be an integer ≥ 0", first_sample)
    _require(first_sample + n_samples <= 2**32, "samples are numbered below 2³²", first_sample + n_samples)
    _require(height >= 1 and width >= 1, "height and width must be ≥ 1", (height, width))
    _require(len(image_keys) >= 1, "image_keys must hold one integer an image", image_keys)

    one_image = torch.arange(first_sample, first_sample + n_samples)
    samples = one_image.repeat(len(image_keys))
    image_index = torch.arange(len(image_keys)).repeat_interleave(n_samples)
    keys = _philox_keys(seed, image_keys)[image_index]
    of_transform, shift = _uniforms(samples, keys)
    if sampling.schedule == "paper":
        length = _length(n_samples, first_sample, schedule_length)
        t = samples.double() * sampling.noise_alpha / max(length - 1, 1)
    else:
        t = sampling.noise_alpha * ((_van_der_corput(one_image).repeat(len(image_keys)) + shift) % 1.0)
    # t·(2 - t) = 1 - (1 - t)² without the cancellation.
    return Draws(
        image_index, _matrices(of_transform, height, width, sampling), 1 - t, (t * (2 - t)).sqrt(), keys, samples
    )


def identity(n_images: int) -> Draws:
    """Return one unperturbed row an image: no warp, t = 0."""
    _require(isinstance(n_images, int) and n_images >= 1, "n_images must be an integer ≥ 1", n_images)
    return Draws(
        image_index=torch.arange(n_images),
        matrices=torch.eye(2, 3, dtype=torch.float64).repeat(n_images, 1, 1),
        signal=torch.ones(n_images, dtype=torch.float64),
        noise=torch.zeros(n_images, dtype=torch.float64),
        keys=torch.zeros(n_images, 2, dtype=torch.int64),
        samples=torch.zeros(n_images, dtype=torch.int64),
    )


def join(parts: Sequence[Draws]) -> Draws:
    """Return the rows of several draws, one after the other; all rows of part i are assigned to image i."""
    _require(len(parts) >= 1, "parts must hold draws", parts)
    index = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    others = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Draws)[1:])
    return Draws(index, *others)


def _philox_keys(seed: int, image_keys: Sequence[int]) -> Tensor:
    mixed = [splitmix64((int(seed) ^ splitmix64(int(key))) & 0xFFFFFFFFFFFFFFFF) for key in image_keys]
    return torch.tensor([(value & WORD, value >> 32) for value in mixed], dtype=torch.int64)


def _uniforms(samples: Tensor, keys: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the five numbers of each row's transformation, and its image's of the schedule; each (R,), in (0, 1)."""
    # all counters at once: the tensors are so short that calls are what takes time
    blocks, streams = torch.tensor([[0, TRANSFORM_STREAM], [1, TRANSFORM_STREAM], [0, SCHEDULE_STREAM]]).T[..., None]
    numbers = torch.stack([samples, samples, torch.zeros_like(samples)])
    words = philox4x32((blocks, numbers, streams, 0), (keys[:, 0], keys[:, 1]))
    first, *others = (uniform(word) for word in words)
    return [first[0], *(word[0] for word in others), first[1]], first[2]


def _length(n_samples: int, first_sample: int, schedule_length: int | None) -> int:
    if schedule_length is None:
        _require(first_sample == 0, "schedule='paper' needs schedule_length, the total S, when first_sample > 0", None)
        return n_samples
    enough = isinstance(schedule_length, int) and schedule_length >= first_sample + n_samples
    _require(
        enough, f"schedule_length must be an integer ≥ {first_sample + n_samples}, the last sample", schedule_length
    )
    return schedule_length


def _van_der_corput(samples: Tensor) -> Tensor:
    """Return the base-2 van der Corput sequence: the 32 bits of a sample's number, reversed, as a fraction."""
    for width in (1, 2, 4, 8, 16):
        # of each pair of neighbours of `width` bits the lower one
        lower = WORD // (2**width + 1)
        samples = ((samples >> width) & lower) | ((samples & lower) << width)
    return samples.double() * 2.0**-32


def _matrices(uniforms: Sequence[Tensor], height: int, width: int, sampling: Sampling) -> Tensor:
    """Return destination → source matrices (R, 2, 3): the inverse of q = m + T + s·R(θ)·F·(p - m).

    m is the image's centre, F the flip, R counter-clockwise as seen on screen, where y points down.
    """
    flip, angle, zoom, shift_x, shift_y = uniforms
    # libm, one angle at a time: a vectorised cosine may round differently at the ends of a tensor.
    angles = ((2 * angle - 1) * math.radians(sampling.rotation)).tolist()
    cos = torch.tensor([math.cos(a) for a in angles], dtype=torch.float64)
    sin = torch.tensor([math.sin(a) for a in angles], dtype=torch.float64)
    smallest, largest = sampling.scale
    scale = smallest + (largest - smallest) * zoom
    mirror = torch.where(flip < sampling.flip, -1.0, 1.0).double()

    linear = torch.stack([mirror * cos, -mirror * sin, sin, cos], dim=-1).view(-1, 2, 2) / scale[:, None, None]
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    size = torch.tensor([width, height], dtype=torch.float64)
    moved = centre + (2 * torch.stack([shift_x, shift_y], dim=-1) - 1) * sampling.translation * size
    offset = torch.stack(
        [
            centre[0] - (linear[:, 0, 0] * moved[:, 0] + linear[:, 0, 1] * moved[:, 1]),
            centre[1] - (linear[:, 1, 0] * moved[:, 0] + linear[:, 1, 1] * moved[:, 1]),
        ],
        dim=-1,
    )
    return torch.cat([linear, offset[:, :, None]], dim=-1)
