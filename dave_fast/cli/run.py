"""`dave-fast run`: make maps for a whole dataset, in a run that can be stopped, killed and resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dave_fast.cli import options
from dave_fast.cli.options import MACHINE
from dave_fast.cli.terminal import console, print_model
from dave_fast.errors import InputError
from dave_fast.run.limits import Limits

if TYPE_CHECKING:
    from dave_fast.run.runner import RunSummary

_RESULTS = "Results"
_INT64 = 2**63
LIMITS = Limits()


def run(
    source: Annotated[
        str, typer.Argument(help="Folder, list (txt, csv, jsonl), Parquet manifest, tars, hf://NAME:SPLIT; or a URL.")
    ],
    *,
    named: options.ModelOptions,
    random_weights: options.RandomWeights = False,
    config: options.ConfigFile = None,
    out: Annotated[Path, typer.Option(help="The run's folder; the same again resumes it.")] = Path("run"),
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many rows in all.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS|predicted|label", help="What is explained.", show_default="the record's own, else predicted"
        ),
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try records again that have an error.")] = False,
    map_dtype: Annotated[
        str, typer.Option(metavar="float16|uint8", help="How maps are stored.", rich_help_panel=_RESULTS)
    ] = "float16",
    raw: Annotated[
        bool, typer.Option("--raw", help="Store the signed contributions too.", rich_help_panel=_RESULTS)
    ] = False,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="Store the model's outputs too.", rich_help_panel=_RESULTS)
    ] = False,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows a shard.", show_default="10000; 1000 with ray", rich_help_panel=_RESULTS),
    ] = None,
    commit_every: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which rows are committed.", rich_help_panel=_RESULTS)
    ] = 300.0,
    n_samples: options.Samples = None,
    seed: options.Seed = 0,
    noise_alpha: options.NoiseAlpha = None,
    shrink: options.Shrink = None,
    depth: options.Depth = "pixels",
    schedule: options.Schedule = "sequence",
    engine: Annotated[str, typer.Option(metavar="local|ray", rich_help_panel=MACHINE)] = "local",
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "--device",
            metavar="cuda:0,cuda:1|all|cpu",
            help="Devices, with a process for each.",
            show_default="best there is",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    precision: options.Precision = None,
    backend: options.Backend = "auto",
    route: options.Route = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images at a time.", show_default="4; 16 on a GPU", rich_help_panel=MACHINE),
    ] = None,
    internal_batch_size: options.InternalBatchSize = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decoding threads of each device.",
            show_default="the processors",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    watchdog: Annotated[
        float,
        typer.Option(min=1, help="Seconds without progress that end the run.", rich_help_panel=MACHINE),
    ] = 900.0,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="For reading an image; it is an error then.",
            show_default="60, at most half of --watchdog",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    max_megabytes: options.MaxMegabytes = LIMITS.bytes / 1e6,
    max_megapixels: options.MaxMegapixels = LIMITS.pixels / 1e6,
) -> None:
    """Make attribution maps for a whole dataset, as Parquet shards in the folder --out.

    Started again, a run that was stopped or killed does what is left. Read the maps with
    dave_fast.open_maps(FOLDER) or `dave-fast export`. A record that cannot be explained gets a row that says why.

    Exit code 0: all done; 1: done, some records have errors; 2: refused or ended early, and why;
    130, 143: stopped by Ctrl-C or SIGTERM.
    """
    from dave_fast.run.local import Machine
    from dave_fast.run.mapper import LABEL, MAP_DTYPES, PREDICTED, MapSettings
    from dave_fast.run.progress import Bar
    from dave_fast.run.runner import run_dataset

    if map_dtype not in MAP_DTYPES:
        raise InputError(f"--map-dtype is {map_dtype!r}; expected one of {', '.join(MAP_DTYPES)}.")
    if not -_INT64 <= seed < _INT64:
        raise InputError(f"--seed is {seed}; expected an integer of 64 bits.")
    given = options.read_config(config)
    samples, method = options.method(n_samples, noise_alpha, shrink, config=given)
    spec, screen = named.spec(given, random_weights=random_weights), console()
    settings = MapSettings(
        model=spec,
        n_samples=samples,
        seed=seed,
        target=target,
        map_dtype=map_dtype,
        depth=options.one_depth(depth),
        raw=raw,
        outputs=outputs,
        batch_size=batch_size,
        limits=Limits(
            min(LIMITS.seconds, watchdog / 2) if max_seconds is None else max_seconds,
            int(max_megabytes * 1e6),
            int(max_megapixels * 1e6),
        ),
        options={
            "precision": precision,
            "backend": backend,
            "route": route,
            **method,
            "schedule": schedule,
            "internal_batch_size": internal_batch_size,
        },
    )
    machine = Machine(_devices(devices), workers, shard_rows, commit_every, watchdog)
    if target is not None and target not in (PREDICTED, LABEL):
        from dave_fast.models.labels import known_labels

        # a wrong name is refused before weights are fetched, where the names are known
        labels = known_labels(spec)
        if labels is not None:
            labels.resolve(target)
    print_model(screen, spec)
    summary = run_dataset(
        source,
        out,
        settings,
        machine,
        engine=engine,
        limit=limit,
        retry_errors=retry_errors,
        reporter=partial(Bar, screen),
    )
    _tell(summary, out)
    if summary.stopped is not None:
        raise typer.Exit(130 if summary.stopped == "SIGINT" else 143)
    if summary.errors:
        raise typer.Exit(1)


def _devices(named: str | None) -> list[str | None]:
    """Return the devices that --devices names: one, several with commas, or "all" for every GPU."""
    if named is None:
        return [None]
    if named == "all":
        import torch

        if not torch.cuda.is_available():
            raise InputError("--devices all: torch sees no GPU here; name the devices, as in --devices cpu.")
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names: list[str | None] = [name.strip() for name in named.split(",") if name.strip()]
    if not names:
        raise InputError(f"--devices is {named!r}; expected names with commas between them, as in cuda:0,cuda:1.")
    return names


def _tell(summary: RunSummary, out: Path) -> None:
    """Print the summary of a run."""
    from rich.filesize import decimal

    from dave_fast.run.progress import duration, speed

    screen = console(stderr=False)
    devices = "1 device" if summary.devices == 1 else f"{summary.devices} devices"
    made = summary.images - summary.errors
    screen.print(
        f"{made} maps made in {duration(summary.seconds)}: {speed(summary.images_per_second)} on {devices}, "
        f"at work {100 * summary.device_share:.0f} % of the time",
        soft_wrap=True,
    )
    if summary.errors:
        screen.print(
            f"{summary.errors} records have an error instead (column 'error'; --retry-errors tries them again)"
        )
    if summary.doubles:
        ids = ", ".join(summary.doubles[:3])
        screen.print(f"ids that came twice, explained once: {ids}", style="yellow", soft_wrap=True)
    screen.print(
        f"{out}: {summary.records} records in {summary.shards} shards, {decimal(summary.bytes)}", soft_wrap=True
    )
    if summary.stopped is not None:
        screen.print("stopped before the end: the same command resumes it", style="yellow")
    else:
        screen.print(
            f'read them with dave_fast.open_maps("{out}"), or dave-fast export {out}', style="dim", soft_wrap=True
        )
