"""What a PNG says of its samples, and a PNG without the text that Pillow refuses."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from dave_fast.errors import ImageError
from dave_fast.images.pixels import Samples

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Of the chunks that a reader may leave out, those without which there would be other pixels.
_PIXELS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
# Those that can hold the orientation, and how they begin.
_ORIENTED = {
    b"eXIf": (b"",),
    b"tEXt": (b"Raw profile type exif\0",),
    b"zTXt": (b"Raw profile type exif\0",),
    b"iTXt": (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"),
}
# Pillow's limits of a compressed text, and of all texts with room for what it counts besides.
_MEBIBYTE = 1 << 20
_IN_ALL = 60 * _MEBIBYTE
# Pillow takes seconds for so many; the largest pictures have some ten thousand, of 8 KiB.
_MOST_CHUNKS = 200_000

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
    """Return what a PNG says of its samples, and the file without what does not touch its pixels.

    Pillow refuses a picture whose comment or profile is long, damaged or of an unknown kind. These are left out.

    Args:
        file: at any place; is left at its start.

    Returns:
        None and the file itself where it is no PNG, or one that is cut off before its pixels.

    Raises:
        ImageError: it has more than 200,000 chunks.
    """
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        file.seek(0)
        return None, file
    found: dict[bytes, bytes] = {}
    edges, texts = [0], 0
    for kind, start, length in _chunks(file):
        if kind in (b"IHDR", b"tRNS", b"sBIT") and length <= 256:
            found.setdefault(kind, file.read(length))
        # The case of the first letter says whether a reader may leave a chunk out.
        if kind[:1].isupper() or kind in _PIXELS:
            continue
        size = _text_size(file, kind, length) if kind in _ORIENTED else None
        if size is None or texts + size > _IN_ALL:
            # Chunks side by side are left out as one.
            if start == edges[-1]:
                edges.pop()
            else:
                edges.append(start)
            edges.append(start + length + 12)
        else:
            texts += size
    file.seek(0)
    if len(edges) > 1:
        content = file.read()
        edges.append(len(content))
        file = io.BytesIO(b"".join(content[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)))
    header = found.get(b"IHDR", b"")
    if len(header) < 13:
        return None, file
    significant = max(found[b"sBIT"], default=0) or None if b"sBIT" in found else None
    return Header(header[8], header[9], found.get(b"tRNS"), significant), file


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the start and the length of each chunk, with the file at the chunk's content."""
    start = len(SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        yield kind, start, length
        start += length + 12
    raise ImageError(f"it has more than {_MOST_CHUNKS} chunks; save it again")


def _text_size(file: IO[bytes], kind: bytes, length: int) -> int | None:
    """Return the length of the text in a chunk, None where it is damaged, too long or cannot hold the orientation."""
    content, check = file.read(length), file.read(4)
    if check != struct.pack(">I", zlib.crc32(kind + content)) or not content.startswith(_ORIENTED[kind]):
        return None
    if kind in (b"eXIf", b"tEXt"):
        return length
    # Behind the keyword: whether it is compressed (iTXt only), the method, a language and a translated keyword (iTXt).
    value = content.split(b"\0", 1)[1]
    if kind == b"iTXt":
        if value[:1] == b"\0":
            return length
        value = value[1:]
    packed = value[1:] if kind == b"zTXt" else value[1:].split(b"\0", 2)[-1]
    expand = zlib.decompressobj()
    try:
        size = len(expand.decompress(packed, _MEBIBYTE))
    except zlib.error:
        return None
    return size if value[:1] == b"\0" and not expand.unconsumed_tail else None
