"""A model's preprocessing: resize, crop and normalisation, as timm describes it.

Torch and timm are imported where they are first needed: finding and reading files needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dave_fast.errors import InputError, ModelError
from dave_fast.images.geometry import CROP_FLOOR, MOST_RESIZED, Geometry
from dave_fast.images.reading import as_rgb

if TYPE_CHECKING:
    from torch import Tensor


# A key of our own beside timm's, as CROP_FLOOR is: appends the inverse 1 − x of each channel (B-cos models).
ADD_INVERSE = "add_inverse"
# Why a model's own preprocessing cannot be described, in place of all other keys.
NOT_SUPPORTED = "not_supported"


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of one model: from a photograph to the model's input.

    Attributes:
        size: (H, W) of the input in pixels.
        mean: of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
        transform: PIL RGB to normalised float32 (3, H, W), or (6, H, W) with ADD_INVERSE.
        note: what had to be assumed, or None.
        config: timm's description of the transform, as plain values (see `from_config`).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Callable[[Image.Image], Tensor]
    note: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, image: Image.Image) -> tuple[Tensor, np.ndarray]:
        """Return the model's input, normalised float32 (C, H, W), and the crop that it shows, uint8 (H, W, 3)."""
        crop = self.crop(image)
        return self.normalised(crop), crop

    @cached_property
    def geometry(self) -> Geometry:
        """How a photograph is resized and cropped."""
        return Geometry.from_config(self.config)

    def crop(self, image: Image.Image, *, max_pixels: int = MOST_RESIZED) -> np.ndarray:
        """Return the image resized and cropped, uint8 (H, W, 3): the first half of the transform.

        Args:
            image: the photograph.
            max_pixels: the most pixels of the resized image (`Geometry.resizing_bytes`).

        Raises:
            TooLargeError: the image is too thin.
        """
        return np.array(self.geometry.crop(as_rgb(image), max_pixels))

    def normalised(self, crop: np.ndarray) -> Tensor:
        """Return the input for a crop: `normalised(crop(image))` is bit for bit `transform(image)`.

        For a thin photograph timm's transform raises ValueError in mode "border", and takes memory without end in
        "center".
        """
        from timm.data.transforms import MaybeToTensor
        from torchvision.transforms import Compose, ToTensor

        steps = self.transform.transforms  # type: ignore[attr-defined]
        middle = next(n for n, step in enumerate(steps) if isinstance(step, MaybeToTensor | ToTensor))
        made: Tensor = Compose(steps[middle:])(Image.fromarray(crop))
        return made

    @property
    def channels(self) -> int:
        """Channels of the input: 3, or 6 with ADD_INVERSE."""
        return int(self.config["input_size"][0])

    def pixels(self, inputs: Tensor) -> Tensor:
        """Return the pixels, uint8 (..., H, W, 3), that normalised inputs (..., C, H, W) were made from."""
        import torch

        from dave_fast.transfers import to_device

        planes = inputs.detach()[..., :3, :, :].float()
        # Adding the exact half before cutting undoes the rounding of the normalisation.
        scales = 255 * torch.tensor([self.std[:3], self.mean[:3]], dtype=torch.float64) + torch.tensor([[0.0], [0.5]])
        scale, shift = to_device(scales.float(), planes.device)[..., None, None]
        return torch.addcmul(shift, planes, scale).clamp_(0, 255).byte().movedim(-3, -1)


def preprocessing(model: Any, image_size: Sequence[int] | None = None) -> Preprocessing:
    """Return the preprocessing that a model was trained with, as timm knows it.

    A model in wrappers (see `dave_fast.given.wrappers`) has that of the model, and so has a module of one's own around
    it. Where it normalises its images itself, mean and standard deviation are those that lead to the same input of the
    model: mostly 0 and 1.

    Args:
        model: an nn.Module. Without a `pretrained_cfg`, its own or one inside, it gets ImageNet's mean and standard
            deviation, bicubic resizing, a central crop of 87.5 % (at 224 pixels where its size is unknown), and a note
            that says so.
        image_size: (H, W) of the input; None takes the model's own, else its configuration's.

    Raises:
        InputError: the model takes other channels than red, green and blue (and their inverse).
        ModelError: its preprocessing has a step that is not supported.
    """
    from timm.data.config import resolve_data_config

    model, known, channel_map, note = _described(model)
    config = resolve_data_config(pretrained_cfg=known or {"input_size": (3, 224, 224)})
    config |= {key: True for key in (ADD_INVERSE, CROP_FLOOR) if known.get(key)}
    channels, height, width = config["input_size"]
    # A model may have been made for another size than its configuration names.
    image_size = image_size or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image_size is None and not known:
        image_size = _own_size(model)
    if image_size is not None:
        height, width = (int(side) for side in image_size)
    if channels != (6 if ADD_INVERSE in config else 3):
        raise InputError(f"the model takes {channels} channels; image files are read as 3 (RGB). Use the Python API.")
    config |= {"input_size": (channels, height, width)}
    if channel_map is not None:
        scale, shift = (each.tolist() for each in channel_map)
        # Without a configuration a standard deviation of more than 10 is one of pixels up to 255.
        top = 1 if min(map(abs, scale)) > 0.1 else 255
        config |= (
            _ahead_of(scale, shift, config) if known else {"mean": (0.0,) * channels, "std": (1 / top,) * channels}
        )
        note = note or (None if known else f"the model names no preprocessing: pixels from 0 to {top} are used.")
    elif not known:
        note = f"the model names no preprocessing: that of ImageNet at {height}×{width} is used."
    return from_config(config, note)


