"""Explain image files and write pictures and arrays: the work of `dave-fast explain`, without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import ImageError, NonFiniteError
from dave_fast.explain.depth import PIXELS, Depth, name_of
from dave_fast.explain.depth_account import sentence
from dave_fast.explain.result_names import ending_of, figure_name, question_name
from dave_fast.images import read_image
from dave_fast.images.drawing import Size, Style, save_picture
from dave_fast.images.figures import figure, save_figure
from dave_fast.images.given import Photograph
from dave_fast.targets.text import parse_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dave_fast.explain.explainer import Explanation
    from dave_fast.explain.subject import Subject
    from dave_fast.targets.forms import Target


@dataclass(frozen=True)
class ImageSource:
    """An image to explain.

    Attributes:
        name: of its result files; it may hold folders.
        path: the image's name in messages and results.
        read: reads the image.
    """

    name: str
    path: str
    read: Callable[[], Image.Image]


@dataclass(frozen=True)
class Result:
    """One explained target of one image at one depth, and the files written for it.

    Attributes:
        source: the image.
        target: the class index; −1 where the target is not a class.
        class_name: the target in words.
        probability: of the class; NaN where the target is not a class.
        depth: of the map, "pixels" or "block 6".
        accounted: what a block accounts for, in words; empty for the pixels.
        overlay: the file of the map over the photograph.
        map: the file of the map.
        arrays: the .npz file (see `dave_fast.explain.arrays`).
        method: of attribution.
    """

    source: ImageSource
    target: int
    class_name: str
    probability: float
    depth: str
    accounted: str
    overlay: Path
    map: Path
    arrays: Path
    method: str = "DAVE"


class Explains(Protocol):
    """What explains photographs: `DAVE`, or a method with its call."""

    @property
    def explain(self) -> Callable[..., Explanation]:
        """See `DAVE.explain`."""


@dataclass(frozen=True)
class Done:
    """An image that was explained.

    Attributes:
        results: one for each target and depth.
        figure: the file with all of them in one picture, or None.
    """

    results: tuple[Result, ...]
    figure: Path | None


@dataclass(frozen=True)
class Failed:
    """An image that could not be explained, and the reason."""

    source: ImageSource
    error: ImageError | NonFiniteError


@dataclass(frozen=True)
class Request:
    """What to explain in each image, and where to write the results.

    Attributes:
        out: the folder for the results.
        targets: in the grammar of `dave_fast.targets.text`; empty for the `top_k` most probable classes.
        top_k: number of most probable classes, without targets.
        n_samples: perturbed samples of an image.
        seed: of the samples.
        figure: whether to draw one picture of all results also where there is one; several always get it.
        depths: of the maps, as `DAVE.explain` takes them.
        size: of pictures, as for `Explanation.overlay`.
        signed: of pictures, as for `Explanation.overlay`.
        style: of pictures, keywords of `dave_fast.images.drawing.Style`.
    """

    out: Path
    targets: tuple[str, ...] = ()
    top_k: int = 1
    n_samples: int = DEFAULT_SAMPLES
    seed: int = 0
    figure: bool = False
    depths: tuple[Depth, ...] = (PIXELS,)
    size: Size = "original"
    signed: bool | None = None
    style: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError where the style is none."""
        Style(**self.style)


def sources_of(files: Iterable[Path], given: Sequence[Path]) -> list[ImageSource]:
    """Name the results of image files, each differently.

    A file's name is its path below the given folder, or its own name where the file itself was given, without suffix.
    Where two files would share a name, the later one keeps its suffix, or gets a number.

    Args:
        files: the image files.
        given: the files and folders that they were found in.
    """
    sources: dict[str, ImageSource] = {}
    folders = [folder for folder in given if folder.is_dir()]
    for file in files:
        folder = next((folder for folder in folders if file.is_relative_to(folder)), file.parent)
        full = file.relative_to(folder).as_posix()
        name, number = full.removesuffix(file.suffix), 1
        while name in sources:
            name, number = (full if number == 1 else f"{full}-{number}"), number + 1
        sources[name] = ImageSource(name, str(file), partial(read_image, file))
    return list(sources.values())


