"""`dave-fast explain`: explain image files, and write pictures and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dave_fast.cli import options
from dave_fast.cli.terminal import console, loading, plain_warnings, progress, refuse
from dave_fast.defaults import DEFAULT_MODEL
from dave_fast.errors import InputError
from dave_fast.files import check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from dave_fast.explain.image_files import Done, Failed, ImageSource, Request
    from dave_fast.explain.subject import Subject
    from dave_fast.models.spec import ModelSpec

_ROWS, PICTURES = 20, "Pictures"


def explain(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGES|FOLDER]...", help="Image files, or folders of them."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Explain the embedded scene with the embedded model.")] = False,
    *,
    named: options.ModelOptions,
    random_weights: options.RandomWeights = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Class index or name, tiger+lion, tiger-lion, text:PROMPT, image:FILE, patch:ROW,COLUMN; repeatable.",
            show_default="the most probable",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="DAVE, integrated-gradients, smoothgrad, input-x-gradient, legrad ...; repeatable, and compared.",
            show_default="DAVE",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Explain the k most probable classes.", show_default="1; 2 with --demo"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("maps"),
    config: options.ConfigFile = None,
    n_samples: options.Samples = None,
    seed: options.Seed = 0,
    noise_alpha: options.NoiseAlpha = None,
    shrink: options.Shrink = None,
    depth: options.Depths = "pixels",
    size: Annotated[
        str,
        typer.Option(
            metavar="original|model|enlarged",
            help="Of the pictures: the photograph's own, the model's input, or this enlarged.",
            rich_help_panel=PICTURES,
        ),
    ] = "original",
    colormap: Annotated[
        str | None,
        typer.Option(help="A colour map of matplotlib.", show_default="inferno", rich_help_panel=PICTURES),
    ] = None,
    opacity: Annotated[
        float | None,
        typer.Option(help="Of the strongest colour, 0 to 1.", show_default="0.92", rich_help_panel=PICTURES),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            help="Of a map's values, 0.5 to 1, that is drawn as the strongest.",
            show_default="0.995",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    signed: Annotated[
        bool | None,
        typer.Option(
            "--signed/--unsigned",
            help="Whether pictures show, in blue, what speaks against an answer, too.",
            show_default="for differences",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    schedule: options.Schedule = "sequence",
    device: options.Device = None,
    precision: options.Precision = None,
    backend: options.Backend = "auto",
    route: options.Route = "auto",
    internal_batch_size: options.InternalBatchSize = None,
) -> None:
    """Explain what a model sees in images.

    Writes for every image, into the folder --out, files that are named by the image and the question, such as

    photo.292-tiger.overlay.png: the map over the photograph; photo.292-tiger.map.png: the map;
    photo.292-tiger.npz: map, signed contributions, class, probability, settings.

    With --top-k 2 or more, several --target, --method or depths: a set each, and a figure of them all.
    For a --depth other than the pixels it prints what the tokens there account for.

    A --target is a class (292, tiger, "tiger"), a sum or a difference of classes
    (tiger+lion; tiger-lion: why this and not that), or for models with embeddings or tokens
    text:a cat, text:a cat - text:a dog, image:other.jpg, patch:3,5, patch:3,5@probe.safetensors#7,
    segment:cat@120,80 (a class at y, x of a segmentation), box:cat@20,40,180,200 (of a detection).

    Exit code 0: all done; 1: some images could not be explained;
    2: refused or stopped, and why.
    """
    from dave_fast.explain.depth import check_depth, parse_depth
    from dave_fast.explain.image_files import Request
    from dave_fast.images.drawing import check_size

    given = options.read_config(config)
    if target and top_k is not None:
        raise InputError("--target names what to explain and --top-k takes the most probable: give one of them.")
    # of what the targets ask: the model's tokens, its detections, or its output
    asked = {next((word for word in ("patch:", "box:") if text.strip().startswith(word)), "") for text in target or ()}
    if len(asked) > 1:
        raise InputError(
            "patch:ROW,COLUMN asks the model's tokens, box:CLASS@… its detections and other targets its output: one "
            "run for each kind."
        )
    # The embedded scene has two digits, which shows that maps differ by class.
    top_k = top_k or (2 if demo and not target else 1)
    samples, settings = options.method(n_samples, noise_alpha, shrink, config=given)
    style = {"colormap": colormap, "opacity": opacity, "quantile": quantile}
    request = Request(
        out,
        tuple(target or ()),
        top_k,
        samples,
        seed,
        figure=demo,
        depths=check_depth(parse_depth(depth)),
        size=check_size(size),
        signed=signed,
        style={name: value for name, value in style.items() if value is not None},
    )
    keywords = {
        "device": device,
        "precision": precision,
        "backend": backend,
        "route": route,
        **settings,
        "schedule": schedule,
        "internal_batch_size": internal_batch_size,
    }
    screen, default = console(), "demo" if demo else DEFAULT_MODEL
    with plain_warnings(screen):
        # What can be refused is refused before the model is loaded.
        check_writable(out)
        sources = _demo_sources(images, named, random_weights) if demo else _sources(images or [], out)
        names = _check_methods(method)
        spec = named.spec(None if demo else given, default=default, random_weights=random_weights)
        _check_targets(request.targets, spec)
        with loading(screen, spec):
            subject = _load(spec, keywords, "".join(asked))
        done, failed = _run(screen, subject, sources, request, names)
    _summary(done, failed, request)
    if failed:
        raise typer.Exit(1 if done else 2)


def _check_methods(given: Sequence[str] | None) -> list[str]:
    """Return the names of methods; raise InputError where there is no such one, or its package is missing."""
    if not given:
        return []
    from dave_fast.evaluate.comparison import absence
    from dave_fast.evaluate.methods import known_name

    names = list(dict.fromkeys(map(known_name, given)))
    for error in filter(None, map(absence, names)):
        raise error
    return names


def _check_targets(targets: Sequence[str], spec: ModelSpec) -> None:
    """Raise InputError for a target that is no class, where the classes are known before the model is loaded."""
    from dave_fast.models.labels import known_labels
    from dave_fast.targets.text import parse_target

    labels = known_labels(spec) if targets else None
    if labels is not None:
        for text in targets:
            parse_target(text, labels)


def _sources(images: Sequence[Path], out: Path) -> list[ImageSource]:
    """Find the images to explain; a single one is read at once, so that nothing is loaded where it cannot be read."""
    from dave_fast.explain.image_files import sources_of
    from dave_fast.images import find_images

    if not images:
        raise InputError("no image was given: name image files or a folder, or try --demo.")
    sources = sources_of(find_images(images, skip=out), images)
    if len(sources) == 1:
        image = sources[0].read()
        sources = [replace(sources[0], read=lambda: image)]
    return sources


def _demo_sources(
    images: Sequence[Path] | None, named: options.ModelOptions, random_weights: bool
) -> list[ImageSource]:
    """Return the embedded scene as the image to explain."""
    from dave_fast.explain.image_files import ImageSource
    from dave_fast.models.demo import demo_scene

    if images or random_weights or named not in (options.ModelOptions(), options.ModelOptions("demo")):
        raise InputError("--demo brings its own image and model; for yours, leave --demo out.")
    return [ImageSource("demo", "the embedded scene", lambda: demo_scene().image)]


def _load(spec: ModelSpec, keywords: dict[str, Any], asked: str) -> Subject:
    """Load a model; where its tokens or detections are asked ("patch:", "box:") these are its output."""
    from dave_fast.explain.explainer import DAVE
    from dave_fast.explain.subject import Subject
    from dave_fast.targets import detections_of, tokens_of

    explainer = DAVE(spec, **keywords)
    if asked:
        keywords = keywords | {"noise_alpha": explainer.sampling.noise_alpha}
        changed = tokens_of if asked == "patch:" else detections_of
        explainer = DAVE(changed(explainer.model), **keywords)
    if spec.random_weights:
        # the .npz files carry the name
        explainer.model_name += ", random weights"
    return Subject.of(explainer)


def _run(
    screen: Console, subject: Subject, sources: Sequence[ImageSource], request: Request, names: Sequence[str]
) -> tuple[list[Done], list[Failed]]:
    """Explain all images under a progress bar, and print failures as they come."""
    from dave_fast.explain.image_files import Done, explain_files

    methods: dict[str, Any] = {}
    if names:
        from dave_fast.evaluate.comparison import Explainer

        methods = {name: Explainer(name, subject.explainer) for name in names}
    done: list[Done] = []
    failed: list[Failed] = []
    share = request.n_samples
    with progress(screen, sources[0].path) as update:

        def show(rows: int, of: int) -> None:
            number = len(done) + len(failed)
            update(share * number + share * rows // of, share * len(sources), sources[number].path)

        for outcome in explain_files(subject, sources, request, methods=methods, progress=show):
            if isinstance(outcome, Done):
                done.append(outcome)
            else:
                failed.append(outcome)
                refuse(outcome.error, screen)
    return done, failed


def _summary(done: Sequence[Done], failed: Sequence[Failed], request: Request) -> None:
    """Print what was explained, as what, and the paths of the files."""
    from rich.table import Table
    from rich.text import Text

    from dave_fast.images.drawing import percent

    screen = console(stderr=False)
    results = [result for one in done for result in one.results]
    if results:
        # a column that says nothing where all maps are of pixels
        deep = any(result.accounted for result in results)
        several = any(result.method != "DAVE" for result in results)
        table = Table(
            "image",
            "target",
            "probability",
            *["depth"] * deep,
            *["method"] * several,
            "overlay",
            box=None,
            header_style="bold",
            pad_edge=False,
        )
        for result in results[:_ROWS]:
            name = f"{result.class_name} ({result.target})" if result.target >= 0 else result.class_name
            overlay = str(result.overlay.relative_to(request.out))
            cells = (
                result.source.path,
                name,
                percent(result.probability),
                *[result.depth] * deep,
                *[result.method] * several,
                overlay,
            )
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        screen.print(table)
        if len(results) > _ROWS:
            screen.print(f"… and {len(results) - _ROWS} more")
        for result in results[:_ROWS]:
            if result.accounted:
                about = f"{result.source.path}, {result.class_name}: " if len(results) > 1 else ""
                screen.print(Text(f"{about}{result.accounted}"), soft_wrap=True)
    images = "1 image" if len(done) == 1 else f"{len(done)} images"
    failures = f"; {len(failed)} could not be explained" if failed else ""
    screen.print(f"{images} explained in {request.out}{failures}", soft_wrap=True)
    if results:
        screen.print("beside each .overlay.png: .map.png and .npz", style="dim", soft_wrap=True)
    if len(done) == 1 and done[0].figure:
        screen.print(f"picture: {done[0].figure}", soft_wrap=True)
