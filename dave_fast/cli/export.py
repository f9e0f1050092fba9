"""`dave-fast export`: write the maps of a run in forms that other programs read."""

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
    to: Annotated[str, typer.Option(metavar="html|folder|png|coco|tensorboard|npy|zarr|virelay", help="The form.")],
    out: Annotated[Path, typer.Option(help="A new folder; a new file for virelay.")],
    target: Annotated[int | None, typer.Option(min=0, help="Only maps of this class.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many records.")] = None,
    share: Annotated[float, typer.Option(help="Of a map's sum that its region holds, for coco.")] = 0.5,
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names: a file with one a line, or JSON.", show_default="those of the run"),
    ] = None,
    max_megabytes: options.MaxMegabytes = LIMITS.bytes / 1e6,
    max_megapixels: options.MaxMegapixels = LIMITS.pixels / 1e6,
) -> None:
    """Write the maps of a run for looking at, or for other programs.

    html is a gallery in a browser; folder pictures and JSON; png pictures; coco evidence regions in the photographs'
    pixels, for FiftyOne and others; tensorboard its event files; npy, zarr and virelay arrays.

    Exit code 0: all written; 1: some photographs could not be read again; 2: refused, and why.
    """
    from dave_fast.explain.depth import PIXELS, name_of
    from dave_fast.run.export import export as write
    from dave_fast.run.export import form_of
    from dave_fast.run.reader import open_maps

    form = form_of(to)
    maps = open_maps(folder).filter(status=None if form.errors else "ok", target=target)
    maps = maps if limit is None else maps[:limit]
    if labels is not None:
        maps = maps.named(labels)
    name = f"exporting to {to}"
    limits = Limits(bytes=int(max_megabytes * 1e6), pixels=int(max_megapixels * 1e6))
    with progress(console(), name, "records") as update:
        missing = write(maps, to, out, lambda done: update(done, len(maps), name), limits, share)
    what = f"the tokens of {name_of(maps.depth)}" if maps.depth != PIXELS else PIXELS
    made = int((maps.column("status") == "ok").sum())
    errors = f", and {len(maps) - made} errors," if made < len(maps) else ""
    console(stderr=False).print(f"{made} maps of {what}{errors} written to {out}", soft_wrap=True)
    if missing:
        console().print(f"{missing} photographs could not be read again: nothing is laid over them", style="yellow")
        raise typer.Exit(1)
