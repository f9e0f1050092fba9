"""What a PNG says of its samples, and a PNG without the text that Pillow refuses."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from dave_fast.images.pixels import Samples

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Chunks that hold text or a colour profile. Pillow expands them, and refuses the picture if they are large.
_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Texts that can hold the orientation.
_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
# zlib expands by a factor of at most 1032, so that a chunk of this length makes less than the MiB that Pillow allows,
# and all the chunks that are kept less than its 64 MiB.
_SHORT = 1000
_IN_ALL = 60_000
_MEBIBYTE = 1 << 20

# The colour types of IHDR.
GREY, COLOUR, PALETTE = 0, 2, 3


class Header(NamedTuple):
    """What the chunks before the pixels say.

    Attributes:
        depth: bits of a sample.
        colour: colour type of IHDR.
        transparency: content of tRNS, or None.
        significant: the most bits that sBIT names, or None.
    """

    depth: int
    colour: int
    transparency: bytes | None
    significant: int | None

    def samples(self) -> Samples:
        """Return what this says of the samples."""
        key = None
        if self.colour in (GREY, COLOUR) and self.transparency is not None:
            key = struct.unpack_from(">H" if self.colour == GREY else ">3H", self.transparency)
        levels = (65535.0,) if self.depth == 16 else ()
        bits = self.significant if self.depth == 16 and (self.significant or 0) <= 16 else None
        return Samples(self.depth, bits, left=True, levels=levels, transparent=key)


def read_header(file: IO[bytes]) -> tuple[Header | None, IO[bytes]]:
    """Return what a PNG says of its samples, and the file, without text that Pillow would refuse.

    Args:
        file: at any place; is left at its start.

    Returns:
        None and the file itself where it is no PNG, or one that is cut off before its pixels.
    """
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        file.seek(0)
        return None, file
    found: dict[bytes, bytes] = {}
    large: list[tuple[int, int]] = []
    kept = 0
    for kind, start, length in _chunks(file):
        if kind in (b"IHDR", b"tRNS", b"sBIT") and length <= 256:
            found.setdefault(kind, file.read(length))
        elif kind in _TEXT:
            if kept + length > _IN_ALL or not _is_small(file, kind, length):
                large.append((start, start + length + 12))
            else:
                kept += length
    file.seek(0)
    if large:
        content = file.read()
        edges = [0, *(edge for pair in large for edge in pair), len(content)]
        file = io.BytesIO(b"".join(content[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)))
    header = found.get(b"IHDR", b"")
    if len(header) < 13:
        return None, file
    significant = max(found[b"sBIT"], default=0) or None if b"sBIT" in found else None
    return Header(header[8], header[9], found.get(b"tRNS"), significant), file


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the start and the length of each chunk, with the file at the chunk's content."""
    start = len(SIGNATURE)
    while True:
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        yield kind, start, length
        start += length + 12


def _is_small(file: IO[bytes], kind: bytes, length: int) -> bool:
    """Return whether a chunk is short, or one that can hold the orientation and that Pillow will take."""
    if length <= _SHORT:
        return True
    if length > _IN_ALL:
        return False
    content = file.read(length)
    if not content.startswith(_ORIENTED):
        return False
    value = content.split(b"\0", 1)[1]
    # The first byte of iTXt says whether it is compressed.
    if kind == b"tEXt" or (kind == b"iTXt" and value[0] == 0):
        return True
    # The compressed part follows one byte, and in iTXt two, a language and a translated keyword.
    packed = value[1:] if kind == b"zTXt" else value[2:].split(b"\0", 2)[-1]
    expand = zlib.decompressobj()
    try:
        expand.decompress(packed, _MEBIBYTE)
    except zlib.error:
        return False
    return not expand.unconsumed_tail
