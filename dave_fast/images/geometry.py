"""Resizing and cropping of photographs for a model, as timm and torchvision do it, with Pillow alone.

timm's own transforms need PyTorch and its models; the processes that read the pictures of a server's clients have
neither. The pixels are the same, bit for bit (tests/images/test_geometry.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from dave_fast.errors import InputError, TooLargeError

# Pixels of a resized photograph, about as many as Pillow takes of a file without a warning; Pillow's bytes of a pixel.
MOST_RESIZED = 89_478_485
PIXEL_BYTES = 4
# Seven weights in float64, as many as Pillow keeps of its widest kernel for each column and row.
_WEIGHT_BYTES = 56
# Rounds the offsets of the crop down: a key of our own beside timm's.
CROP_FLOOR = "crop_floor"
# timm's share of the resized picture that is kept, where a configuration names none.
_CROP_PCT = 0.875


@dataclass(frozen=True)
class Geometry:
    """How a photograph is resized and cropped.

    Attributes:
        size: (H, W) of the crop.
        scaled: (H, W) that the photograph is scaled to.
        mode: timm's: "center" scales until the photograph covers it, "border" until it fits, "squash" each side.
        resample: Pillow's interpolation.
        fill: colour of what lies outside of the photograph.
        floor: whether the offsets of the crop are rounded down, else to even.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    mode: str
    resample: Image.Resampling
    fill: tuple[int, ...]
    floor: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Return the geometry of a `Preprocessing.config`.

        Raises:
            InputError: its interpolation is unknown.
        """
        _, height, width = config["input_size"]
        pct, mode = config.get("crop_pct") or _CROP_PCT, config.get("crop_mode") or "center"
        name = config.get("interpolation", "bilinear")
        try:
            resample = Image.Resampling[name.upper()]
        except KeyError as error:
            known = ", ".join(each.name.lower() for each in Image.Resampling)
            raise InputError(f"the interpolation {name!r} is unknown; expected one of {known}.") from error
        border = mode == "border"
        fill = tuple(round(255 * value) for value in config["mean"][:3]) if border else (0, 0, 0)
        scaled = (math.floor(height / pct), math.floor(width / pct))
        return cls((height, width), scaled, mode, resample, fill, bool(config.get(CROP_FLOOR)))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height of a resized photograph."""
        high, wide = self.scaled
        if self.mode == "squash":
            return wide, high
        if self.mode != "border" and high == wide:
            # torchvision's rounding of the longer side
            return (high, int(high * height / width)) if width <= height else (int(high * width / height), high)
        ratios = height / high, width / wide
        ratio = max(ratios) if self.mode == "border" else min(ratios)
        # Fitted into the model's size, a thin photograph would have no column or row left, which timm raises for.
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def resizing_bytes(self, width: int, height: int, max_pixels: int = MOST_RESIZED) -> int:
        """Return the bytes that resizing takes: the picture resized across, then both ways, and the weights.

        Args:
            width: of the photograph.
            height: of the photograph.
            max_pixels: the most pixels of the photograph resized across, and both ways. The shorter side is scaled to
                the model's size, so that a picture of few pixels, one high and many wide, would become very many.

        Raises:
            TooLargeError: there would be more.
        """
        wide, high = self.resized(width, height)
        if wide * max(height, high) > max_pixels:
            raise TooLargeError(
                f"the image is {width}×{height}: on its way to the model it would be {wide}×{max(height, high)}, and "
                f"at most {max_pixels} pixels are taken; crop it to a shape that is less thin."
            )
        pixels = PIXEL_BYTES * (wide * height + wide * high)
        return pixels + _WEIGHT_BYTES * (max(width, wide) + max(height, high))

    def crop(self, image: Image.Image, max_pixels: int = MOST_RESIZED) -> Image.Image:
        """Return a photograph resized and cropped.

        Args:
            image: RGB.
            max_pixels: as of `resizing_bytes`.

        Raises:
            TooLargeError: the photograph is too thin.
        """
        self.resizing_bytes(*image.size, max_pixels)
        image = image.resize(self.resized(*image.size), self.resample)
        (left, right), (top, bottom) = self._margins(*image.size)
        if max(left, right, top, bottom):
            image = ImageOps.expand(image, (left, top, right, bottom), self.fill)
        height, width = self.size
        left, top = self._offset(*image.size)
        return image.crop((left, top, left + width, top + height))

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of what the crop shows of a photograph, in the photograph's pixels.

        Borders that are added lie outside of the photograph: below 0, or beyond its width and height.

        Args:
            width: of the photograph.
            height: of the photograph.
        """
        wide, high = self.resized(width, height)
        (before, after), (above, below) = self._margins(wide, high)
        left, top = self._offset(wide + before + after, high + above + below)
        across, down = width / wide, height / high
        left, top = left - before, top - above
        return left * across, top * down, (left + self.size[1]) * across, (top + self.size[0]) * down

    def _margins(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the pixels to add at the left and right, and at the top and bottom, of a resized photograph."""
        missing = max(0, self.size[1] - width), max(0, self.size[0] - height)
        across, down = ((each // 2, (each + 1) // 2) for each in missing)
        return across, down

    def _offset(self, width: int, height: int) -> tuple[int, int]:
        """Return left and top of the crop of a resized photograph."""
        left, top = (
            each // 2 if self.floor else round(each / 2) for each in (width - self.size[1], height - self.size[0])
        )
        return left, top
