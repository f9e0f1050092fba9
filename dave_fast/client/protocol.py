"""What the clients send and receive: requests, answers, errors, and when a request is tried again."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, ImageOps

from dave_fast.errors import DaveFastError, InputError, needs, reason_of

with needs("serve", "dave_fast.client"):
    import httpx

Picture = bytes | str | os.PathLike[str] | Image.Image | np.ndarray
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
# Fields of an answer that are taken as they are.
_COPIED = ("cut_short", "model", "seed", "shrink", "queue_ms", "total_ms", "notes", "accounts")
# How the values of an array are written, and what 1 is.
_ENCODINGS = {"float32": ("<f4", np.float32(1)), "uint8": ("u1", np.float32(255)), "int16": ("<i2", np.float32(32767))}
_AGAIN = (429, 502, 503)
# Seconds: the first wait without Retry-After, and the longest.
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0


class ServerError(DaveFastError, RuntimeError):
    """A request that the server refused or failed to answer.

    Attributes:
        status: of HTTP; None where there was no answer.
        detail: the server's message.
        retry_after: seconds after which to ask again, or None.
        lost: whether the answer is that of a proxy whose server died with the request.
    """

    def __init__(
        self, status: int | None, detail: str, retry_after: float | None = None, *, lost: bool = False
    ) -> None:
        super().__init__(f"{detail}" if status is None else f"{status}: {detail}")
        self.status, self.detail, self.retry_after, self.lost = status, detail, retry_after, lost


@dataclass(frozen=True)
class Explained:
    """Maps of one image and K classes, from all its samples or from those that have come so far.

    Attributes:
        maps: (K, H, W) float32 in [0, 1], of several depths (K, L, H, W).
        targets: K class indices; −1 for another question, such as "tiger-lion" or "text:a cat".
        class_names: K names, of other questions in words.
        probabilities: K probabilities; NaN for a model that has none, and for other questions.
        errors: K estimates of the relative L2 distance of a map to its limit; infinity where unknown; of several depths
            the largest of a class.
        error_bounds: K bounds, each of which holds with 90 % certainty; infinity where unknown.
        samples: perturbed samples that the maps are made of.
        n_samples: perturbed samples that were asked for.
        final: whether this is the answer, and not an update before it.
        cut_short: the reason for fewer samples, "tolerance", "deadline" or "shutdown"; None where all were made.
        model: the served name.
        seed: of the samples.
        shrink: whether the maps are shrunk by the noise left in them; False for a server that does not know of it.
        depth: "pixels", the number of a block or a range such as "5-9", or a tuple of them for several.
        accounts: where more than pixels were asked for, in an answer: of each class a dictionary of target, score, what
            pixels and, of every block, patches, prefix tokens and biases behind account for.
        queue_ms: milliseconds in the queue.
        total_ms: milliseconds in all.
        top: (class, name, probability) of the most probable classes, in an answer.
        notes: what the server had to assume about the image file, in an answer.
        signed: where signed=True was asked, what speaks for (above zero) and against, in [−1, 1], of the shape of maps.
    """

    maps: np.ndarray
    targets: list[int]
    class_names: list[str]
    probabilities: list[float]
    errors: list[float]
    error_bounds: list[float]
    samples: int
    n_samples: int
    final: bool
    cut_short: str | None = None
    model: str | None = None
    seed: int | None = None
    shrink: bool = False
    depth: str | int | tuple[str | int, ...] = "pixels"
    accounts: list[dict[str, Any]] | None = None
    queue_ms: float | None = None
    total_ms: float | None = None
    top: list[tuple[int, str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    signed: np.ndarray | None = None

    @property
    def error_bound(self) -> float:
        """The largest of the bounds."""
        return max(self.error_bounds)


def picture_bytes(picture: Picture) -> bytes:
    """Return an image as the bytes of a file.

    Args:
        picture: a path, the bytes of a file, a PIL image, or pixels uint8 (H, W, 3) or (H, W).

    Raises:
        InputError: the file cannot be read, or the pixels are not of that form.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise InputError(f"pixels are {picture.dtype} {picture.shape}; expected uint8 (H, W, 3)")
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        # What PNG cannot hold, TIFF can; not every version of Pillow writes the orientation.
        picture = ImageOps.exif_transpose(picture)
        picture.save(file, format="PNG" if picture.mode in _PNG_MODES else "TIFF")
        return file.getvalue()
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(picture)}: {reason_of(error)}.") from error


