"""Fixtures of image folders: files for stubs, which read no pixels, and images that can be decoded."""

import multiprocessing
from types import SimpleNamespace

import pytest
from PIL import Image

from dave_fast.run import local


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


@pytest.fixture(scope="session")
def forkserver():
    """A context whose processes are copies of one that has imported what workers need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "dave_fast.explain", "dave_fast.run.worker", "tests.run.stubs"])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


@pytest.fixture
def forked_workers(forkserver, monkeypatch):
    """Start workers by the fork server, without the seconds that their imports take otherwise.

    Fixtures of modules, and runs that are programs of their own, start workers as users' runs do.
    """
    monkeypatch.setattr(local, "multiprocessing", SimpleNamespace(get_context=lambda method: forkserver))
