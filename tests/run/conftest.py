"""Folders of images that stubs do not look at."""

import pytest


@pytest.fixture
def images(tmp_path):
    """A folder of 120 images for stubs, in three folders."""
    for number in range(120):
        path = tmp_path / "images" / f"{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"for a stub")
    return tmp_path / "images"
