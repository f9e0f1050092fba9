"""All limits of a server, with defaults for a small machine."""

from __future__ import annotations

from dataclasses import dataclass

# The formats of Pillow that are decoded; the others are rare, and each is a risk.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Limits:
    """The limits of one client, and of all clients together.

    Attributes:
        body_bytes: bytes of one upload.
        held_bytes: bytes of all uploads that are being read or stored.
        pixels: width × height of an image.
        samples: samples of one request.
        classes: classes of one request.
        requests: requests in the queue.
        rows: rows (request, sample) in the queue.
        queue_bytes: bytes that the requests in the queue need, by the formula of `dave_fast.engine.memory`; None: half
            of the memory that is free on the device.
        connections: open connections.
        header_seconds: seconds that a client may take to send its headers.
        upload_seconds: seconds that a client may take to send its body, or to read a piece of the answer.
        answer_seconds: seconds after which a request is answered with the samples that are done.
        stored_images: images stored for later requests.
        stored_seconds: seconds that an image is stored.
        drain_seconds: seconds to finish the accepted requests after SIGTERM.
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
