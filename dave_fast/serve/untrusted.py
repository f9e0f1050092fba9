"""What is done with the bytes that clients send: forms and JSON are parsed, pictures are decoded, resized and cropped.

This runs in processes of its own (`workshop`), which have a limit of memory and can be ended at any time, since a
few bytes can cost seconds and gigabytes. A task of `TASKS` first tells how many bytes it will need, then does the
work. Messages are a dictionary as JSON and bytes; nothing that comes back is code, so that a process that was taken
over by a picture gains nothing in the server.
"""

from __future__ import annotations

import base64
import binascii
import gc
import io
import itertools
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import create_form_parser

from dave_fast.errors import ImageError, InputError, TooLargeError, is_out_of_memory
from dave_fast.images.geometry import PIXEL_BYTES, Geometry
from dave_fast.images.reading import decode_image, decoding_bytes
from dave_fast.numbers import shown

Message = tuple[dict[str, Any], bytes]

# Fields of a form, and parameters of a KServe request.
_FIELDS = 32
# Bytes of everything in an answer but its payload: the server parses it on its event loop.
_HEAD = 1 << 16
# levels of lists and objects in it
_DEEPEST = 16
# Bytes that Python objects take for a character of JSON, measured: a number in a list, lists of one number,
# dictionaries of one key, short texts.
_ITEMS = {b",": 45, b"[": 95, b"{": 95, b":": 150, b'"': 15}
TYPES = {"UINT8": np.uint8, "FP32": np.float32}
# Bytes beyond those a task asks for, for buffers of libraries that every task has.
SLACK = 32 << 20
# Explanations and the event loop go ahead of the preparation of later requests.
_NICE = 5


def picture_bytes(content: bytes, options: Mapping[str, Any]) -> int:
    """Return the bytes that decoding a picture needs, as the file's header says.

    Raises:
        ImageError: the header cannot be read.
        TooLargeError: the picture has too many pixels, or would have on its way to the model.
    """
    width, height, decoding = decoding_bytes(content, "the image", **_limits(options))
    config = options["config"]
    if config is None:
        return decoding
    resizing = Geometry.from_config(config).resizing_bytes(width, height, options["pixels"])
    return max(decoding, PIXEL_BYTES * width * height + resizing)


def picture(content: bytes, options: Mapping[str, Any]) -> Message:
    """Return the crop of a picture for a model, (H, W, 3) uint8, or without `config` its size alone."""
    notes: list[str] = []
    image = decode_image(content, "the image", note=notes.append, **_limits(options))
    told: dict[str, Any] = {"width": image.width, "height": image.height, "notes": notes}
    config = options["config"]
    if config is None:
        return told, b""
    crop = Geometry.from_config(config).crop(image, options["pixels"])
    return told | {"shape": (crop.height, crop.width, 3)}, crop.tobytes()


