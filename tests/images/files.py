"""Image files made byte by byte, so that tests know their pixels without Pillow."""

import struct
import zlib

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
NONE, DEFLATE = 1, 8


def chunk(kind, body):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed(row, depth, order=">"):
    """Return a row of samples as bytes, the first sample in the upper bits."""
    if depth in (8, 16, 32):
        return row.astype(f"{order}{row.dtype.kind}{depth // 8}").tobytes()
    bits = (row.reshape(-1, 1).astype(int) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def png(samples, colour, depth, *, before=(), after=(), interlaced=False):
    """Return a PNG.

    Args:
        samples: (H, W, channels) unsigned integers.
        colour: colour type of IHDR.
        depth: bits of a sample.
        before: further chunks (kind, content) before the pixels.
        after: further chunks behind the pixels.
        interlaced: whether the pixels come in the seven passes of Adam7.
    """
    height, width, channels = samples.shape
    assert channels == CHANNELS[colour]
    passes = [samples[y::down, x::across] for x, y, across, down in ADAM7] if interlaced else [samples]
    rows = b"".join(b"\0" + packed(row, depth) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(chunk(*each) for each in chunks)


def tiff(
    samples,
    photometric,
    depth,
    *,
    order="<",
    kind=1,
    compression=NONE,
    planar=False,
    fill=1,
    extra=(),
    colours=None,
    tile=None,
    tags=None,
):
    """Return a TIFF.

    Args:
        samples: (H, W, channels).
        photometric: PhotometricInterpretation.
        depth: bits of a sample.
        order: "<" or ">", the order of bytes.
        kind: SampleFormat: 1 unsigned, 2 signed, 3 floating point.
        compression: NONE or DEFLATE.
        planar: whether the channels lie in planes.
        fill: FillOrder; 2 for the first pixel in the lowest bit.
        extra: ExtraSamples.
        colours: ColorMap, all reds first.
        tile: side of the tiles, None for one strip.
        tags: further tags, {number: (code of struct, values)}.
    """
    height, width, channels = samples.shape
    parts = [samples[..., i : i + 1] for i in range(channels)] if planar else [samples]
    if tile:
        padded = [np.pad(part, ((0, -height % tile), (0, -width % tile), (0, 0))) for part in parts]
        parts = [
            part[y : y + tile, x : x + tile]
            for part in padded
            for y in range(0, height, tile)
            for x in range(0, width, tile)
        ]
    blocks = [b"".join(packed(row, depth, order) for row in part) for part in parts]
    blocks = [zlib.compress(block) if compression == DEFLATE else block for block in blocks]
    if fill == 2:
        turned = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
        blocks = [block.translate(turned) for block in blocks]
    entries = {
        256: ("L", [width]),
        257: ("L", [height]),
        258: ("H", [depth] * channels),
        259: ("H", [compression]),
        262: ("H", [photometric]),
        266: ("H", [fill]),
        277: ("H", [channels]),
        284: ("H", [1 + planar]),
        339: ("H", [kind] * channels),
    }
    offsets = [8 + sum(len(block) + len(block) % 2 for block in blocks[:i]) for i in range(len(blocks))]
    sizes = [len(block) for block in blocks]
    if tile:
        entries |= {322: ("L", [tile]), 323: ("L", [tile]), 324: ("L", offsets), 325: ("L", sizes)}
    else:
        entries |= {273: ("L", offsets), 278: ("L", [height]), 279: ("L", sizes)}
    if extra:
        entries[338] = ("H", list(extra))
    if colours is not None:
        entries[320] = ("H", list(colours))
    body = b"".join(block + b"\0" * (len(block) % 2) for block in blocks)
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return (
        magic
        + struct.pack(order + "L", 8 + len(body))
        + body
        + _directory(entries | (tags or {}), 8 + len(body), order)
    )


def _directory(entries, start, order):
    """Return a TIFF's directory at an offset of its file; entries set to None are left out."""
    entries = {tag: entry for tag, entry in sorted(entries.items()) if entry is not None}
    fields, behind = b"", b""
    end = start + 2 + 12 * len(entries) + 4
    for tag, (code, values) in entries.items():
        count, content = len(values), struct.pack(f"{order}{len(values)}{code}", *values) if code != "s" else values
        number = {"B": 1, "s": 2, "H": 3, "L": 4, "f": 11}[code]
        if len(content) > 4:
            place = struct.pack(order + "L", end + len(behind))
            behind += content + b"\0" * (len(content) % 2)
        else:
            place = content.ljust(4, b"\0")
        fields += struct.pack(order + "HHL", tag, number, count) + place
    return struct.pack(order + "H", len(entries)) + fields + struct.pack(order + "L", 0) + behind


def stored(upright):
    """Return how an upright picture (H, W) is stored under each EXIF orientation, 1 to 8."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
