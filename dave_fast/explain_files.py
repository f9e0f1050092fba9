"""Explain image files: read, explain, write; one image after another, whatever befalls the others.

The job behind `dave-fast explain`, without a terminal: it yields what it did and prints nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dave_fast import __version__, figures
from dave_fast.errors import ImageError, InputError, NonFiniteError
from dave_fast.files import atomically
from dave_fast.images import Preprocessing, preprocessing, read_image
from dave_fast.labels import Labels, labels_of

if TYPE_CHECKING:
    from torch import Tensor

    from dave_fast.explainer import DAVE, Explanation

_BARS = 5


@dataclass(frozen=True)
class Source:
    """An image to explain. name: of its result files, may hold folders; path: what readers call it."""

    name: str
    path: str
    read: Callable[[], Image.Image]


@dataclass(frozen=True)
class Result:
    """One explained class of one image, and the files written for it."""

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

    target: class index or name, None for the most probable. top_k: how many of the most probable classes,
    with target None. figure: also one picture of all classes; always written for top_k > 1.
    """

    out: Path
    target: str | int | None = None
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
    explainer: DAVE,
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
    labels = labels_of(explainer.model)
    target = None if settings.target is None else labels.resolve(settings.target)
    prepare = preprocessing(explainer.model)
    if prepare.note:
        note(prepare.note)
    job = _Job(explainer, labels, prepare, settings, target)
    for source in sources:
        try:
            yield job.explain(source, progress)
        except (ImageError, NonFiniteError) as error:
            yield Failed(source, error)


@dataclass(frozen=True)
class _Job:
    explainer: DAVE
    labels: Labels
    prepare: Preprocessing
    settings: Settings
    target: int | None

    def explain(self, source: Source, progress: Callable[[int, int], None] | None) -> Done:
        """Read, explain and write one image."""
        import torch

        inputs, crop = self.prepare(source.read())
        targets = self._targets(inputs)
        explanation = self.explainer.explain(
            inputs.expand(len(targets), *inputs.shape) if targets else inputs[None],
            target=torch.tensor(targets) if targets else None,
            n_samples=self.settings.n_samples,
            seed=self.settings.seed,
            progress=progress,
        )
        if explanation.output.dim() != 2:
            shape = tuple(explanation.output.shape)
            raise InputError(f"the model's output is {shape}; files are explained for classifiers: (B, K).")
        results = tuple(self._write(source, crop, explanation, row) for row in range(len(explanation.target)))
        drawn = self.settings.figure or len(results) > 1
        return Done(results, self._write_figure(source, crop, explanation) if drawn else None)

    def _targets(self, inputs: Tensor) -> list[int]:
        """The classes to explain; empty where the explainer may take the most probable one itself."""
        if self.target is not None:
            return [self.target]
        if self.settings.top_k == 1:
            return []
        logits = self.explainer.predict(inputs[None])[0]
        if self.settings.top_k > len(logits):
            raise InputError(f"top_k is {self.settings.top_k}, and the model has {len(logits)} classes.")
        return [int(index) for index in logits.topk(self.settings.top_k).indices]

    def _write(self, source: Source, crop: np.ndarray, explanation: Explanation, row: int) -> Result:
        """The files of one class: overlay, map, arrays."""
        target, probability = int(explanation.target[row]), float(explanation.probability[row])
        class_name = self.labels.name(target)
        stem = source.name if len(explanation.target) == 1 else f"{source.name}.{target}-{_slug(class_name)}"
        heat = explanation.maps[row].cpu().numpy()
        arrays = self._arrays(source, crop, explanation, row)
        paths = [self.settings.out / f"{stem}{suffix}" for suffix in (".overlay.png", ".map.png", ".npz")]
        figures.save_picture(figures.overlay(crop, heat), paths[0])
        figures.save_picture(figures.plain_map(heat), paths[1])
        with atomically(paths[2]) as file:
            np.savez_compressed(file, **arrays)
        return Result(source, target, class_name, probability, *paths)

    def _arrays(self, source: Source, crop: np.ndarray, explanation: Explanation, row: int) -> dict[str, Any]:
        """What an .npz holds: numbers and strings only, so that it loads without pickle."""
        names, probabilities, indices = self._most_probable(explanation, row)
        return {
            "map": explanation.maps[row].cpu().numpy(),
            "raw": explanation.raw[row].cpu().numpy(),
            "input": crop,
            "target": np.int64(explanation.target[row]),
            "class_name": self.labels.name(int(explanation.target[row])),
            "probability": np.float32(explanation.probability[row]),
            "top_target": np.array(indices, np.int64),
            "top_class_name": np.array(names),
            "top_probability": np.array(probabilities, np.float32),
            "n_samples": np.int64(explanation.n_samples),
            "noise_alpha": np.float64(self.explainer.sampling.noise_alpha),
            # Draws depend on a seed modulo 2⁶⁴; a larger integer would need pickle.
            "seed": np.int64(explanation.seed)
            if abs(explanation.seed) < 2**63
            else np.uint64(explanation.seed % 2**64),
            "model": self.explainer.model_name,
            "precision": self.explainer.precision,
            "dave_fast_version": __version__,
            "image": source.path,
        }

    def _most_probable(self, explanation: Explanation, row: int) -> tuple[list[str], list[float], list[int]]:
        """Names, probabilities and indices of the most probable classes; five, or all that are explained."""
        output = explanation.output[row].float()
        top = output.softmax(0).topk(min(max(_BARS, self.settings.top_k), len(output)))
        indices = [int(index) for index in top.indices]
        return [self.labels.name(index) for index in indices], top.values.tolist(), indices

    def _write_figure(self, source: Source, crop: np.ndarray, explanation: Explanation) -> Path:
        panels = [
            figures.Panel(heat.cpu().numpy(), self.labels.name(int(target)), float(probability))
            for heat, target, probability in zip(
                explanation.maps, explanation.target, explanation.probability, strict=True
            )
        ]
        names, probabilities, _ = self._most_probable(explanation, 0)
        bars = list(zip(names, probabilities, strict=True))[:_BARS]
        picture = figures.figure(crop, panels, bars)
        return figures.save_figure(picture, self.settings.out / f"{source.name}.figure.png")


def _slug(name: str) -> str:
    """A class name for a file name: letters, digits and dashes."""
    return re.sub(r"[^0-9a-z]+", "-", name.casefold()).strip("-")[:40] or "class"