def explain_files(
    subject: Subject,
    sources: Sequence[ImageSource],
    request: Request,
    *,
    methods: Mapping[str, Explains] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Done | Failed]:
    """Explain images one after another and yield the outcome of each.

    An image that cannot be read or explained yields `Failed`, and the next ones are explained all the same.

    Args:
        subject: the model.
        sources: the images.
        request: what to explain, and where to write.
        methods: what explains, by the names of the methods; None for the subject's DAVE.
        progress: called with (rows done, rows in all) of the current image.

    Raises:
        InputError: the model does not have a target; before any image is read.
    """
    parsed = [parse_target(text, subject.labels) for text in request.targets]
    targets = [subject.explainer.bind(each) for each in parsed]
    files = [question_name(each, subject.labels) for each in parsed]
    explainer = _FileExplainer(subject, request, targets, files, methods or {"DAVE": subject.explainer})
    for source in sources:
        try:
            yield explainer.explain(source, progress)
        except (ImageError, NonFiniteError) as error:
            yield Failed(source, error)


@dataclass(frozen=True)
class _FileExplainer:
    """A model and a request: explains images and writes their files.

    Attributes:
        subject: the model.
        request: what to explain, and where to write.
        targets: the request's targets; empty for the most probable classes.
        files: of the targets, in the names of files.
        methods: what explains, by name.
    """

    subject: Subject
    request: Request
    targets: Sequence[Target]
    files: Sequence[str]
    methods: Mapping[str, Explains]

    def explain(self, source: ImageSource, progress: Callable[[int, int], None] | None) -> Done:
        """Read, explain and write one image."""
        request, photograph = self.request, Photograph(source.path, source.read())
        made = {
            name: method.explain(
                photograph,
                targets=self.targets or None,
                top_k=None if self.targets else request.top_k,
                n_samples=request.n_samples,
                seed=request.seed,
                depth=request.depths,
                progress=progress,
            )
            for name, method in self.methods.items()
        }
        first = next(iter(made.values()))
        (answers,) = first.answers()
        files = self.files or [question_name(target, self.subject.labels) for target, _, _ in answers]
        results = tuple(
            self._write(source, found, (which, found.levels.index(depth)), f"{file}{ending_of(depth, name)}")
            for name, found in made.items()
            for which, file in enumerate(files)
            for depth in dict.fromkeys(found.levels)
        )
        if not request.figure and len(results) == 1:
            return Done(results, None)
        figure = figure_of(made, signed=request.signed, style=Style(**request.style))
        named = figure_name(files, None if self.files else request.top_k, first.levels, list(made))
        return Done(results, save_figure(figure, request.out / f"{source.name}.{named}.figure.png"))

    def _write(self, source: ImageSource, found: Explanation, place: tuple[int, int], file: str) -> Result:
        """Write the `file`s of one target at one level, whose numbers are `place`: overlay, map, arrays."""
        which, level = place
        one, request = found.only(which, level), self.request
        answer = one.answers()[0][0]
        overlay, plain, arrays = (
            request.out / f"{source.name}.{file}{end}" for end in (".overlay.png", ".map.png", ".npz")
        )
        for make, path in ((one.overlay, overlay), (one.picture, plain)):
            save_picture(make(size=request.size, signed=request.signed, **request.style), path)
        one.save_npz(arrays)
        depth = found.levels[level]
        accounted = _accounted(found, which, depth, "logit" if answer[0] >= 0 else "score")
        return Result(source, *answer, name_of(depth), accounted, overlay, plain, arrays, found.about.method)


def figure_of(made: Mapping[str, Explanation], *, signed: bool | None, style: Style) -> Figure:
    """Return the figure of one image by one or several methods.

    Args:
        made: by the names of the methods, each of the same image and targets.
        signed: as for the pictures of an `Explanation`.
        style: how maps are drawn.
    """
    first = next(iter(made.values()))
    panels = [
        replace(panel, depth=" · ".join(filter(None, (name if len(made) > 1 else "", panel.depth))))
        for name, found in made.items()
        for panel in found.panels(signed=signed)
    ]
    return figure(first.views[0].crop, panels, first.bars(), style)


def _accounted(explanation: Explanation, which: int, depth: str | int, score: str) -> str:
    """Return what the tokens at a depth account for of a target in words, empty for the pixels."""
    if depth == PIXELS:
        return ""
    assert explanation.depths is not None
    return sentence(explanation.depths.map(lambda t: t[0, which]), depth, score)