def explain_request(path: str, picture: Picture, target: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an explanation's request as keywords of httpx, without options that are None."""
    every = {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in {**options, "target": target}.items()
    }
    given = {name: value for name, value in every.items() if value is not None}
    return {"method": "POST", "url": path, "params": given, "content": picture_bytes(picture)}


def explained(told: Mapping[str, Any], *, final: bool = True) -> Explained:
    """Return the answer or update that the server's JSON holds."""
    each, depth = told["maps"], told.get("depth", "pixels")
    has_signed = any((one.get("depths") or [one])[0].get("signed") is not None for one in each)
    return Explained(
        maps=np.stack([_maps(one, "map") for one in each]),
        signed=np.stack([_maps(one, "signed") for one in each]) if has_signed else None,
        targets=[one["target"] for one in each],
        class_names=[one["class_name"] for one in each],
        probabilities=[_probability(one) for one in each],
        errors=[_error(one["error"]) for one in each],
        error_bounds=[_error(one["error_bound"]) for one in each],
        final=final,
        depth=tuple(depth) if isinstance(depth, list) else depth,
        top=[(one["target"], one["class_name"], _probability(one)) for one in told.get("top", [])],
        samples=told["samples"],
        n_samples=told["n_samples"],
        **{name: told[name] for name in _COPIED if name in told},
    )


def _error(value: float | None) -> float:
    return float("inf") if value is None else value


def _probability(told: Mapping[str, Any]) -> float:
    return float("nan") if told["probability"] is None else told["probability"]


def _maps(told: Mapping[str, Any], name: str) -> np.ndarray:
    """Return the map (H, W) of a class, or its maps (L, H, W) at several depths; name is "map" or "signed"."""
    depths = told.get("depths")
    return _map(told[name]) if depths is None else np.stack([_map(each[name]) for each in depths])


def _map(told: Mapping[str, Any]) -> np.ndarray:
    kind, one = _ENCODINGS[told["dtype"]]
    return np.frombuffer(base64.b64decode(told["data"]), kind).reshape(told["shape"]).astype(np.float32) / one


def problem(response: httpx.Response) -> ServerError:
    """Return the error for a response with another status than 200."""
    lost = False
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200] or response.reason_phrase
        # The server's own errors are JSON: this one is a proxy's.
        lost = response.status_code == 500
    try:
        wait = float(response.headers.get("retry-after", ""))
    except ValueError:
        wait = None
    return ServerError(response.status_code, str(detail), wait, lost=lost)


class Tries:
    """The tries that one call has left, and the time for them.

    Args:
        timeout: seconds for the call, all tries included.
        retries: tries after the first.
    """

    def __init__(self, timeout: float, retries: int) -> None:
        self._until = time.monotonic() + timeout
        self._left, self._wait = retries, _FIRST_WAIT

    @property
    def seconds(self) -> float:
        """Seconds that are left; raises ServerError where none are."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise ServerError(None, "no answer within the time given; allow more (timeout=)")
        return left

    def wait_after(self, error: Exception) -> float:
        """Return the seconds to wait before the next try.

        Raises:
            ServerError: the error is final, or neither a try nor the time for it is left.
        """
        told = error if isinstance(error, ServerError) else ServerError(None, f"{type(error).__name__}: {error}")
        wait = random.uniform(0, self._wait)
        if told.retry_after is not None:
            # Other clients were told the same time: spread them out after it.
            wait = told.retry_after * random.uniform(1.0, 1.5)
        final = told.status not in (None, *_AGAIN) and not told.lost
        if final or self._left <= 0 or time.monotonic() + wait > self._until:
            raise told from error
        self._left, self._wait = self._left - 1, min(2 * self._wait, _LONGEST_WAIT)
        return wait


class Events:
    """The updates of one stream of server-sent events, read in a `with` block."""

    def __init__(self) -> None:
        self._name, self._data = "", ""
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.TransportError):
            raise ServerError(None, f"the stream broke off ({error}); ask again") from error
        if error is None and not self._ended:
            raise ServerError(None, "the stream broke off before the answer; ask again")

    def updates(self, line: str) -> Iterator[Explained]:
        """Yield the update that a line completes, if any.

        Raises:
            ServerError: the line completes an error.
        """
        if line.startswith("event:"):
            self._name = line[6:].strip()
        elif line.startswith("data:"):
            self._data += line[5:].strip()
        elif not line and self._name:
            name, told = self._name, json.loads(self._data)
            self._name, self._data = "", ""
            self._ended = name in ("done", "error")
            if name == "error":
                raise ServerError(told["status"], told["detail"])
            if name in ("maps", "done"):
                yield explained(told, final=name == "done")
