"""Tests of photographs in the forms in which people give them in Python."""

import io
import os
import pathlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.errors import ImageError, InputError
from dave_fast.images import given
from dave_fast.images.given import Photograph, is_one, photographs

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def file(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def read(photograph):
    return np.asarray(Photograph.of(photograph).read())


def encoded():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "form",
    [
        lambda file: str(file),
        lambda file: file,
        lambda file: file.as_uri(),
        lambda file: encoded(),
        lambda file: bytearray(encoded()),
        lambda file: Image.open(file),
        lambda file: Image.fromarray(PIXELS),
        lambda file: PIXELS,
        lambda file: PIXELS / 255,
        lambda file: (PIXELS / 255).astype(np.float32),
        lambda file: np.dstack([PIXELS, np.full((20, 30), 255, np.uint8)]),
        lambda file: np.asfortranarray(PIXELS),
        lambda file: Photograph.of(file),
    ],
    ids=[
        "path", "Path", "URL", "bytes", "bytearray", "opened", "PIL", "uint8", "float64", "float32", "RGBA", "Fortran",
        "Photograph",
    ],
)  # fmt: skip
def test_every_form_gives_the_pixels(file, form):
    assert (read(form(file)) == PIXELS).all()


@pytest.mark.parametrize("grey", [PIXELS[..., 0], PIXELS[..., :1], PIXELS[..., 0].astype(np.uint16) * 257])
def test_grey_arrays_are_grey(grey):
    assert (read(grey) == PIXELS[..., :1]).all()


def test_url_of_another_file_system_is_read():
    with fsspec.open("memory://given/photo.png", "wb") as out:
        out.write(encoded())
    photograph = Photograph.of("memory://given/photo.png")
    assert photograph.name == "memory://given/photo.png" and (np.asarray(photograph.read()) == PIXELS).all()


def test_address_of_the_web_is_read(file):
    handler = partial(SimpleHTTPRequestHandler, directory=file.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert (read(f"{address}/photo.png") == PIXELS).all()
            with pytest.raises(ImageError, match=f"cannot read {address}/none.png"):
                Photograph.of(f"{address}/none.png")
        finally:
            server.shutdown()


def test_url_of_too_many_bytes_is_refused(monkeypatch):
    with fsspec.open("memory://given/large.png", "wb") as out:
        out.write(encoded())
    monkeypatch.setattr(given, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        Photograph.of("memory://given/large.png")


@pytest.mark.parametrize("url", ["memory://given/none.png", "nothing://a/b.png"])
def test_url_that_cannot_be_read_is_named(url):
    with pytest.raises(ImageError, match=f"cannot read {url}"):
        Photograph.of(url)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.moveaxis(PIXELS, -1, 0), r"np\.moveaxis\(x, 0, -1\)"),
        (PIXELS.astype(np.float32), "values from 0 to 255; expected pixels in"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        (PIXELS.astype(np.int64), "int64; expected uint8"),
        (PIXELS.astype(np.uint16), "uint16; expected uint8"),
        (np.zeros((4, 4), bool), "bool; expected uint8"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (np.zeros(7, np.uint8), r"\(7,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
    ],
)
def test_array_that_is_no_picture_is_refused(array, words):
    with pytest.raises(InputError, match=words):
        Photograph.of(array)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (7, "an image is a int"),
        (None, "an image is a NoneType"),
        (torch.zeros(3, 4, 4), "a Tensor; expected .* or a tensor for all of them"),
        ("none.png", "cannot read none.png: no such file"),
        ("a\0b.png", "cannot read"),
        (b"no image", "cannot read the image"),
        (pathlib.Path("."), "cannot read"),
    ],
)
def test_what_is_no_photograph_is_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        Photograph.of(wrong).read()


def test_file_that_changed_is_not_read_again(file):
    photograph = Photograph.of(file)
    assert (np.asarray(photograph.read()) == PIXELS).all()
    Image.fromarray(255 - PIXELS).save(file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(ImageError, match="has changed since it was explained"):
        photograph.read()


def test_picture_that_its_owner_draws_on_stays_as_it_was_given():
    image = Image.fromarray(PIXELS)
    photograph = Photograph.of(image)
    image.putpixel((0, 0), (1, 2, 3))
    assert (np.asarray(photograph.read()) == PIXELS).all()


def test_one_or_several(file):
    assert [len(photographs(each)) for each in (file, [file], (PIXELS, file), np.stack([PIXELS] * 3))] == [1, 1, 2, 3]
    assert [is_one(each) for each in (file, PIXELS, b"", [file], np.stack([PIXELS]))] == [
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(InputError, match="empty"):
        photographs([])
