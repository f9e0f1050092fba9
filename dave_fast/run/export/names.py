"""Names of files for ids, which may be any text."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

# The most bytes of a file's name, below the usual 255 of file systems by the ending, a hash and what is temporary;
# and of its path.
_PART_BYTES, _PATH_BYTES = 180, 1000


def file_names(ids: Sequence[str], endings: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Return a relative path for each id, of which no two make one file, whatever the file system takes to be equal.

    It is the id as far as that can name a file. Where another id has made the file before, or makes a folder of that
    name, a hash of the id follows.

    Args:
        ids: the ids.
        endings: of the files that are made of each path.
        taken: names of other files in the folder.
    """
    plain = [_file_name(record_id) for record_id in ids]
    used = {_folded(name) for name in taken}
    used |= {_folded(str(folder)) for name in plain for folder in PurePosixPath(name).parents}
    names = []
    for record_id, name in zip(ids, plain, strict=True):
        unique, number = name, 0
        while not used.isdisjoint(files := {_folded(f"{unique}{ending}") for ending in endings}):
            unique, number = f"{name}-{_hash(record_id * (number + 1))}", number + 1
        used |= files
        names.append(unique)
    return names


def _file_name(record_id: str) -> str:
    """Return an id as a relative path that cannot leave its folder, and that every file system takes."""
    # runs of others may have NULs in their ids, around dots too
    text = record_id.replace("\0", "").replace("\\", "/").replace(":", "_")
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    name = "/".join(_cut(part, _PART_BYTES) for part in parts) or "_"
    # A path has a limit too.
    return name if len(name.encode()) <= _PATH_BYTES else f"{_cut(parts[-1], _PART_BYTES)}-{_hash(record_id)}"


def _cut(part: str, limit: int) -> str:
    """Return a name of at most so many bytes: the end of a longer one, and a hash of it."""
    content = part.encode()
    return part if len(content) <= limit else f"{content[20 - limit :].decode(errors='ignore')}-{_hash(part)}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _folded(path: str) -> str:
    """Return what is equal for paths that are one file where case or the form of accents does not count."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