def _described(model: Any) -> tuple[Any, Mapping[str, Any], tuple[Tensor, Tensor] | None, str | None]:
    """Return the part of a model that describes its images, what is known of them, their way to it, and a note.

    The way is scale and shift (C,) of a map of each channel; None where the images arrive as they are. Nothing is known
    where no part describes them.

    Raises:
        ModelError: its preprocessing has a step that is not supported.
    """
    from torch import nn

    from dave_fast.given.wrappers import Normalised, unwrapped
    from dave_fast.images.arrival import arrival

    whole = unwrapped(model) if isinstance(model, nn.Module) else model
    part, channel_map = (whole.model, whole.channel_map()) if type(whole) is Normalised else (whole, None)
    known = getattr(part, "pretrained_cfg", None) or {}
    if NOT_SUPPORTED in known:
        raise ModelError(known[NOT_SUPPORTED])
    # A configuration that only lists class names describes no preprocessing.
    if not known.keys().isdisjoint(("input_size", "mean")):
        return part, known, channel_map, None
    found = arrival(whole) if isinstance(whole, nn.Module) else None
    if found is None:
        return part, {}, channel_map, None
    note = f"the model names no preprocessing: that of its part {found.path!r} is used."
    return found.part, found.part.pretrained_cfg, (found.scale, found.shift), note


def _ahead_of(
    scale: Sequence[float], shift: Sequence[float], config: Mapping[str, Any]
) -> dict[str, tuple[float, ...]]:
    """Return mean and standard deviation for images that scale · x + shift maps to those of a configuration."""
    if ADD_INVERSE in config:
        raise InputError(
            "the model normalises images and takes the inverse of their channels: files are not prepared for such "
            "models. Use the Python API."
        )
    std = [s * a for s, a in zip(config["std"], scale, strict=True)]
    mean = [m + s * b for m, s, b in zip(config["mean"], config["std"], shift, strict=True)]
    # constants in float32 are off by 1e-7 of their value
    return {
        "mean": tuple(0.0 if abs(value) < 1e-5 else value for value in mean),
        "std": tuple(1.0 if abs(value - 1) < 1e-5 else value for value in std),
    }


def _own_size(model: Any) -> Sequence[int] | None:
    """Return `image_size` of torchvision's ViT (one side) or of an adapter (H, W) as (H, W)."""
    size = getattr(model, "image_size", None)
    return (size, size) if isinstance(size, int) else size if isinstance(size, tuple | list) else None


def from_config(config: Mapping[str, Any], note: str | None = None) -> Preprocessing:
    """Return the preprocessing of a `Preprocessing.config`, without its model; lists may stand for tuples.

    Raises:
        InputError: its interpolation is unknown.
        ModelError: its mean or standard deviation is none of an image.
    """
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import CenterCrop

    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    channels, height, width = plain["input_size"]
    for name in ("mean", "std"):
        # one number for all channels
        plain[name] = tuple(plain[name]) * (3 if len(plain[name]) == 1 else 1)
        if len(plain[name]) not in (3, channels) or (name == "std" and 0 in plain[name]):
            raise ModelError(f"the model's {name} of pixels is {plain[name]}; expected 3 numbers, of std not zero.")
    known = {key: value for key, value in plain.items() if key not in (ADD_INVERSE, CROP_FLOOR)}
    transform = create_transform(**known, is_training=False)
    if plain.get(CROP_FLOOR):
        steps = transform.transforms
        transform.transforms = [_FloorCrop(step.size) if isinstance(step, CenterCrop) else step for step in steps]
    if plain.get(ADD_INVERSE):
        transform.transforms.append(_with_inverse)
    return Preprocessing((height, width), tuple(plain["mean"]), tuple(plain["std"]), transform, note, plain)


def _with_inverse(pixels: Tensor) -> Tensor:
    """Return (6, H, W) for (3, H, W): r, g, b, 1−r, 1−g, 1−b."""
    import torch

    return torch.cat([pixels, 1 - pixels])


def describe_preprocessing(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: int | tuple[int, int] | None = None,
    interpolation: str = "bicubic",
    crop_floor: bool = False,
) -> dict[str, Any]:
    """Describe a preprocessing as a timm `pretrained_cfg`: resize, central crop, normalisation.

    Args:
        size: (H, W) of the input.
        mean: of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
        resize: pixels of the shorter side; or (H, W), which ignores the aspect ratio; None resizes to `size`.
        interpolation: "bicubic", "bilinear", "nearest", "lanczos" ...
        crop_floor: whether an odd remainder leaves its extra pixel on the right and below, as in Hugging Face's
            processors; torchvision and timm round to even.

    Raises:
        InputError: the crop is larger than the resized image, or timm cannot describe it.
    """
    height, width = size
    if resize is None:
        resize = (height, width)
    squash = not isinstance(resize, int)
    resized = (resize, resize) if isinstance(resize, int) else tuple(resize)
    # timm resizes to floor(size / crop_pct); the added half keeps rounding errors from reaching another integer.
    crop_pct = 1.0 if resized == (height, width) else height / (resized[0] + 0.5)
    if (math.floor(height / crop_pct), math.floor(width / crop_pct)) != resized or crop_pct > 1:
        raise InputError(
            f"images resized to {resized[0]}×{resized[1]} and cropped to {height}×{width}: expected a crop that is no "
            "larger, and of the same shape."
        )
    return {
        "input_size": (3, height, width),
        "mean": tuple(float(value) for value in mean),
        "std": tuple(float(value) for value in std),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": "squash" if squash else "center",
        **({CROP_FLOOR: True} if crop_floor else {}),
    }


@dataclass(frozen=True)
class _FloorCrop:
    """A central crop of `size` (H, W) whose offsets are rounded down."""

    size: tuple[int, int]

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
