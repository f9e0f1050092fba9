"""A model as a function of images, called as Hugging Face's pipelines are.

pipe = dave_fast.pipeline("demo")
pipe("photo.jpg", top_k=3)     # [{"label": ..., "score": ..., "map": ..., "overlay": ..., ...}, ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dave_fast.defaults import DEFAULT_MODEL, DEFAULT_SAMPLES
from dave_fast.errors import InputError
from dave_fast.explain.depth import PIXELS, Depth, check_one
from dave_fast.explain.subject import Subject
from dave_fast.images.given import Picture, is_one, photographs
from dave_fast.models.spec import ModelSpec
from dave_fast.numbers import check_integer
from dave_fast.targets import Class

Answer = dict[str, Any]


class Pipeline:
    """A classifier as a function of images.

    Attributes:
        explainer: its `DAVE`.
        prepare: its preprocessing.
        labels: its class names.
    """

    def __init__(self, subject: Subject) -> None:
        self.explainer, self.prepare, self.labels = subject

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        top_k: int = 1,
        target: str | int | None = None,
        n_samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        depth: Depth = PIXELS,
    ) -> list[Answer] | list[list[Answer]]:
        """Explain the most probable classes of an image, or one class.

        Args:
            images: a photograph as `DAVE.explain` takes it, or a list of them.
            top_k: number of most probable classes.
            target: in place of top_k, a class by index or name.
            n_samples: perturbed samples of an image.
            seed: equal seeds give equal maps.
            depth: one, see `dave_fast.DAVE.explain`.

        Returns:
            A dictionary for each class, with label, score (probability; NaN where the model has none), target (index),
            depth ("pixels", 6 or "5-9"), map ((H, W) float32 in [0, 1]) and overlay (a PIL image of the photograph's
            size); for a list of images a list of such lists.

        Raises:
            ImageError: an image cannot be read.
            InputError: the model has no such class, or fewer classes than top_k; depth is not one depth.
        """
        check_integer(top_k, "top_k", 1)
        depth = check_one(depth)
        if target is not None and top_k != 1:
            raise InputError("target names one class and top_k several: give one of them.")
        # one by one, as each may have another class
        answers = [self._answers(each, top_k, target, n_samples, seed, depth) for each in photographs(images)]
        return answers[0] if is_one(images) else answers

    def __repr__(self) -> str:
        named = f"{self.labels.count} classes" + (f", such as {self.labels.name(0)!r}" if self.labels.names else "")
        return (
            f"Pipeline of {self.explainer.model_name}: {named}\n"
            f"  {self.explainer!r}\n"
            '  call it: pipe("photo.jpg", top_k=3) returns label, score, map and overlay of each class'
        )

    def _answers(
        self, picture: Picture, top_k: int, target: str | int | None, n_samples: int, seed: int, depth: Depth
    ) -> list[Answer]:
        # as text, so that a negative index is refused
        named = None if target is None else [Class(str(target))]
        found = self.explainer.explain(
            picture,
            targets=named,
            top_k=top_k if named is None else None,
            n_samples=n_samples,
            seed=seed,
            depth=depth,
        )
        maps = found.maps[0].cpu().numpy()
        return [
            {
                "label": found.about.labels.name(index),
                "score": score,
                "target": index,
                "depth": found.depth,
                "map": heat,
                "overlay": found.overlay(target=number),
            }
            for number, ((index, _, score), heat) in enumerate(zip(found.answers()[0], maps, strict=True))
        ]


def pipeline(model: str | ModelSpec | nn.Module = DEFAULT_MODEL, **settings: Any) -> Pipeline:
    """Return a `Pipeline` for a model.

    Args:
        model: anything that `DAVE` takes.
        settings: keywords of `DAVE`, such as precision or noise_alpha.

    Raises:
        InputError: the model has no classes, and as `DAVE` does.
    """
    return Pipeline(Subject.load(model, **settings))
