"""Read image files as 8-bit RGB. Needs Pillow only, neither torch nor timm."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.IcnsImagePlugin import IcnsImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from dave_fast.errors import ImageError, ImageWarning, TooLargeError, reason_of
from dave_fast.files import open_file
from dave_fast.images import png, tiff
from dave_fast.images.finding import readable_formats, stub_format
from dave_fast.images.pixels import Samples, to_rgb

T = TypeVar("T")
# Pillow reads the header of a PNM file a byte at a time: 0.2 to 0.4 s for each megabyte of comments
_PNM_HEADER = 1 << 16

# EXIF's tag of the orientation, and what turns a picture upright.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# How Pillow reads the lower eight of sixteen bits, or all sixteen as two channels, where it would read the upper ones.
_OTHER_BYTES = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B",
    "LA;16B": "RGBA",
}


def read_image(path: str | os.PathLike[str], *, note: Callable[[str], None] | None = None) -> Image.Image:
    """Read a file as 8-bit RGB, turned upright by its EXIF or XMP orientation.

    Transparent pixels are shown on white. Animations give their first frame. Samples of more than eight bits are
    scaled as `dave_fast.images.pixels.to_rgb` says. Colour profiles are not applied.

    Args:
        path: the file.
        note: called with each remark on what had to be assumed, such as what is white; None to give them as
            ImageWarning.

    Raises:
        ImageError: the file cannot be read in full; the message has the path and the reason.
    """
    notes: list[str] = []
    try:
        # Given a handle, Pillow does not map the file, which garbles rotated TIFFs (seen in Pillow 13.0).
        with open_file(path) as file:
            image = _decoded(file, notes)
    # Decoders raise errors of many classes (struct.error, SyntaxError, zlib.error, EOFError ...).
    except Exception as error:
        raise ImageError(f"cannot read {os.fspath(path)}: {_reason(error)}.") from error
    _tell(notes, os.fspath(path), note)
    return image


def decode_image(
    content: bytes,
    name: str,
    *,
    max_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
    note: Callable[[str], None] | None = None,
) -> Image.Image:
    """Decode the bytes of an image file to 8-bit RGB, as `read_image` does.

    Args:
        content: the file's bytes.
        name: of the image in error messages.
        max_pixels: width × height above which nothing is decoded; None for no limit.
        formats: Pillow's formats that are tried; None for all that it reads itself, without a program of others.
        note: as of `read_image`.

    Raises:
        ImageError: the bytes cannot be read in full.
        TooLargeError: the image has more than max_pixels.
    """
    notes: list[str] = []
    image = _read_bytes(content, name, lambda file: _decoded(file, notes, max_pixels, formats))
    _tell(notes, name, note)
    return image


def _read_bytes(content: bytes, name: str, read: Callable[[IO[bytes]], T]) -> T:
    try:
        return read(io.BytesIO(content))
    except (TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"cannot read {name}: {_reason(error)}.") from error
    except Exception as error:
        raise ImageError(f"cannot read {name}: {_reason(error)}.") from error


def decoding_bytes(
    content: bytes, name: str, *, max_pixels: int | None = None, formats: tuple[str, ...] | None = None
) -> tuple[int, int, int]:
    """Return the width and height of an image file, and the bytes that `decode_image` needs, as its header says.

    The arguments and errors are those of `decode_image`.
    """

    def look(file: IO[bytes]) -> tuple[int, int, int]:
        with _opened(file, max_pixels, formats) as (image, _, _):
            return *image.size, image.width * image.height * _pixel_bytes(image)

    return _read_bytes(content, name, look)


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Return where a picture is not black, (H, W) bool, upright; a number counts however small it is beside white.

    Raises:
        ImageError: the file cannot be read in full.
    """
    try:
        with open_file(path) as file, _open(png.read_header(file)[1], None) as image:
            image.load()
            if image.mode[0] in "IF":
                turn = _TURNS.get(_orientation(image, []))
                marked = Image.fromarray(np.asarray(image) != 0)
                return np.asarray(marked if turn is None else marked.transpose(turn))
    except Exception as error:
        raise ImageError(f"cannot read {os.fspath(path)}: {_reason(error)}.") from error
    return np.asarray(read_image(path)).max(axis=2) > 0


