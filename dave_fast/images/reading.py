"""Find image files and read them as 8-bit RGB. Needs Pillow only, neither torch nor timm."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dave_fast.errors import ImageError, InputError, TooLargeError, reason_of

# Formats that Pillow recognises but cannot draw without a program or plug-in of its own.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Candidates for the white level of integers and floats, whose range no header declares.
_FULL_SCALES = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}

# How the names of our own pictures end.
OURS = (".overlay.png", ".map.png", ".figure.png")


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a file as 8-bit RGB, turned upright by its EXIF orientation.

    Transparent pixels are shown on white. Animations give their first frame. 16-bit grey is divided by 257;
    32-bit integers and floats are divided by the smallest of 1 (floats only), 255 and 65535 that is no less than their
    maximum, or stretched from minimum to maximum where there is none.

    Raises:
        ImageError: the file cannot be read in full; the message has the path and the reason.
    """
    try:
        # Given a handle, Pillow does not map the file, which garbles rotated TIFFs (seen in Pillow 13.0).
        with open(path, "rb") as file:
            return _decoded(file)
    # Decoders raise errors of many classes (struct.error, SyntaxError, zlib.error, EOFError ...).
    except Exception as error:
        raise ImageError(f"cannot read {os.fspath(path)}: {_reason(error)}.") from error


def decode_image(
    content: bytes, name: str, *, max_pixels: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode the bytes of an image file to 8-bit RGB, as `read_image` does.

    Args:
        content: the file's bytes.
        name: of the image in error messages.
        max_pixels: width × height above which nothing is decoded; None for no limit.
        formats: Pillow's formats that are tried; None for all.

    Raises:
        ImageError: the bytes cannot be read in full.
        TooLargeError: the image has more than max_pixels.
    """
    try:
        return _decoded(io.BytesIO(content), max_pixels, formats)
    except (TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"cannot read {name}: {_reason(error)}.") from error
    except Exception as error:
        raise ImageError(f"cannot read {name}: {_reason(error)}.") from error


def _decoded(file: IO[bytes], max_pixels: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    if file.seek(0, os.SEEK_END) == 0:
        raise ImageError("the file is empty")
    file.seek(0)
    with Image.open(file, formats=formats) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise TooLargeError(f"it has {image.width}×{image.height} pixels; at most {max_pixels} are taken")
        # Decode all pixels here, so that a truncated file raises.
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def _reason(error: Exception) -> str:
    """Return what is wrong with an image file, in words."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it is too large ({error})"
    return reason_of(error)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert a one-channel image of more than eight bits to mode L; Pillow itself would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ImageError("it holds pixels that are not finite (NaN or infinity)")
    low, high = float(values.min()), float(values.max())
    scales = _FULL_SCALES.get(image.mode, (65535.0,))
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)
    if full is None:
        values, full = values - low, (high - low) or 1.0
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def find_images(paths: Iterable[str | os.PathLike[str]], *, skip: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the image files behind paths: files as given, folders searched recursively, in sorted order.

    In folders, the suffix decides; hidden files are left out, and so are the pictures of an earlier run. A file that is
    reached twice is listed once.

    Args:
        paths: files and folders.
        skip: the folder of results, which is not searched.

    Raises:
        InputError: a path does not exist, a folder cannot be listed, or there is no image.
    """
    given = [Path(path) for path in paths]
    found: dict[Path, Path] = {}
    for path in given:
        if not path.exists():
            raise InputError(f"there is no file or folder {path}.")
        for file in sorted(map(Path, walk_images(path, skip=skip))) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    if not found:
        where = ", ".join(map(str, given)) or "nothing was given"
        raise InputError(f"no image to explain ({where}): give image files, or a folder that has some.")
    return list(found.values())


def walk_images(
    folder: str | os.PathLike[str], *, skip: str | os.PathLike[str] | None = None, follow: bool = False
) -> Iterator[str]:
    """Yield the paths of the images in a folder and below, in a reproducible order.

    Args:
        folder: is searched as `find_images` searches folders.
        skip: a folder that is not searched.
        follow: whether symbolic links to folders are followed.

    Raises:
        InputError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {reason_of(error)}.")

    skipped = None if skip is None else Path(skip).resolve()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=follow):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(root, f).resolve() != skipped)
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(OURS) and is_image(name):
                yield os.path.join(root, name)


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image format that this Pillow reads."""
    return os.path.splitext(name)[1].lower() in _suffixes()


@cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case with their dot, of the formats that this Pillow reads."""
    Image.init()
    readable = set(Image.OPEN) - _STUBS
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)
