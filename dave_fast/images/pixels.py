"""Convert a decoded picture of any of Pillow's modes to 8-bit RGB: depth, polarity and transparency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dave_fast.errors import ImageError

# The largest number of a sample of sixteen bits, which is white where a file says nothing else.
SIXTEEN = 65535
# Below this share of white, the largest sample of a picture makes one doubt what is white.
_DARK = 1 / 4
# Candidates for the white level of integers and floats, whose range no header declares.
_LEVELS = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


@dataclass(frozen=True)
class Samples:
    """What a file says of its samples beyond Pillow's mode.

    Attributes:
        depth: bits of a sample in the file; matters above eight.
        bits: the number of bits that the file says are used, or None.
        left: whether these are the upper ones of the depth, as PNG demands, which some writers do not heed.
        levels: candidates for the sample that is white, where the format does not say; empty for those of the mode.
        dtype: the numpy type of the samples, where Pillow took them for another of the same size.
        white_is_zero: whether a large sample is dark, and Pillow has not turned it round.
        transparent: the sample or the colour that is transparent, in the file's own depth.
        opaque: whether the alpha channel means nothing.
        notes: what had to be assumed.
    """

    depth: int = 8
    bits: int | None = None
    left: bool = False
    levels: tuple[float, ...] = ()
    dtype: str | None = None
    white_is_zero: bool = False
    transparent: tuple[int, ...] | None = None
    opaque: bool = False
    notes: tuple[str, ...] = ()


def to_rgb(
    image: Image.Image,
    samples: Samples | None = None,
    deep: Callable[[], np.ndarray | None] = lambda: None,
) -> tuple[Image.Image, list[str]]:
    """Convert a picture to RGB, with its transparent pixels on white.

    Samples of sixteen bits are divided by 257. Where a file says that it uses n bits (`Samples.bits`), they are
    divided by what makes 2ⁿ - 1 white. Other integers and floats are divided by the smallest of 1 (floats only), 255
    and 65535 that is no less than their maximum, or stretched from minimum to maximum where there is none.

    A picture of sixteen bits that uses only the lower fourteen or fewer is read as its format says, with a note: a
    night scene and a radiograph of twelve bits look alike here, and to brighten the first would be as wrong as
    to leave the second dark. A picture of one value has nothing to brighten, and one that was made of eight bits is
    known to be dark: they get no note.

    Args:
        image: decoded.
        samples: what its file says; None for nothing.
        deep: returns all sixteen bits of the samples that Pillow cut to eight, (H, W, channels), colours first; or
            None where they cannot be had.

    Returns:
        The picture, and what had to be assumed, in sentences without a full stop.

    Raises:
        ImageError: pixels are not finite.
    """
    samples = samples or Samples()
    notes = list(samples.notes)
    image, clear = _without_key(image, samples, deep)
    if image.mode[0] in "IF" or samples.dtype:
        grey, note = _eight_bits(_values(image, samples), _levels(image, samples), samples)
        image, notes = Image.fromarray(grey), notes + note
    elif samples.depth > 8 and samples.bits != samples.depth:
        image, note = _relevelled(image, samples, deep)
        notes += note
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.has_transparency_data and not samples.opaque:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if clear is not None:
        image.paste((255, 255, 255), mask=Image.fromarray(clear))
    return image, notes


def _without_key(
    image: Image.Image, samples: Samples, deep: Callable[[], np.ndarray | None]
) -> tuple[Image.Image, np.ndarray | None]:
    """Return the image without its transparent sample or colour, and where it was, (H, W) bool; None for nowhere."""
    key = samples.transparent
    if key is None and image.mode != "P" and "transparency" in image.info:
        given = image.info["transparency"]
        key = tuple(given) if isinstance(given, tuple) else (given,)
    if key is None or image.mode not in ("1", "L", "I", "I;16", "I;16B", "RGB"):
        return image, None
    image = image.copy()
    image.info.pop("transparency", None)
    values = deep() if samples.depth > 8 and image.mode == "RGB" else np.asarray(image)
    if values is None:
        raise ImageError("its transparent colour has more bits than can be read")
    # Bits of the key beyond the depth are not used. Pillow spreads two and four bits over eight.
    wanted = [each & ((1 << samples.depth) - 1) for each in key]
    wanted = [bool(each) if image.mode == "1" else each * {2: 85, 4: 17}.get(samples.depth, 1) for each in wanted]
    return image, (values.reshape(*values.shape[:2], -1) == wanted).all(axis=2)


def _values(image: Image.Image, samples: Samples) -> np.ndarray:
    values = np.asarray(image)
    if samples.dtype:
        values = values.astype(values.dtype.newbyteorder("="), copy=False).view(samples.dtype)
    return values


def _levels(image: Image.Image, samples: Samples) -> tuple[float, ...]:
    """Return the candidates for white."""
    return samples.levels or _LEVELS.get(image.mode, (SIXTEEN,))


def _eight_bits(
    values: np.ndarray, levels: tuple[float, ...], samples: Samples, colours: int = 1
) -> tuple[np.ndarray, list[str]]:
    """Scale samples to 0..255.

    Args:
        values: (H, W) or (H, W, channels).
        levels: candidates for white.
        samples: what the file says.
        colours: channels that count for the maximum; the others are alpha, which always uses all bits.
    """
    counted = values[..., :colours] if values.ndim == 3 else values
    low, high = float(counted.min()), float(counted.max())
    if not np.isfinite([low, high]).all():
        raise ImageError("it holds pixels that are not finite (NaN or infinity)")
    white, note = _white(counted, low, high, levels, samples)
    black = 0.0
    if white is None:
        black, white = low, high if high > low else low + 1
    factors = np.full(values.shape[-1] if values.ndim == 3 else 1, 255 / levels[0])
    factors[:colours] = 255 / (white - black)
    # Single precision holds sixteen bits exactly. In place, since copies of a large picture are its memory.
    real: np.ndarray = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    real -= black
    real *= factors.astype(real.dtype)
    eight = np.clip(np.rint(real, out=real), 0, 255, out=real).astype(np.uint8)
    return (255 - eight if samples.white_is_zero else eight), note


def _white(
    values: np.ndarray | None, low: float, high: float, levels: tuple[float, ...], samples: Samples
) -> tuple[float | None, list[str]]:
    """Return the sample that is white, None where the samples are to be stretched, and a note on a doubtful choice."""
    bits = samples.bits
    if values is not None and bits is not None and low >= 0 and high < 1 << bits and not _spread(values, samples):
        return float((1 << bits) - 1), []
    white = next((level for level in levels if low >= 0 and high <= level), None)
    if bits is not None or low == high:
        return white, []
    held = f"its samples run from {low:g} to {high:g}"
    if white is None:
        return None, [
            f"{held}, and its file does not say which of them is white: they are stretched, from black at the least to "
            "white at the greatest. To choose otherwise, give it as 8 or 16 bits"
        ]
    if white > 1 and high < white * _DARK and not (samples.depth == 16 and _from_eight_bits(values)):
        if samples.depth != 16:
            return white, [
                f"{held}, and its file does not say which of them is white: {white:g} is taken, so that it is dark. To "
                "choose otherwise, give it as 8 or 16 bits"
            ]
        return white, [
            f"{held}, as data of {int(high).bit_length()} bits would. It is read as its format says, with white at "
            f"{white:g}, so that it is dark. If it should be brighter, scale its samples to 16 bits, or state their "
            "depth in the file (sBIT of a PNG, MaxSampleValue of a TIFF)"
        ]
    return white, []


def _from_eight_bits(values: np.ndarray | None) -> bool:
    """Return whether samples of sixteen bits were made of eight, and so have the format's white."""
    return values is not None and any(bool((values % factor == 0).all()) for factor in (256, 257))


