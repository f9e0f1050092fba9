"""Find image files: those behind paths, and those in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from dave_fast.errors import InputError, reason_of

# Formats that Pillow recognises but cannot draw without a program or plug-in of its own.
# IPTC holds a picture of any format, and Pillow opens it whatever it is.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

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
    found: dict[str, Path] = {}
    for path in given:
        if not path.exists():
            raise InputError(f"there is no file or folder {path}.")
        for file in sorted(map(Path, walk_images(path, skip=skip))) if path.is_dir() else [path]:
            # realpath, since resolve() raises for a link to itself.
            found.setdefault(os.path.realpath(file), file)
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
        follow: whether symbolic links to folders are followed. A folder that is reached by several ways is searched
            once: by its own path if that is within `folder`, else by the first link. So the search ends, even where
            links lead upwards.

    Raises:
        InputError: a folder cannot be listed.
    """
    skipped = None if skip is None else os.path.realpath(skip)
    seen: set[tuple[int, int]] = set()
    # Of all folders that are reached without a link; made at the first link.
    own: set[tuple[int, int]] | None = None
    waiting = [os.fspath(folder)]
    while waiting:
        root = waiting.pop()
        if (key := _key(root)) in seen:
            continue
        seen.add(key)
        names, folders = _listed(root)
        for name in names:
            if not name.endswith(OURS) and is_image(name):
                yield os.path.join(root, name)
        below = []
        for path, linked in folders:
            if skipped is not None and os.path.realpath(path) == skipped:
                continue
            if linked and follow and own is None:
                own = _own_folders(folder, skipped)
            if not linked or (follow and own is not None and _key(path) not in own):
                below.append(path)
        waiting += reversed(below)


def _own_folders(folder: str | os.PathLike[str], skipped: str | None) -> set[tuple[int, int]]:
    """Return the keys of a folder and of those below it that are reached without a link."""
    found, waiting = set(), [os.fspath(folder)]
    while waiting:
        root = waiting.pop()
        found.add(_key(root))
        waiting += [path for path, linked in _listed(root)[1] if not linked and os.path.realpath(path) != skipped]
    return found


def _listed(folder: str) -> tuple[list[str], list[tuple[str, bool]]]:
    """Return the names of a folder's files, and (path, whether it is a link) of its folders; sorted, no hidden ones."""
    names, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _leads_to_folder(entry):
                    folders.append((os.path.join(folder, entry.name), entry.is_symlink()))
                else:
                    names.append(entry.name)
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {reason_of(error)}.") from error
    return sorted(names), sorted(folders)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link to itself; who reads it is told so.
    except OSError:
        return False


def _key(folder: str) -> tuple[int, int]:
    """Return device and number of a folder, which are the same by whatever path it is reached."""
    try:
        found = os.stat(folder)
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {reason_of(error)}.") from error
    return found.st_dev, found.st_ino


def readable_formats() -> tuple[str, ...]:
    """Return the formats that this Pillow reads itself, also those that other packages have added to it until now."""
    # First those that most files have.
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in _STUBS)


def stub_format(head: bytes) -> str | None:
    """Return the format of a file of which Pillow knows no more than how it begins, by 16 bytes; None of others."""
    Image.init()
    for name in sorted(_STUBS & Image.OPEN.keys()):
        accept = Image.OPEN[name][1]
        if accept is not None and accept(head) is True:
            return name
    return None


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image format that this Pillow reads."""
    return os.path.splitext(name)[1].lower() in _suffixes()


@cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case with their dot, of the formats that this Pillow reads."""
    readable = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)
