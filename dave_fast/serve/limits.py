"""Every limit of a server in one place, with defaults that a small machine stands."""

from __future__ import annotations

from dataclasses import dataclass

# formats of Pillow that are decoded; the rest of its list is rarer than it is safe
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Limits:
    """What one client, and all of them together, may ask for.

    body_bytes: of one upload, and held_bytes of all that are being read or kept. pixels: width × height of an image.
    samples, classes: of one request. requests, rows, queue_bytes: in the queue, the bytes by the formula of memory.py;
    None: half of what is free on the device. connections: open at once.
    header_seconds, upload_seconds: that a client may take to send its headers, its body. answer_seconds: after which
    any request is answered with what there is. stored_images, stored_seconds: of images kept for later requests.
    drain_seconds: that accepted requests have after SIGTERM.
    """

    body_bytes: int = 20 << 20
    held_bytes: int = 256 << 20
    pixels: int = 25_000_000
    samples: int = 1024
    classes: int = 10
    requests: int = 64
    rows: int = 16_384
    queue_bytes: int | None = None
    connections: int = 512
    header_seconds: float = 10.0
    upload_seconds: float = 20.0
    answer_seconds: float = 120.0
    stored_images: int = 64
    stored_seconds: float = 600.0
    drain_seconds: float = 30.0
