"""Explain image files and write pictures and arrays: the work of `dave-fast explain`, without a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import ImageError, NonFiniteError
from dave_fast.explain.arrays import Scored, write_arrays
from dave_fast.explain.depth import PIXELS, Depth, name_of
from dave_fast.explain.depth_account import sentence
from dave_fast.explain.result_names import endings_of, stems_of
from dave_fast.files import atomically
from dave_fast.images import drawing, read_image
from dave_fast.models.meaning import has_classes, most_probable, probability_of
from dave_fast.targets.text import describe_target, parse_target

if TYPE_CHECKING:
    from dave_fast.explain.explainer import Explanation
    from dave_fast.explain.subject import Subject
    from dave_fast.targets.forms import Target

_BARS = 5


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
    """

    out: Path
    targets: tuple[str, ...] = ()
    top_k: int = 1
    n_samples: int = DEFAULT_SAMPLES
    seed: int = 0
    figure: bool = False
    depths: tuple[Depth, ...] = (PIXELS,)


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
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Done | Failed]:
    """Explain images one after another and yield the outcome of each.

    An image that cannot be read or explained yields `Failed`, and the next ones are explained all the same.

    Args:
        subject: the model.
        sources: the images.
        request: what to explain, and where to write.
        progress: called with (rows done, rows in all) of the current image.
        note: called with what had to be assumed about the model.

    Raises:
        InputError: the model does not have a target; before any image is read.
    """
    parsed = [parse_target(text, subject.labels) for text in request.targets]
    targets = [subject.explainer.bind(each) for each in parsed]
    names = [describe_target(each, subject.labels) for each in parsed]
    if subject.prepare.note:
        note(subject.prepare.note)
    files = _FileExplainer(subject, request, targets, names)
    for source in sources:
        try:
            yield files.explain(source, progress)
        except (ImageError, NonFiniteError) as error:
            yield Failed(source, error)


@dataclass(frozen=True)
class _FileExplainer:
    """A model and a request: explains images and writes their files."""

    subject: Subject
    request: Request
    targets: Sequence[Target]
    names: Sequence[str]

    def explain(self, source: ImageSource, progress: Callable[[int, int], None] | None) -> Done:
        """Read, explain and write one image."""
        inputs, crop = self.subject.prepare(source.read())
        explanation = self.subject.explainer.explain(
            inputs[None],
            targets=self.targets or None,
            top_k=None if self.targets else self.request.top_k,
            n_samples=self.request.n_samples,
            seed=self.request.seed,
            depth=self.request.depths,
            progress=progress,
        )
        classes, probabilities = explanation.target[0].tolist(), explanation.probability[0].tolist()
        names = self.names or [self.subject.labels.name(each) for each in classes]
        explained = list(zip(classes, names, probabilities, strict=True))
        top = self._top(explanation)
        results = tuple(
            self._write(source, crop, explanation, (which, level), explained[which], top, f"{stem}{ending}")
            for which, stem in enumerate(stems_of(source.name, explained))
            for level, ending in endings_of(explanation.levels).items()
        )
        drawn = self.request.figure or len(results) > 1
        return Done(results, self._write_figure(source, crop, explanation, explained, top) if drawn else None)

    def _write(
        self,
        source: ImageSource,
        crop: np.ndarray,
        explanation: Explanation,
        place: tuple[int, int],
        target: Scored,
        top: Sequence[Scored],
        stem: str,
    ) -> Result:
        """Write the files of one target at one level, whose numbers are `place`: overlay, map, arrays."""
        which, level = place
        depth = explanation.levels[level]
        heat = explanation.maps[0, which, level].cpu().numpy()
        overlay, plain, arrays = (self.request.out / f"{stem}{end}" for end in (".overlay.png", ".map.png", ".npz"))
        drawing.save_picture(drawing.overlay(crop, heat), overlay)
        drawing.save_picture(drawing.plain_map(heat), plain)
        with atomically(arrays) as file:
            write_arrays(
                file,
                self.subject.explainer,
                maps=explanation.maps[0, which, level][None],
                raw=explanation.raw[0, which, level][None],
                crop=crop,
                targets=[target],
                top=top,
                samples=explanation.n_samples,
                n_samples=explanation.n_samples,
                seed=explanation.seed,
                shrink=explanation.shrink,
                model=self.subject.explainer.model_name,
                depths=(depth,),
                image=source.path,
            )
        accounted = _accounted(explanation, which, depth, "logit" if target[0] >= 0 else "score")
        return Result(source, *target, name_of(depth), accounted, overlay, plain, arrays)

    def _top(self, explanation: Explanation) -> list[Scored]:
        """Return a classifier's five most probable classes, or all that are explained where these are more."""
        model, output = self.subject.explainer.model, explanation.output
        if not has_classes(model, output):
            return []
        top = most_probable(model, output, min(max(_BARS, self.request.top_k), output.shape[1])).T
        pairs = zip(top[0].tolist(), probability_of(model, output, top)[0].tolist(), strict=True)
        return [(index, self.subject.labels.name(index), probability) for index, probability in pairs]

    def _write_figure(
        self,
        source: ImageSource,
        crop: np.ndarray,
        explanation: Explanation,
        explained: Sequence[Scored],
        top: Sequence[Scored],
    ) -> Path:
        words = ["" if explanation.depths is None else name_of(depth) for depth in explanation.levels]
        panels = [
            drawing.Panel(
                heats[level].cpu().numpy(), name, None if math.isnan(probability) else probability, words[level]
            )
            for heats, (_, name, probability) in zip(explanation.maps[0], explained, strict=True)
            for level in endings_of(explanation.levels)
        ]
        bars = [(name, probability) for _, name, probability in top[:_BARS] if not math.isnan(probability)]
        return drawing.save_figure(drawing.figure(crop, panels, bars), self.request.out / f"{source.name}.figure.png")


def _accounted(explanation: Explanation, which: int, depth: str | int, score: str) -> str:
    """Return what the tokens at a depth account for of a target in words, empty for the pixels."""
    if depth == PIXELS:
        return ""
    assert explanation.depths is not None
    return sentence(explanation.depths.map(lambda t: t[0, which]), depth, score)
