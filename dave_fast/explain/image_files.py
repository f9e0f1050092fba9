"""Explain image files: read, explain, write; one image after another, whatever befalls the others.

The job behind `dave-fast explain`, without a terminal: it yields what it did and prints nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dave_fast._version import __version__
from dave_fast.errors import ImageError, InputError, NonFiniteError
from dave_fast.files import atomically
from dave_fast.images import drawing, read_image
from dave_fast.models.adapter import kind_of
from dave_fast.targets.text import describe_target, parse_target

if TYPE_CHECKING:
    from torch import Tensor

    from dave_fast.explain.explainer import Explanation
    from dave_fast.explain.subject import Subject
    from dave_fast.targets.forms import Target

_BARS = 5


@dataclass(frozen=True)
class Source:
    """An image to explain. name: of its result files, may hold folders; path: what readers call it."""

    name: str
    path: str
    read: Callable[[], Image.Image]


@dataclass(frozen=True)
class Result:
    """One explained target of one image, and the files written for it.

    target: the class, −1 where the target is none; probability: its, else NaN; class_name: the target in words.
    """

    source: Source
    target: int
    class_name: str
    probability: float
    overlay: Path
    map: Path
    arrays: Path


@dataclass(frozen=True)
class Done:
    """An image that was explained. figure: all its classes in one picture, where one was asked for."""

    results: tuple[Result, ...]
    figure: Path | None


@dataclass(frozen=True)
class Failed:
    """An image that could not be explained, and why."""

    source: Source
    error: ImageError | NonFiniteError


@dataclass(frozen=True)
class Settings:
    """What to explain, and where to.

    targets: what to explain, in the words of `target_text`; empty for the most probable class. top_k: how many of
    the most probable classes, without targets. figure: also one picture of all targets; always written for several.
    """

    out: Path
    targets: tuple[str, ...] = ()
    top_k: int = 1
    n_samples: int = 50
    seed: int = 0
    figure: bool = False


def sources_of(files: Iterable[Path], given: Sequence[Path]) -> list[Source]:
    """Sources with distinct names: the path below the given folder, or the file's own name, without suffix.

    Where two files would share a name, the later one keeps its suffix, or gets a number.
    """
    sources: dict[str, Source] = {}
    folders = [folder for folder in given if folder.is_dir()]
    for file in files:
        folder = next((folder for folder in folders if file.is_relative_to(folder)), file.parent)
        full = file.relative_to(folder).as_posix()
        name, number = full.removesuffix(file.suffix), 1
        while name in sources:
            name, number = (full if number == 1 else f"{full}-{number}"), number + 1
        sources[name] = Source(name, str(file), partial(read_image, file))
    return list(sources.values())


def explain_files(
    subject: Subject,
    sources: Sequence[Source],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Done | Failed]:
    """Explain each source; one that cannot be read or explained is yielded as `Failed`, and the rest done.

    progress: called with (rows done, rows in all) of the image at work. note: told what had to be assumed.
    Raises InputError for a target that the model does not have, before any image is read.
    """
    parsed = [parse_target(text, subject.labels) for text in settings.targets]
    asked = [_Asked(subject.explainer.bind(target), describe_target(target, subject.labels)) for target in parsed]
    if subject.prepare.note:
        note(subject.prepare.note)
    job = _Job(subject, settings, asked)
    for source in sources:
        try:
            yield job.explain(source, progress)
        except (ImageError, NonFiniteError) as error:
            yield Failed(source, error)


@dataclass(frozen=True)
class _Asked:
    """A target, and what it is called; None for a class, which the explanation tells."""

    target: Target
    name: str | None = None


@dataclass(frozen=True)
class _Job:
    subject: Subject
    settings: Settings
    asked: Sequence[_Asked]

    def explain(self, source: Source, progress: Callable[[int, int], None] | None) -> Done:
        """Read, explain and write one image."""
        inputs, crop = self.subject.prepare(source.read())
        asked = self.asked or self._most_probable_classes(inputs)
        explanation = self.subject.explainer.explain(
            inputs[None],
            targets=[each.target for each in asked],
            n_samples=self.settings.n_samples,
            seed=self.settings.seed,
            progress=progress,
        )
        named = [
            each.name or self.subject.labels.name(int(target))
            for each, target in zip(asked, explanation.target[0], strict=True)
        ]
        stems = self._stems(source, explanation, named)
        results = tuple(
            self._write(source, crop, explanation, which, name, stem)
            for which, (name, stem) in enumerate(zip(named, stems, strict=True))
        )
        drawn = self.settings.figure or len(results) > 1
        return Done(results, self._write_figure(source, crop, explanation, named) if drawn else None)

    def _most_probable_classes(self, inputs: Tensor) -> list[_Asked]:
        """What to explain where nothing was asked."""
        if self.settings.top_k == 1:
            return [_Asked(None)]
        output = self.subject.explainer.predict(inputs[None])
        if output.dim() != 2:
            raise InputError(f"the model's output is {tuple(output.shape)}; top_k needs a classifier's: (B, K).")
        if self.settings.top_k > output.shape[1]:
            raise InputError(f"top_k is {self.settings.top_k}, and the model has {output.shape[1]} classes.")
        return [_Asked(int(index)) for index in output[0].topk(self.settings.top_k).indices]

    def _stems(self, source: Source, explanation: Explanation, names: Sequence[str]) -> list[str]:
        """Names of the targets' files, each its own."""
        if len(names) == 1:
            return [source.name]
        stems: list[str] = []
        for target, name in zip(explanation.target[0].tolist(), names, strict=True):
            stem = f"{source.name}.{f'{target}-' if target >= 0 else ''}{_slug(name)}"
            stems.append(f"{stem}-{len(stems)}" if stem in stems else stem)
        return stems

    def _write(
        self, source: Source, crop: np.ndarray, explanation: Explanation, which: int, name: str, stem: str
    ) -> Result:
        """The files of one target: overlay, map, arrays."""
        heat = explanation.maps[0, which].cpu().numpy()
        paths = [self.settings.out / f"{stem}{suffix}" for suffix in (".overlay.png", ".map.png", ".npz")]
        arrays = self._arrays(source, crop, explanation, which, name)
        drawing.save_picture(drawing.overlay(crop, heat), paths[0])
        drawing.save_picture(drawing.plain_map(heat), paths[1])
        with atomically(paths[2]) as file:
            np.savez_compressed(file, **arrays)
        target, probability = int(explanation.target[0, which]), float(explanation.probability[0, which])
        return Result(source, target, name, probability, *paths)

    def _arrays(
        self, source: Source, crop: np.ndarray, explanation: Explanation, which: int, name: str
    ) -> dict[str, Any]:
        """What an .npz holds: numbers and strings only, so that it loads without pickle."""
        names, probabilities, indices = self._most_probable(explanation)
        return {
            "map": explanation.maps[0, which].cpu().numpy(),
            "raw": explanation.raw[0, which].cpu().numpy(),
            "input": crop,
            "target": np.int64(explanation.target[0, which]),
            "class_name": name,
            "probability": np.float32(explanation.probability[0, which]),
            "top_target": np.array(indices, np.int64),
            "top_class_name": np.array(names),
            "top_probability": np.array(probabilities, np.float32),
            "n_samples": np.int64(explanation.n_samples),
            "noise_alpha": np.float64(self.subject.explainer.sampling.noise_alpha),
            # Draws depend on a seed modulo 2⁶⁴; a larger integer would need pickle.
            "seed": np.int64(explanation.seed)
            if abs(explanation.seed) < 2**63
            else np.uint64(explanation.seed % 2**64),
            "model": self.subject.explainer.model_name,
            "precision": self.subject.explainer.precision,
            "dave_fast_version": __version__,
            "image": source.path,
        }

    def _most_probable(self, explanation: Explanation) -> tuple[list[str], list[float], list[int]]:
        """Names, probabilities and indices of the most probable classes: five, or all that are explained; of a
        classifier."""
        if explanation.output.dim() != 2 or kind_of(self.subject.explainer.model) == "embedding":
            return [], [], []
        output = explanation.output[0].float()
        top = output.softmax(0).topk(min(max(_BARS, self.settings.top_k), len(output)))
        indices = [int(index) for index in top.indices]
        return [self.subject.labels.name(index) for index in indices], top.values.tolist(), indices

    def _write_figure(self, source: Source, crop: np.ndarray, explanation: Explanation, named: Sequence[str]) -> Path:
        panels = [
            drawing.Panel(heat.cpu().numpy(), name, None if math.isnan(probability) else float(probability))
            for heat, name, probability in zip(explanation.maps[0], named, explanation.probability[0], strict=True)
        ]
        names, probabilities, _ = self._most_probable(explanation)
        bars = list(zip(names, probabilities, strict=True))[:_BARS]
        picture = drawing.figure(crop, panels, bars)
        return drawing.save_figure(picture, self.settings.out / f"{source.name}.figure.png")


def _slug(name: str) -> str:
    """A target's name for a file name: letters, digits and dashes."""
    name = name.replace(" + ", " and ").replace(" − ", " not ")
    return re.sub(r"[^0-9a-z]+", "-", name.casefold()).strip("-")[:40] or "target"
