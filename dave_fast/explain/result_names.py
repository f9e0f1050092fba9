"""Names of an image's result files: one for each target and depth, each different."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dave_fast.explain.depth import name_of

if TYPE_CHECKING:
    from dave_fast.explain.arrays import Scored


def stems_of(name: str, explained: Sequence[Scored]) -> list[str]:
    """Return the file names of an image's targets without suffix, each different.

    Args:
        name: of the image's results.
        explained: the targets.
    """
    if len(explained) == 1:
        return [name]
    stems: list[str] = []
    for target, words, _ in explained:
        stem = f"{name}.{f'{target}-' if target >= 0 else ''}{_slug(words)}"
        stems.append(f"{stem}-{len(stems)}" if stem in stems else stem)
    return stems


def endings_of(depths: Sequence[str | int]) -> dict[int, str]:
    """Return what each different depth adds to a stem, by the first place where it stands; nothing where there is one.

    Args:
        depths: "pixels" and numbers of blocks.
    """
    different = dict.fromkeys(depths)
    several = len(different) > 1
    return {depths.index(depth): f".{name_of(depth).replace(' ', '')}" if several else "" for depth in different}


def _slug(name: str) -> str:
    """Return a target's name as a part of a file name: letters, digits and dashes."""
    name = name.replace(" + ", " and ").replace(" − ", " not ")
    return re.sub(r"[^0-9a-z]+", "-", name.casefold()).strip("-")[:40] or "target"
