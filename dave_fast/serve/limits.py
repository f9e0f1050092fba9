"""All limits of a server, with defaults for a small machine."""

from __future__ import annotations

from dataclasses import dataclass

# The formats of Pillow that are decoded; the others are rare, and each is a risk.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Beside the connections, how many more may be open to be refused, and for health and metrics.
SPARE_CONNECTIONS = 64


@dataclass(frozen=True)
class Limits:
    """The limits of one client, and of all clients together.

    Attributes:
        body_bytes: bytes of one upload.
        memory_bytes: bytes of all that is made of requests, and of stored images (`account`); None: half of the memory
            that is free at the start.
        pixels: width × height of an image.
        samples: samples of one request.
        classes: classes of one request.
        requests: requests in the queue.
        rows: rows (request, sample) in the queue.
        queue_bytes: bytes of them that the requests in the queue need, by the formula of `dave_fast.engine.memory`;
            None: as many as there are on a CPU, half of the memory that is free on another device.
        decode_seconds: seconds that reading one image or form may take.
        connections: open connections. One more ends that which has waited longest for a request; where all have one,
            health and metrics are answered and other requests refused.
        header_seconds: seconds that a client may take to send its headers.
        upload_seconds: seconds that a client may take to send its body, or to read what it was sent.
        answer_seconds: seconds after which a request is answered with the samples that are done; it fails after
            twice as many if its maps are not made.
        stored_images: images stored for later requests.
        stored_seconds: seconds that an image is stored.
        drain_seconds: seconds to finish the accepted requests after SIGTERM.
    """

    body_bytes: int = 20 << 20
    memory_bytes: int | None = None
    pixels: int = 25_000_000
    samples: int = 1024
    classes: int = 10
    requests: int = 64
    rows: int = 16_384
    queue_bytes: int | None = None
    decode_seconds: float = 10.0
    connections: int = 512
    header_seconds: float = 10.0
    upload_seconds: float = 20.0
    answer_seconds: float = 120.0
    stored_images: int = 64
    stored_seconds: float = 600.0
    drain_seconds: float = 30.0
