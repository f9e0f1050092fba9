"""`dave-fast export`: write the maps of a run in formats that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dave_fast.cli import options
from dave_fast.cli.terminal import console, progress
from dave_fast.run.limits import Limits

LIMITS = Limits()


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    to: Annotated[str, typer.Option(metavar="zarr|npy|png|virelay", help="The format.")],
    out: Annotated[Path, typer.Option(help="A new folder; a new file for virelay.")],
    target: Annotated[int | None, typer.Option(min=0, help="Only maps of this class.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many maps.")] = None,
    max_megabytes: options.MaxMegabytes = LIMITS.bytes / 1e6,
    max_megapixels: options.MaxMegapixels = LIMITS.pixels / 1e6,
) -> None:
    """Write the maps of a run as a Zarr v3 group, as .npy, as PNG overlays or as ViRelAy's HDF5.

    Exit code 0: all written; 1: some images of overlays could not be read again; 2: refused, and why.
    """
    from dave_fast.explain.depth import PIXELS, name_of
    from dave_fast.run.export import export as write
    from dave_fast.run.reader import open_maps

    maps = open_maps(folder).filter(status="ok", target=target)
    maps = maps if limit is None else maps[:limit]
    name = f"exporting to {to}"
    limits = Limits(bytes=int(max_megabytes * 1e6), pixels=int(max_megapixels * 1e6))
    with progress(console(), name, "maps") as update:
        missing = write(maps, to, out, lambda done: update(done, len(maps), name), limits)
    what = f"the tokens of {name_of(maps.depth)}" if maps.depth != PIXELS else PIXELS
    console(stderr=False).print(f"{len(maps)} maps of {what} written to {out}", soft_wrap=True)
    if missing:
        console().print(f"{missing} images could not be read again: they have no overlay", style="yellow")
        raise typer.Exit(1)