def as_rgb(image: Image.Image, *, note: Callable[[str], None] | None = None) -> Image.Image:
    """Return a picture that somebody opened with Pillow as `read_image` would return its file.

    Args:
        image: of any mode. Of what its file said of the samples, only what Pillow keeps is known.
        note: as of `read_image`.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    notes: list[str] = []
    try:
        image = _inside(image)
        result = _finished(image, _samples(image, None), notes)
    except Exception as error:
        raise ImageError(f"cannot read the picture: {_reason(error)}.") from error
    _tell(notes, "the picture", note)
    return result


def _tell(notes: list[str], name: str, note: Callable[[str], None] | None) -> None:
    for each in notes:
        text = f"{name}: {each}."
        if note is None:
            warnings.warn(text, ImageWarning, stacklevel=3)
        else:
            note(text)


def _decoded(
    file: IO[bytes], notes: list[str], max_pixels: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    with _opened(file, max_pixels, formats) as (image, header, file):
        samples = _samples(image, header, file)
        if header and header.colour == png.PALETTE and header.transparency is not None:
            # Pillow takes some tables of transparency for a single transparent entry.
            image.info["transparency"] = header.transparency
        other = _other_bytes(image)
        return _finished(image, samples, notes, lambda: _deep(file, formats, other, image))


@contextmanager
def _opened(
    file: IO[bytes], max_pixels: int | None, formats: tuple[str, ...] | None
) -> Iterator[tuple[Image.Image, png.Header | None, IO[bytes]]]:
    """Open a picture of at most max_pixels without decoding it; yield it, a PNG's header, and the file that it has."""
    if file.seek(0, os.SEEK_END) == 0:
        raise ImageError("the file is empty")
    header, file = png.read_header(file)
    with _open(file, formats) as opened:
        image = _inside(opened)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise TooLargeError(f"it has {image.width}×{image.height} pixels; at most {max_pixels} are taken")
        yield image, header, file


def _open(file: IO[bytes], formats: tuple[str, ...] | None) -> ImageFile:
    """Open a picture of some formats, or None for all that Pillow reads itself: for EPS it starts Ghostscript."""
    _check_pnm_header(file)
    try:
        return Image.open(file, formats=readable_formats() if formats is None else formats)
    except UnidentifiedImageError as error:
        file.seek(0)
        if found := stub_format(file.read(16)):
            raise ImageError(f"it is {found}, which is not read here; save it as PNG") from error
        raise


def _check_pnm_header(file: IO[bytes]) -> None:
    """Raise ImageError where the header of a PNM file, its comments among it, goes on beyond 64 KiB."""
    file.seek(0)
    head = file.read(_PNM_HEADER)
    file.seek(0)
    if len(head) < _PNM_HEADER or head[:1] != b"P" or head[1:2] not in b"0123456fy":
        return
    # the magic number (Pillow's own begin with P0 and Py), width and height; and but for bitmaps the largest value
    numbers = 3 if head[1:2] in b"14" else 4
    if len(re.sub(rb"#[^\r\n]*", b" ", head).split(maxsplit=numbers)) < numbers:
        raise ImageError("its header takes more than 64 KiB; save it without the comments")


def _pixel_bytes(image: Image.Image) -> int:
    """Return the bytes of a pixel that decoding takes at its peak, measured (tests/images/test_decoding_memory.py)."""
    decoders = [tile[0] for tile in getattr(image, "tile", [])]
    alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA")
    if _other_bytes(image) is not None:
        # Read twice where it is dark or has a transparent colour, then scaled in single precision.
        return 45 if alpha else 37
    if image.mode[0] in "IF":
        return 13 if image.mode.startswith("I;16") else 21
    if image.format == "WEBP":
        # Beside the picture, two canvases of the decoder.
        return 26 if alpha else 18
    most = 8 if len(image.getbands()) > 1 else 6
    if alpha or "transparency" in image.info:
        most = 17 if most == 8 else 13
    if _orientation(image, []) in _TURNS:
        most = max(most, 12)
    # These keep what they have read of a file, as coefficients and as text.
    if image.info.get("progressive"):
        return max(most, 12)
    return 15 if any(each.startswith("ppm") for each in decoders) else most


def _inside(image: Image.Image) -> Image.Image:
    """Return the picture inside an icon, of whose palette and transparency Pillow hands on a part only."""
    if isinstance(image, IcoImageFile):
        return image.ico.getimage(image.size)
    if isinstance(image, IcnsImageFile):
        return image.icns.getimage(image.best_size)
    return image


def _finished(
    image: Image.Image,
    samples: Samples,
    notes: list[str],
    deep: Callable[[], np.ndarray | None] = lambda: None,
) -> Image.Image:
    """Decode, convert and turn a picture."""
    # Decode all pixels here, so that a truncated file raises.
    image.load()
    result, found = to_rgb(image, samples, deep)
    notes += found
    if isinstance(image, GifImageFile):
        result = _on_background(image, result)
    turn = _TURNS.get(_orientation(image, notes))
    result = result if turn is None else result.transpose(turn)
    # What the file said of orientation and transparency has been heeded, and must not be again.
    result.info.clear()
    return result