def _spread(values: np.ndarray, samples: Samples) -> bool:
    """Return whether the file puts its bits at the upper end of the depth, and these samples can be such."""
    rest = (1 << (samples.depth - (samples.bits or samples.depth))) - 1
    # To spread a small number is to move it up; rounding may add one, where there is more than one bit to fill.
    return samples.left and bool(((values & rest) <= (rest > 1)).all())


def _relevelled(
    image: Image.Image, samples: Samples, deep: Callable[[], np.ndarray | None]
) -> tuple[Image.Image, list[str]]:
    """Return a picture that Pillow cut to eight bits, with white where its file says, and a note where it is dark."""
    colours = len(image.getbands()) - ("A" in image.getbands())
    upper = np.asarray(image)
    upper = upper.reshape(*upper.shape[:2], -1)[..., :colours]
    # The upper byte from which all sixteen bits are surely in use.
    bright = 256 * _DARK if samples.bits is None else (1 << samples.bits) / 256
    if image.mode not in ("L", "RGB", "RGBA") or upper.max() >= bright:
        return image, []
    values = deep()
    if values is None:
        # What Pillow left is enough for the note.
        low, high = int(upper.min()) << 8, int(upper.max()) << 8 | 255
        return image, _white(None, low, high, (SIXTEEN,), samples)[1]
    eight, note = _eight_bits(values, (SIXTEEN,), samples, colours)
    return Image.fromarray(eight), note
