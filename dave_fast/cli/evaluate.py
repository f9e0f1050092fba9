"""`dave-fast evaluate`: measure how good maps are, and write a report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dave_fast.cli import options
from dave_fast.cli.options import MACHINE, METHOD
from dave_fast.cli.terminal import console, loading, note, plain_warnings, progress
from dave_fast.defaults import DEFAULT_MODEL
from dave_fast.errors import InputError
from dave_fast.files import check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from dave_fast.evaluate import EvaluationSettings, ExampleSource
    from dave_fast.evaluate.summary import Summary
    from dave_fast.explain.depth import Depth
    from dave_fast.explain.subject import Subject

_HOW_MUCH = "How much"
# sources that stand for the embedded scenes
_DEMO = (None, "demo")


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="A folder of images; the embedded scenes by default."),
    ] = None,
    *,
    named: options.ModelOptions,
    config: options.ConfigFile = None,
    out: Annotated[Path, typer.Option(help="The folder for the report.")] = Path("evaluation"),
    boxes: Annotated[
        Path | None,
        typer.Option(help="Where the objects are: a folder of ImageNet's XML files, a .csv, or a .json."),
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="A folder of PNG masks, named as the images.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Baselines to compare, separated by commas.", show_default="all there are")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="localisation, curves, stability, classes, seeds, randomisation, grids.", show_default="all of them"
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images for localisation.", rich_help_panel=_HOW_MUCH)] = 100,
    probes: Annotated[
        int,
        typer.Option(min=0, help="Of these, for curves, stability, classes, seeds.", rich_help_panel=_HOW_MUCH),
    ] = 16,
    randomised: Annotated[
        int, typer.Option(min=0, help="Of these, for parameter randomisation.", rich_help_panel=_HOW_MUCH)
    ] = 4,
    mosaics: Annotated[
        int,
        typer.Option(min=1, help="2×2 mosaics; 3×3 mosaics are fewer, for as many maps.", rich_help_panel=_HOW_MUCH),
    ] = 4,
    grids: Annotated[
        str, typer.Option(help="Some of 2x2, 3x3, 2x2-rescaled, 3x3-rescaled.", rich_help_panel=_HOW_MUCH)
    ] = "2x2,3x3",
    protocols: Annotated[
        str, typer.Option(help="Some of dave, rise-deletion, rise-insertion, quantus.", rich_help_panel=_HOW_MUCH)
    ] = "dave,rise-deletion,rise-insertion",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the random methods.", rich_help_panel=_HOW_MUCH)] = 3,
    n_samples: options.Samples = None,
    noise_alpha: options.NoiseAlpha = None,
    shrink: options.Shrink = None,
    depth: options.Depth = "pixels",
    seed: Annotated[int, typer.Option(min=0, help="The first seed.", rich_help_panel=METHOD)] = 0,
    device: options.Device = None,
    precision: options.Precision = None,
    backend: options.Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.", rich_help_panel=MACHINE)] = 16,
) -> None:
    """Measure how good attribution maps are, beside other methods on the same images.

    Writes report.html, report.md, results.json, scores.csv and examples.png into --out. Files need labels for
    accuracy and mosaics (folders named by class or WordNet id, or the annotations' own), and --boxes or --masks for
    the pointing games; what cannot be measured without them is left out. At a --depth other than the pixels, DAVE's
    map of the pixels is a row of its own.
    """
    from dave_fast.evaluate.settings import GROUPS, EvaluationSettings
    from dave_fast.explain.subject import Subject

    chosen = EvaluationSettings(
        images=images,
        probes=probes,
        randomised=randomised,
        pairs=probes,
        mosaics=mosaics,
        grids=_listed(grids),
        protocols=_listed(protocols),
        seeds=seeds,
        seed=seed,
        batch_size=batch_size,
        methods=None if methods is None else _listed(methods),
        groups=GROUPS if groups is None else _listed(groups),
    )
    where = options.one_depth(depth)
    screen = console()
    with plain_warnings(screen):
        check_writable(out)
        given = options.read_config(config)
        spec = named.spec(given, default="demo" if source in _DEMO else DEFAULT_MODEL)
        samples, method = options.method(n_samples, noise_alpha, shrink, config=given)
        files = _files(source, spec.name, annotated=boxes is not None or masks is not None)
        if files is None:
            screen.print(options.DEMO_ALONE, soft_wrap=True)
        with loading(screen, spec):
            subject = Subject.load(spec, device=device, precision=precision, backend=backend, **method)
        examples = _examples(files, source, boxes, masks, subject, chosen)
        _measure(screen, spec.name, subject, examples, samples, chosen, where, out)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _measure(
    screen: Console,
    model: str,
    subject: Subject,
    examples: ExampleSource,
    n_samples: int,
    settings: EvaluationSettings,
    depth: Depth,
    out: Path,
) -> None:
    """Measure, write the report and print its summary."""
    from dave_fast.cli.info import collect
    from dave_fast.evaluate import evaluate as measure
    from dave_fast.evaluate.methods import MethodSettings
    from dave_fast.evaluate.report import About, write

    explainer, prepare, labels = subject
    network = explainer.model.to(explainer.device).eval().requires_grad_(False)
    if prepare.note:
        note(screen, prepare.note)
    used = {
        "device": str(explainer.device),
        "precision": explainer.precision,
        "backend": explainer.backend,
        "noise_alpha": explainer.sampling.noise_alpha,
        "shrink": explainer.shrink,
    }
    setup = MethodSettings(n_samples, used, 1 / min(prepare.std), _named(subject, depth))
    with progress(screen, "evaluating") as update:
        results = measure(network, examples, settings, setup, update)
    environment = collect(explainer.device.type)
    versions = {**environment.versions, "device": environment.devices[-1].name, "threads": environment.threads}
    command = shlex.join(["dave-fast", *sys.argv[1:]])
    about = About(model, examples.title, settings, setup, labels, prepare, versions, command, examples.skipped)
    _tell(write(out, results, about), results.absent, examples.skipped, out)


def _named(subject: Subject, depth: Depth) -> Depth:
    """Return the resolved depth, "pixels", a block or a range; what the model lacks is refused at once."""
    import torch

    from dave_fast.explain.depth import depth_of, places_of

    grey = torch.zeros(1, 3, *subject.prepare.size)
    return depth_of(*places_of([depth], lambda: subject.explainer.blocks(grey)))


def _files(source: str | None, model: str, *, annotated: bool) -> list[Path] | None:
    """Find the image files of a folder; return None for the embedded scenes."""
    from dave_fast.images import find_images

    if source in _DEMO:
        if model != "demo" or annotated:
            raise InputError("the embedded scenes go with the model 'demo' and its masks: name a folder instead.")
        return None
    return find_images([Path(str(source))])


def _examples(
    files: Sequence[Path] | None,
    source: str | None,
    boxes: Path | None,
    masks: Path | None,
    subject: Subject,
    settings: EvaluationSettings,
) -> ExampleSource:
    """Return the examples that files and their annotations make, or the embedded scenes without files."""
    from dave_fast.evaluate import DemoScenes, ImageFiles
    from dave_fast.evaluate.annotations import Annotations, read_boxes

    if files is None or source is None:
        return DemoScenes(settings.images, settings.seed)
    if masks is not None and not masks.is_dir():
        raise InputError(f"--masks {masks}: there is no such folder.")
    noted = {} if boxes is None else read_boxes(boxes)
    annotations = Annotations(subject.labels, noted, masks)
    title = f"{len(files)} files of {Path(source).resolve().name}"
    return ImageFiles(_spread(files), subject.prepare, annotations, title)


def _spread(files: Sequence[Path]) -> list[Path]:
    """Return files in turns from each folder, so that the first images are of many classes."""
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    return [file for turn in zip_longest(*folders.values()) for file in turn if file]


def _tell(summary: Summary, absent: dict[str, str], skipped: dict[str, str], out: Path) -> None:
    """Print the verdicts, what was not run, and the path of the report."""
    from rich.table import Table
    from rich.text import Text

    from dave_fast.evaluate.settings import VARIANTS

    screen = console(stderr=False)
    table = Table("metric", "maps", "DAVE", "rival", "of the rival", "verdict", box=None, header_style="bold")
    for metric in summary.metrics:
        for variant in VARIANTS:
            if found := summary.verdicts[variant].get(metric):
                cells = (metric, variant, found.dave.text(), found.rival, found.other.text(), found.words)
                table.add_row(*(Text(cell) for cell in cells))
    screen.print(table)
    for name, why in absent.items():
        screen.print(f"not run: {name}: {why}", style="dim", soft_wrap=True)
    if skipped:
        screen.print(f"{len(skipped)} files left out; the report names them", style="yellow", soft_wrap=True)
    screen.print(f"report: {out / 'report.html'}", soft_wrap=True)
