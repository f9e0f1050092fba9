"""`dave-fast tune`: choose noise_alpha and the number of samples for a model from a few of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dave_fast.cli import options
from dave_fast.cli.terminal import console, loading, note, plain_warnings, progress
from dave_fast.defaults import DEFAULT_MODEL
from dave_fast.errors import ImageError, InputError
from dave_fast.files import check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from dave_fast.evaluate.tuning import Tuning
    from dave_fast.images import Preprocessing

CONFIG, PICTURE = "dave-fast.toml", "tune.png"


def tune(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGES|FOLDER]...", help="Images that the model is used on; without, the demo."),
    ] = None,
    *,
    named: options.ModelOptions,
    out: Annotated[Path, typer.Option(help="The folder for the configuration and the picture.")] = Path("tuned"),
    images: Annotated[int, typer.Option(min=3, help="How many of the images to use.")] = 8,
    quality: Annotated[
        float, typer.Option(help="Correlation with the converged map that n_samples is chosen for.")
    ] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal results.")] = 0,
    device: options.Device = None,
    precision: options.Precision = None,
    backend: options.Backend = "auto",
) -> None:
    """Choose noise_alpha and n_samples for a model, without labels.

    Takes noise in a fixed proportion to the spread of the images' pixels, less where the model then loses its own
    decision in half of the samples; and the samples for a map of --quality. The maps are those of the pixels.

    Writes dave-fast.toml, which explain, run and evaluate take as --config, and tune.png, the curves.
    """
    from dave_fast.cli.config import Config, save_config
    from dave_fast.images import find_images

    screen = console()
    with plain_warnings(screen):
        check_writable(out)
        spec = named.spec(default=DEFAULT_MODEL if paths else "demo")
        if not paths and spec.name != "demo":
            raise InputError(f"name images that {spec.name} is used on, or a folder: tuning takes three or more.")
        files = find_images(paths) if paths else []
        if not paths:
            screen.print(options.DEMO_ALONE, soft_wrap=True)
        with loading(screen, spec):
            from dave_fast.evaluate.tuning import tune as measure
            from dave_fast.explain.subject import Subject

            # The level is what is tuned: any value will do for loading.
            subject = Subject.load(spec, device=device, precision=precision, backend=backend, noise_alpha=0.0)
        inputs = _inputs(screen, subject.prepare, files, images, seed)
        with progress(screen, "tuning") as update:
            found = measure(subject.explainer, inputs, quality=quality, seed=seed, progress=update)
    # On the command line class names are always a file.
    names = spec.labels if isinstance(spec.labels, str) else None
    own = (spec.weights, spec.num_classes, names, spec.image_size, spec.link)
    # the number of samples is that of such maps
    shrink = subject.explainer.shrink
    # a folder, as seen from wherever the file is used
    folder = Path(spec.name.removeprefix("hf:"))
    name = f"hf:{folder.resolve()}" if spec.name.startswith("hf:") and folder.is_dir() else spec.name
    save_config(Config(name, found.noise_alpha, found.n_samples, *own, shrink=shrink), out / CONFIG)
    picture(found, out / PICTURE)
    _tell(found, out)


def _inputs(screen: Console, prepare: Preprocessing, files: Sequence[Path], images: int, seed: int) -> Any:
    """Return inputs (B, 3, H, W) of images in equal steps through the files, or of embedded scenes without files.

    Images that cannot be read are named in a note and left out.
    """
    import torch

    from dave_fast.images import read_image
    from dave_fast.models.demo import draw_scenes

    if not files:
        scenes = draw_scenes(images, seed, split="test").images
        return torch.from_numpy(scenes).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    made: list[Any] = []
    for file in files[:: max(1, len(files) // images)]:
        if len(made) == images:
            break
        try:
            made.append(prepare(read_image(file))[0])
        except ImageError as error:
            note(screen, str(error))
    if len(made) < 3:
        raise InputError(f"{len(made)} images could be read: tuning takes three or more; eight are better.")
    return torch.stack(made)


def _tell(found: Tuning, out: Path) -> None:
    """Print what was chosen and why, and the paths of the files."""
    screen = console(stderr=False)
    text = f"noise_alpha = {found.noise_alpha:g} for images of spread {found.spread:.2f}"
    if found.noise_alpha < found.by_spread:
        text += f", halved from {found.by_spread:g} until half of the samples keep the model's decision"
    elif found.decides:
        text += f"; {found.kept_at(found.noise_alpha):.0%} of the samples keep the model's decision"
    screen.print(text, soft_wrap=True)
    last, error = list(found.errors.items())[-1]
    screen.print(
        f"n_samples = {found.n_samples} for a correlation of {found.quality:g} with the converged map "
        f"(its relative error, below {error:.2f} at {last} samples nine times in ten, falls as 1/√samples)",
        soft_wrap=True,
    )
    screen.print(f"configuration: {out / CONFIG}   picture: {out / PICTURE}", soft_wrap=True)


def picture(found: Tuning, path: Path) -> None:
    """Draw the curves of the choice: decisions kept by noise_alpha, where the model decides, and error by samples."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dave_fast.evaluate.tuning import KEPT
    from dave_fast.images.figures import save_figure

    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.6, 2.7), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        left.plot(found.alphas, found.kept, color="#1971c2", lw=1.8, marker="o", ms=3)
        left.axhline(KEPT, color="0.5", lw=0.8, ls="--")
        left.set(xlabel="noise_alpha", title="samples that keep the decision", ylabel="share", ylim=(0, 1.05))
        sizes = np.array(list(found.errors))
        last, error = list(found.errors.items())[-1]
        reach = np.array([min(found.n_samples, last), max(found.n_samples, last)])
        right.plot(sizes, list(found.errors.values()), color="#2b8a3e", lw=1.8, marker="o", ms=3)
        right.plot(
            reach, error * np.sqrt(last / reach), color="#2b8a3e", lw=0.9, ls=":", label=f"1/√samples from {last} on"
        )
        right.legend(frameon=False, fontsize=7)
        right.axhline(np.sqrt(1 - found.quality**2), color="0.5", lw=0.8, ls="--")
        right.set(
            xlabel="samples", title=f"error; dashed: correlation {found.quality:g}", ylabel="relative error, bound"
        )
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
        for axes, value in ((left, found.noise_alpha), (right, found.n_samples)):
            axes.axvline(value, color="0.2", lw=0.9)
            axes.annotate(f" {value:g}", (value, 0), xycoords=("data", "axes fraction"), va="bottom")
        save_figure(figure, path)
