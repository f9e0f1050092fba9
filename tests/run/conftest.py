"""Fixtures of image folders: files for stubs, which read no pixels, and images that can be decoded."""

import pytest
from PIL import Image


@pytest.fixture
def images(tmp_path):
    """A folder of 120 files for stubs that read no pixels, in three folders."""
    for number in range(120):
        path = tmp_path / "images" / f"{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"for a stub")
    return tmp_path / "images"


@pytest.fixture
def pictures(images):
    """The folder `images`, with images that can be decoded."""
    for path in images.rglob("*.png"):
        Image.new("RGB", (12, 12)).save(path)
    return images
