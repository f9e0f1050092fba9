"""Photographs as people give them in Python: a path, a URL, bytes, a PIL image, a NumPy array, or a list of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from dave_fast.errors import ImageError, InputError, reason_of
from dave_fast.images.reading import as_rgb, decode_image, read_image

# bytes that are read of a URL
MOST_BYTES = 2**28
_KINDS = "a path, a URL, bytes of an image file, a PIL image or a NumPy array (H, W, 3)"


@dataclass(frozen=True)
class Photograph:
    """A photograph that was given, and can be decoded again.

    Files are not kept: a photograph of many megapixels is larger than its map.

    Attributes:
        name: the path or URL; "" where it has none.
        source: a path, the bytes of a file, or the picture, 8-bit RGB.
        version: size and time of change of the file.
    """

    name: str
    source: str | bytes | Image.Image = field(repr=False)
    version: tuple[int, int] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, given: Any) -> Photograph:
        """Return a photograph that is given in one of the forms of `Picture`.

        Raises:
            InputError: it is something else.
            ImageError: there is no such file, or it cannot be read.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str) and "://" in given:
            return cls(given, _fetched(given))
        if isinstance(given, str | os.PathLike):
            path = os.fspath(given)
            return cls(path, path, _version_of(path))
        if isinstance(given, bytes | bytearray | memoryview):
            return cls("", bytes(given))
        if isinstance(given, Image.Image):
            # its owner may go on to draw on it
            return cls("", as_rgb(given).copy())
        if isinstance(given, np.ndarray):
            return cls("", as_rgb(_from_array(given)))
        raise InputError(f"an image is a {type(given).__name__}; expected {_KINDS}, or a tensor for all of them.")

    def read(self, *, note: Callable[[str], None] | None = None) -> Image.Image:
        """Return it as 8-bit RGB, upright.

        Args:
            note: called with what had to be assumed about it; None to give it as ImageWarning.

        Raises:
            ImageError: it cannot be read, or the file has changed since it was given.
        """
        if isinstance(self.source, Image.Image):
            return self.source
        if isinstance(self.source, bytes):
            return decode_image(self.source, self.name or "the image", note=note)
        if _version_of(self.source) != self.version:
            raise ImageError(f"{self.name} has changed since it was explained: explain it again.")
        return read_image(self.source, note=note)


Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Photograph


def photographs(given: Any) -> list[Photograph]:
    """Return photographs, one or a sequence of them; an array (B, H, W, C) is a sequence.

    Raises:
        InputError: they are something else, or there is none.
        ImageError: one cannot be read.
    """
    if is_one(given):
        return [Photograph.of(given)]
    found = [Photograph.of(each) for each in given]
    if not found:
        raise InputError(f"the list of images is empty; expected one or more of {_KINDS}.")
    return found


def is_one(given: Any) -> bool:
    """Return whether one photograph is given, and no sequence."""
    if isinstance(given, np.ndarray):
        return given.ndim != 4
    return not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray | memoryview)


def _version_of(path: str) -> tuple[int, int]:
    """Return size and time of change of a file."""
    try:
        found = os.stat(path)
    # a name with NUL is no name for the system
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read {path}: {reason_of(error)}.") from error
    return found.st_size, found.st_mtime_ns


def _fetched(url: str) -> bytes:
    """Return the bytes behind a URL that fsspec knows."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read(MOST_BYTES + 1)
    # each file system of fsspec raises errors of its own
    except Exception as error:
        raise ImageError(f"cannot read {url}: {reason_of(error)}.") from error
    if len(content) > MOST_BYTES:
        raise ImageError(f"cannot read {url}: it has more than {MOST_BYTES} bytes.")
    return content


def _from_array(pixels: np.ndarray) -> Image.Image:
    """Return an array of pixels as a picture.

    Args:
        pixels: (H, W) or (H, W, 1), grey; (H, W, 3), RGB; (H, W, 4), RGBA; uint8, or floating point in [0, 1]. Grey may
            be uint16, too.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in pixels.shape:
        moved = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        hint = ": move the channels to the end, np.moveaxis(x, 0, -1)" if moved else ""
        raise InputError(
            f"an array has the shape {pixels.shape}; expected pixels (H, W), (H, W, 3) or (H, W, 4){hint}."
        )
    pixels = pixels[..., 0] if channels == 1 and pixels.ndim == 3 else pixels
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"an array of {pixels.dtype} holds values from {low:.4g} to {high:.4g}; expected pixels in [0, 1], or "
                "uint8 from 0 to 255. An input that is normalised already is given as a tensor (B, C, H, W)."
            )
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8 and not (pixels.dtype == np.uint16 and channels == 1):
        raise InputError(f"an array holds {pixels.dtype}; expected uint8, or floating point in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(pixels))
