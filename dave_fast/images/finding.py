"""Find image files: those behind paths, and those in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from dave_fast.errors import InputError, reason_of

# Formats that Pillow recognises but cannot draw without a program or plug-in of its own.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# How the names of our own pictures end.
OURS = (".overlay.png", ".map.png", ".figure.png")


def find_images(paths: Iterable[str | os.PathLike[str]], *, skip: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the image files behind paths: files as given, folders searched recursively, in sorted order.

    In folders, the suffix decides; hidden files are left out, and so are the pictures of an earlier run. A file that is
    reached twice is listed once.

    Args:
        paths: files and folders.
        skip: the folder of results, which is not searched.

    Raises:
        InputError: a path does not exist, a folder cannot be listed, or there is no image.
    """
    given = [Path(path) for path in paths]
    found: dict[Path, Path] = {}
    for path in given:
        if not path.exists():
            raise InputError(f"there is no file or folder {path}.")
        for file in sorted(map(Path, walk_images(path, skip=skip))) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    if not found:
        where = ", ".join(map(str, given)) or "nothing was given"
        raise InputError(f"no image to explain ({where}): give image files, or a folder that has some.")
    return list(found.values())


def walk_images(
    folder: str | os.PathLike[str], *, skip: str | os.PathLike[str] | None = None, follow: bool = False
) -> Iterator[str]:
    """Yield the paths of the images in a folder and below, in a reproducible order.

    Args:
        folder: is searched as `find_images` searches folders.
        skip: a folder that is not searched.
        follow: whether symbolic links to folders are followed.

    Raises:
        InputError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {reason_of(error)}.")

    skipped = None if skip is None else Path(skip).resolve()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=follow):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(root, f).resolve() != skipped)
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(OURS) and is_image(name):
                yield os.path.join(root, name)


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image format that this Pillow reads."""
    return os.path.splitext(name)[1].lower() in _suffixes()


@cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case with their dot, of the formats that this Pillow reads."""
    Image.init()
    readable = set(Image.OPEN) - _STUBS
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)