def _limits(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_pixels": options["pixels"], "formats": tuple(options["formats"])}


def form_bytes(content: bytes, options: Mapping[str, Any]) -> int:
    """Return the bytes that parsing a form needs: its file is copied while it grows, and once more."""
    return 4 * len(content)


def form(content: bytes, options: Mapping[str, Any]) -> Message:
    """Return the fields of a form and its file `image`.

    Raises:
        ImageError: the form is malformed.
        InputError: it has other files, too many fields, or one twice.
    """
    fields: dict[str, Any] = {}
    files: list[Any] = []
    image = b""

    def on_field(field: Any) -> None:
        name, value = field.field_name.decode("utf-8", "replace"), (field.value or b"").decode("utf-8", "replace")
        if name in ("target", "depth") and len(fields.get(name, ())) < _FIELDS:
            fields.setdefault(name, []).append(value)
        elif name in fields or len(fields) >= _FIELDS:
            raise InputError(f"the form has {name[:100]!r} twice, or more than {_FIELDS} fields.")
        else:
            fields[name] = value

    def on_file(file: Any) -> None:
        nonlocal image
        files.append(file)
        name = (file.field_name or b"").decode("utf-8", "replace")
        if name != "image" or len(files) > 1:
            raise InputError(f"the form has a file {name[:100]!r}; expected one file, named 'image'.")
        file.file_object.seek(0)
        image = file.file_object.read()

    try:
        headers = {"Content-Type": options["content_type"].encode("latin-1")}
        parser = create_form_parser(headers, on_field, on_file, config={"MAX_MEMORY_FILE_SIZE": 1 << 40})
        parser.write(content)
        parser.finalize()
    except InputError:
        raise
    # Malformed bodies: without a boundary, with a malformed header, or with a part that has no name.
    except (FormParserError, ValueError, AttributeError) as error:
        raise ImageError("the form cannot be read; send multipart/form-data with a file 'image'.") from error
    finally:
        for file in files:
            file.close()
    return {"fields": fields}, image


def infer_bytes(content: bytes, options: Mapping[str, Any]) -> int:
    """Return the bytes that parsing a KServe request needs: its text twice, and what may begin at these characters."""
    return 2 * len(content) + sum(size * content.count(character) for character, size in _ITEMS.items())


def infer(content: bytes, options: Mapping[str, Any]) -> Message:
    """Return a KServe request without its data, and the data: an image file, or the bytes of a tensor.

    Raises:
        InputError: it is no JSON, has no list of data, or data of another type or shape than it says.
    """
    try:
        request = json.loads(content)
    # RecursionError: nested too deep. UnicodeDecodeError and numbers of too many digits are ValueErrors.
    except (ValueError, RecursionError) as error:
        raise InputError("the body is no JSON that can be read; expected a request of KServe's v2 protocol.") from error
    inputs = request.get("inputs") if isinstance(request, dict) else None
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise InputError("inputs: expected a list of one tensor, the image.")
    parameters = request.get("parameters")
    if isinstance(parameters, dict) and len(parameters) > _FIELDS:
        raise InputError(f"parameters: {len(parameters)} are given; at most {_FIELDS} are taken.")
    data = inputs[0].pop("data", None)
    if not isinstance(data, list):
        raise InputError("inputs: the tensor has no list of data.")
    return {"request": request}, _data(inputs[0], data)


def _data(tensor: Mapping[str, Any], data: list[Any]) -> bytes:
    """Return the data of a tensor as bytes: an image file, or numbers."""
    kind, shape = tensor.get("datatype"), tensor.get("shape")
    if kind == "BYTES":
        if len(data) != 1 or not isinstance(data[0], str):
            raise InputError(f"the BYTES input has {len(data)} elements; expected one, an image file in base64.")
        try:
            return base64.b64decode(data[0], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError("the BYTES input is not base64; expected an image file in base64.") from error
    if not isinstance(kind, str) or kind not in TYPES:
        raise InputError("the input is none of BYTES, UINT8 (H, W, 3) and FP32 (1, 3, H, W).")
    wrong = InputError(f"the data are not {kind} numbers of the shape {shown(shape)}.")
    # numpy would take text and truth values for numbers, and booleans of Python for one and zero
    if not all(type(each) in (int, float) for each in data):
        raise wrong
    try:
        return np.array(data, TYPES[kind]).reshape(shape).tobytes()
    except (ValueError, TypeError, OverflowError) as error:
        raise wrong from error


# Each task: the bytes that it needs, and the work.
Task = Callable[[bytes, Mapping[str, Any]], Message]
TASKS: dict[str, tuple[Callable[[bytes, Mapping[str, Any]], int], Task]] = {
    "picture": (picture_bytes, picture),
    "form": (form_bytes, form),
    "infer": (infer_bytes, infer),
}

# Messages.

_LENGTHS = struct.Struct(">QQ")


def packed(told: Mapping[str, Any], payload: bytes) -> bytes:
    """Return the head of a message, after which its payload follows."""
    text = json.dumps(told).encode()
    return _LENGTHS.pack(len(text), len(payload)) + text


def lengths(head: bytes) -> tuple[int, int]:
    """Return the bytes of the dictionary and of the payload, from the first `HEAD` bytes of a message."""
    text, payload = _LENGTHS.unpack(head)
    return text, payload


HEAD = _LENGTHS.size


def _received(stream: io.BufferedRWPair) -> Message | None:
    """Return the next message, None at the end."""
    head = stream.read(HEAD)
    if len(head) < HEAD:
        return None
    text, payload = lengths(head)
    return json.loads(stream.read(text)), stream.read(payload)


def _check_text(told: Mapping[str, Any]) -> None:
    """Raise InputError for what the server cannot take or tell: too long, nested too deep, or no Unicode."""
    try:
        size = len(json.dumps(told, ensure_ascii=False).encode())
    except (RecursionError, UnicodeEncodeError) as error:
        raise InputError("names, fields or parameters are nested too deep, or are no Unicode.") from error
    if size > _HEAD:
        raise InputError("names, fields or parameters are too long; shorten them.")
    level: list[Any] = [told]
    for _ in range(_DEEPEST):
        inner = ((each.values() if isinstance(each, dict) else each) for each in level if isinstance(each, dict | list))
        level = list(itertools.chain.from_iterable(inner))
    if level:
        raise InputError(f"names, fields or parameters are nested deeper than {_DEEPEST} levels.")


def _answered(work: Task, content: bytes, options: Mapping[str, Any]) -> Message:
    """Return what a task returns, or its error by name."""
    try:
        told, payload = work(content, options)
        _check_text(told)
        return told, payload
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if is_out_of_memory(cause):
                error = TooLargeError("it takes more memory than its header says; send another file.")
            cause = cause.__cause__
        if isinstance(error, InputError):
            detail = str(error)[:1000].encode("utf-8", "backslashreplace").decode()
            return {"error": type(error).__name__, "detail": detail}, b""
        # Not of the content: it is for the server's log.
        return {"error": "", "detail": "".join(traceback.format_exception(error))[-4000:]}, b""


# The processes.


def serve_tasks(connection: socket.socket) -> None:
    """Answer the messages of a connection until it ends.

    A task is {"task": name, ...options} with the content, answered with {"need": bytes}; then {"go": true}, answered
    with its result, or {"go": false}, which has no answer. An error is {"error": class, "detail": text}.
    """
    base = _data_bytes()
    with connection, connection.makefile("rwb") as stream:

        def send(message: Message) -> None:
            stream.write(packed(*message))
            stream.write(message[1])
            stream.flush()

        while (given := _received(stream)) is not None:
            options, content = given
            needs, work = TASKS[options["task"]]
            _limit(base + len(content) + 2 * SLACK)
            need = _answered(lambda *given: ({"need": needs(*given)}, b""), content, options)  # noqa: B023
            send(need)
            if "need" in need[0]:
                go_on = _received(stream)
                if go_on is None:
                    return
                if go_on[0]["go"]:
                    _limit(base + 2 * len(content) + need[0]["need"] + SLACK)
                    send(_answered(work, content, options))
            del given, content
            gc.collect(0)
            # The next content may be larger than this task was.
            _limit(resource.getrlimit(resource.RLIMIT_DATA)[1])


def _data_bytes() -> int:
    """Return the bytes of private memory that this process has, as RLIMIT_DATA counts them; 0 where it is unknown."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    except (OSError, StopIteration):
        return 0


def _limit(most: int) -> None:
    """Limit the private memory of this process; only where the system counts it."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def main() -> None:
    """Fork a process for each connection that the server sends over standard input, and tell its id."""
    # The server ends this process and its own; a signal to the group of a terminal must not.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Loaded before the first fork, so that every process has them at once and shares their memory.
    Image.init()
    # Libraries of pictures write what they think of a file to standard error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with socket.socket(fileno=sys.stdin.fileno()) as server:
        server.send(struct.pack(">q", 0))
        while True:
            given, sockets, _, _ = socket.recv_fds(server, 1, 1)
            if not given:
                return
            with socket.socket(fileno=sockets[0]) as connection:
                pid = os.fork()
                if pid == 0:
                    server.close()
                    os.nice(_NICE)
                    serve_tasks(connection)
                    os._exit(0)
            server.send(struct.pack(">q", pid))


if __name__ == "__main__":
    main()
