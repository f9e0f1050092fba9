"""What a TIFF says of its samples, and the layouts that Pillow would read wrongly."""

from __future__ import annotations

from typing import Any

from PIL import ImagePalette
from PIL.TiffImagePlugin import TiffImageFile

from dave_fast.errors import ImageError
from dave_fast.images.pixels import Samples

_FILL_ORDER, _PLANAR, _COLOURS, _EXTRA, _FORMAT, _SUBSAMPLING = 266, 284, 320, 338, 339, 530
_KIND, _PHOTOMETRIC, _BITS, _MAXIMUM = 254, 262, 258, 281
_UNSIGNED, _SIGNED = 1, 2
_WHITE_IS_ZERO, _YCBCR = 0, 6

# Libtiff returns numbers in the machine's order, whatever the file's.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


def read_samples(image: TiffImageFile) -> Samples:
    """Return what a TIFF says of its samples; correct how Pillow is about to decode it, where that would be wrong.

    MaxSampleValue counts as a depth only where it is 2ⁿ - 1: TIFF means it as a statistic, which is any number.

    Args:
        image: opened; if it is loaded, nothing is corrected.

    Raises:
        ImageError: a layout that Pillow would read wrongly.
    """
    tags = image.tag_v2
    depth, signed = _first(tags, _BITS, 1), _first(tags, _FORMAT, _UNSIGNED) == _SIGNED
    # Without tiles it is decoded already.
    if image.tile:
        _check_planes(image, depth)
        _correct(image)
    notes = []
    if tags.get(_KIND, 0) & 1:
        notes.append("its first page is a smaller version of another one, which is not read")
    if _PHOTOMETRIC not in tags:
        notes.append("its file does not say whether 0 is black or white: white is taken")
    if image.mode == "RGBA" and _EXTRA not in tags:
        notes.append("its file does not say what the fourth channel is: transparency is taken")
    most = _first(tags, _MAXIMUM, 0)
    stated = isinstance(most, int) and 255 <= most < 1 << depth and (most & (most + 1)) == 0
    bits = most.bit_length() if stated and depth > 8 and not signed else None
    dtype: str | None = None
    levels: tuple[float, ...] = ()
    if depth == 12:
        bits = 12
    if signed and depth == 8:
        dtype, levels = "int8", (127.0,)
    elif signed and depth == 16:
        levels = (255.0, 32767.0)
    elif depth == 32 and image.mode == "I" and not signed:
        dtype = "uint32"
    inverted = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO and image.mode not in ("1", "L")
    return Samples(depth, bits, levels=levels, dtype=dtype, white_is_zero=inverted, notes=tuple(notes))


def _check_planes(image: TiffImageFile, depth: int) -> None:
    """Refuse layouts in which Pillow takes one sample for another."""
    tags = image.tag_v2
    packed = image.tile[0][0] == "libtiff"
    if _first(tags, _PHOTOMETRIC, 0) == _YCBCR and not packed and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        raise ImageError("it is a TIFF of uncompressed, subsampled YCbCr, which cannot be read; save it as RGB")
    if tags.get(_PLANAR, 1) != 2 or len(image.getbands()) == 1:
        return
    mixed = image.mode in ("LA", "La", "PA", "LAB") or (image.mode == "RGBA" and _EXTRA not in tags)
    if mixed or (not packed and (depth > 8 or tags.get(_FILL_ORDER, 1) == 2)):
        raise ImageError(
            f"it is a TIFF of {depth}-bit {image.mode} in separate planes, which cannot be read; save it with the "
            "channels of a pixel side by side"
        )


def _correct(image: TiffImageFile) -> None:
    """Correct what Pillow would decode wrongly or stumble over."""
    tags = image.tag_v2
    tile: Any = image.tile[0]
    arguments = tile[3]
    if tile[0] == "libtiff" and arguments[0] in _NATIVE:
        # A tuple, or from Pillow 11 a named one.
        make = getattr(type(tile), "_make", tuple)
        tiles: list[Any] = [make((*tile[:3], (_NATIVE[arguments[0]], *arguments[1:])))]
        image.tile = tiles
    if image.mode in ("P", "PA") and max(tags[_COLOURS]) < 256:
        # Some writers give the colours eight bits instead of sixteen.
        image.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLOURS]))
    # Pillow looks for the orientation here and expects bytes.
    xmp = image.info.get("xmp")
    if isinstance(xmp, str):
        image.info["xmp"] = xmp.encode()
    elif xmp is not None and not isinstance(xmp, bytes):
        del image.info["xmp"]


def _first(tags: Any, tag: int, default: int) -> Any:
    """Return the value of a tag, of its first sample where it has one for each."""
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) and value else value
