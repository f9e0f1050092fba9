"""The forms of an export, and the checks before one is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dave_fast.errors import InputError
from dave_fast.run.export.arrays import write_npy, write_zarr
from dave_fast.run.export.coco import write_coco
from dave_fast.run.export.gallery import write_gallery
from dave_fast.run.export.job import Job, Progress
from dave_fast.run.export.pictures import write_folder, write_png
from dave_fast.run.export.tensorboard import write_tensorboard
from dave_fast.run.export.virelay import write_virelay
from dave_fast.run.limits import Limits
from dave_fast.run.reader import Maps


@dataclass(frozen=True)
class Form:
    """A form of an export.

    Attributes:
        write: writes it, and returns the number of rows whose image could not be read again.
        several_sizes: whether the maps may have several sizes.
        errors: whether rows with an error are part of it.
    """

    write: Callable[[Job], int]
    several_sizes: bool = True
    errors: bool = False


FORMS = {
    "html": Form(write_gallery, errors=True),
    "folder": Form(write_folder),
    "png": Form(write_png),
    "coco": Form(write_coco),
    "tensorboard": Form(write_tensorboard),
    "npy": Form(write_npy, several_sizes=False),
    "zarr": Form(write_zarr, several_sizes=False),
    "virelay": Form(write_virelay, several_sizes=False),
}


def form_of(to: str) -> Form:
    """Return a form by its name; raise InputError if there is none."""
    if to not in FORMS:
        raise InputError(f"cannot export to {to!r}; expected one of {', '.join(FORMS)}.")
    return FORMS[to]


def export(
    maps: Maps,
    to: str,
    out: str | os.PathLike[str],
    progress: Progress = lambda done: None,
    limits: Limits | None = None,
    share: float = Job.share,
) -> int:
    """Write the maps in another form.

    Args:
        maps: rows of a run. Those with errors are left out, except by "html".
        to: a name of `FORMS`.
        out: a folder, or a file (virelay), that does not exist yet.
        progress: called with the number of rows written so far.
        limits: of an image that is read again; None: the defaults.
        share: of a map's sum that its evidence region holds, in (0, 1]; for "coco".

    Returns:
        The number of rows that could not be written in full: their image could not be read again.

    Raises:
        InputError: `out` exists or cannot be written, a package is missing, there is no map or no image, the share is
            out of range, or the maps have several sizes and the form is of arrays.
    """
    form = form_of(to)
    if not 0 < share <= 1:
        raise InputError(f"the share is {share:g}; expected more than 0 and at most 1, as in --share 0.5.")
    maps = maps if form.errors else maps.filter(status="ok")
    if not len(maps):
        raise InputError("there is no map to export, only rows with errors or no rows: choose other rows.")
    target = Path(out)
    if os.path.lexists(target):
        raise InputError(f"{target} exists already; choose another --out, or delete it.")
    sizes = set(zip(maps.column("height").tolist(), maps.column("width").tolist(), strict=True))
    if len(sizes) > 1 and not form.several_sizes:
        several = ", ".join(f"--to {name}" for name, other in FORMS.items() if other.several_sizes)
        raise InputError(f"the maps have several sizes, {sorted(sizes)}; expected one: only {several} take several.")
    return form.write(Job(maps, target, progress, limits or Limits(), share))