def _orientation(image: Image.Image, notes: list[str]) -> Any:
    """Return the orientation that is left to apply: Pillow turns TIFFs itself."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        # A number in one byte is bytes for Pillow.
        return value[0] if isinstance(value, bytes) and len(value) == 1 else value
    # A block of EXIF that is cut off or no EXIF raises errors of many classes.
    except Exception as error:
        notes.append(f"its EXIF data cannot be read ({reason_of(error)}): it is taken to be upright")
        return 1


def _samples(image: Image.Image, header: png.Header | None, file: IO[bytes] | None = None) -> Samples:
    """Return what a file says of its samples beyond Pillow's mode.

    Args:
        image: opened; may be loaded, and then less is known.
        header: of a PNG.
        file: the file, or None.
    """
    if isinstance(image, TiffImageFile):
        return tiff.read_samples(image)
    if header is not None and image.format == "PNG":
        return header.samples()
    # A picture that no file was opened for has no tiles.
    decoders = [(tile[0], *_arguments(tile)) for tile in getattr(image, "tile", [])]
    arguments = [each for decoder in decoders for each in decoder]
    if image.format == "PPM" and image.mode == "I" and decoders:
        # Pillow scales what the file says is white to 65535.
        most = 65535 if decoders[0][0] == "raw" else decoders[0][-1]
        return Samples(16, None if most == 65535 else 16, levels=(65535.0,))
    if image.format == "FITS" and image.mode == "I;16":
        return Samples(16, dtype="int16", levels=(255.0, 32767.0))
    if image.format == "TGA" and image.mode == "RGBA" and file is not None:
        file.seek(17)
        return Samples(opaque=file.read(1)[0] & 15 == 0)
    notes: tuple[str, ...] = ()
    if image.format == "PNG" and not decoders and image.mode in ("L", "RGB") and "transparency" in image.info:
        notes = (
            "of its transparent colour it is no longer known how many bits it has: eight are taken. Give the file",
        )
    deep = image.mode.startswith("I;16") or "SGI16" in arguments or any(";16" in str(each) for each in arguments)
    depths = [bits for mode, bits in (("1", 1), ("L;2", 2), ("L;4", 4)) if mode in arguments]
    return Samples(16 if deep else min(depths, default=8), notes=notes)


def _arguments(tile: Any) -> tuple[Any, ...]:
    """Return the arguments of the decoder of a tile, Pillow's (decoder, extents, offset, arguments)."""
    return tile[3] if isinstance(tile[3], tuple) else (tile[3],)


def _with_arguments(tile: Any, arguments: tuple[Any, ...]) -> Any:
    # A tuple, or from Pillow 11 a named one.
    make = getattr(type(tile), "_make", tuple)
    return make((*tile[:3], arguments if isinstance(tile[3], tuple) else arguments[0]))


def _other_bytes(image: Image.Image) -> list[Any] | None:
    """Return the tiles that read what Pillow leaves out of samples of sixteen bits, None where there are none."""
    tiles = getattr(image, "tile", [])
    if not tiles or any(_arguments(tile)[0] not in _OTHER_BYTES for tile in tiles):
        return None
    return [_with_arguments(tile, (_OTHER_BYTES[_arguments(tile)[0]], *_arguments(tile)[1:])) for tile in tiles]


def _deep(
    file: IO[bytes], formats: tuple[str, ...] | None, other: list[Any] | None, upper: Image.Image
) -> np.ndarray | None:
    """Return all sixteen bits of a picture's samples, (H, W, channels) uint16, None where they cannot be had.

    Args:
        file: the file.
        formats: as of `decode_image`.
        other: the tiles of `_other_bytes`.
        upper: the picture as Pillow reads it: the upper bytes, or grey with alpha as RGBA.
    """
    if other is None:
        return None
    file.seek(0)
    with _open(file, formats) as again:
        again.tile = other
        again.load()
        found = np.asarray(again).astype(np.uint16)
    if _arguments(other[0])[0] == "RGBA":
        # The bytes of the grey and of the alpha.
        grey, alpha = found[..., 0] << 8 | found[..., 1], found[..., 2] << 8 | found[..., 3]
        return np.stack([grey, grey, grey, alpha], axis=2)
    return np.asarray(upper).astype(np.uint16) << 8 | found


def _on_background(image: GifImageFile, result: Image.Image) -> Image.Image:
    """Return a GIF's first frame on the background colour, which Pillow takes to be the first of the palette."""
    box = image.dispose_extent
    if image.tell() or box in (None, (0, 0, *image.size)) or image.mode == "RGBA" or "transparency" in image.info:
        return result
    index, palette = image.info.get("background"), image.global_palette
    colour: tuple[int, ...] = (255, 255, 255)
    if index is not None:
        colour = tuple(palette.palette[3 * index : 3 * index + 3]) if palette else (index,) * 3
    # An index may lie beyond the palette.
    canvas = Image.new("RGB", result.size, colour or "white")
    canvas.paste(result.crop(box), box)
    return canvas


def _reason(error: Exception) -> str:
    """Return what is wrong with an image file, in words."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it is too large ({reason_of(error)}); PIL.Image.MAX_IMAGE_PIXELS sets Pillow's limit"
    reason = reason_of(error)
    # Pillow's words for layouts that it knows and cannot decode, and for damaged data.
    if reason.startswith(("unknown raw mode", "decoder error", "No packer", "No unpacker")):
        return f"its pixels are damaged, or laid out in a way that Pillow cannot decode ({reason}); save it as PNG"
    return reason
