"""The result of `DAVE.explain`: maps, what they explain, and their pictures.

found = DAVE(model).explain("photo.jpg")
found                        # what was explained, in four lines; in a notebook a picture
found.show()                 # a picture on the screen, with several images a grid
found.save("map.png")        # the map over the photograph, at the photograph's own size
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.explain.arrays import arrays_of
from dave_fast.explain.depth import PIXELS, name_of
from dave_fast.explain.depth_account import Depths
from dave_fast.explain.pictures import BARS, Pictures, Scored
from dave_fast.explain.view import View
from dave_fast.files import atomically
from dave_fast.images.drawing import percent
from dave_fast.models.labels import Labels
from dave_fast.models.meaning import as_probabilities
from dave_fast.models.spec import Link
from dave_fast.numbers import check_integer
from dave_fast.ops.smooth import signed_map
from dave_fast.targets import Contrast, Question, Target
from dave_fast.targets.text import describe_target

# targets that are named in a summary
_NAMED = 3
_OF_IMAGES = ("maps", "raw", "signed", "target", "probability", "output")


@dataclass(frozen=True)
class Asked:
    """A question to a model.

    Attributes:
        words: what it is called; None for classes, which have names.
        signed: whether its map says what speaks for and what against: a contrast.
    """

    words: str | None = None
    signed: bool = False

    @classmethod
    def of(cls, target: Target, labels: Labels) -> Asked:
        """Return a target as a question of all images."""
        if not isinstance(target, Question):
            return cls("score" if callable(target) else None)
        return cls(describe_target(target, labels), isinstance(target, Contrast))


@dataclass(frozen=True)
class About:
    """What an explanation is about, and how it was made.

    Attributes:
        model: its name.
        method: of attribution.
        precision: of the computation.
        noise_alpha: the largest noise level.
        labels: the names of its classes.
        link: how its scores become probabilities.
        asked: the K questions, each of all images.
        views: what the model was shown, of each image.
    """

    model: str = "a model"
    method: str = "DAVE"
    precision: str = ""
    noise_alpha: float = math.nan
    labels: Labels = field(default_factory=partial(Labels, None))
    link: Link = None
    asked: tuple[Asked, ...] = ()
    views: tuple[View, ...] = ()


# tensors have no truth value: two explanations are equal where they are the same one
@dataclass(frozen=True, repr=False, eq=False)
class Explanation(Pictures):
    """Attribution maps of B images, and what they explain.

    Of K targets (`targets=` or `top_k=`) maps, raw, signed, target and probability have a dimension K after B. Of
    several depths maps, raw and signed have a dimension for them, after B and K. `found[b]`, `found[2:4]` and loops
    give explanations of single images and of parts of a batch.

    Attributes:
        maps: (B, H, W) float32 in [0, 1], for looking at: signed without its negative part, smoothed.
        raw: (B, C, H, W) float32, signed, per channel: the median/MAD mean of effective gradient ⊙ image. At a block,
            that of the evidence of its tokens, of which each channel has an equal share.
        signed: (B, H, W) float32, raw's sum over the channels, after shrinkage where `shrink` is True.
        target: (B,) int64, the class; −1 where the target is not a class.
        probability: (B,) float32, that of the class by the unperturbed image's output, a softmax or a sigmoid of it
            (`models.meaning`); NaN where the target is not a class, or the output has no probabilities.
        output: (B, ...) float32, the model's output for the unperturbed images.
        n_samples: as given.
        seed: as given.
        shrink: whether the maps are shrunk (see `DAVE`); False: they are the paper's.
        depth: "pixels", the number of a block or a range of blocks such as "5-9", or a tuple of them for several.
        depths: what of the decision each depth accounts for; None where only the pixels were asked for (`DAVE.depths`).
        about: the model, its questions and the images.
    """

    maps: Tensor
    raw: Tensor
    signed: Tensor
    target: Tensor
    probability: Tensor
    output: Tensor
    n_samples: int
    seed: int
    shrink: bool
    depth: str | int | tuple[str | int, ...] = PIXELS
    depths: Depths | None = None
    about: About = field(default_factory=About)

    @property
    def levels(self) -> tuple[str | int, ...]:
        """Each depth, as a tuple also where there is one."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,)

    @cached_property
    def signed_maps(self) -> Tensor:
        """Maps with two signs for looking at, in [-1, 1] and shaped like `maps`: `signed`, blended with its blur."""
        return signed_map(self.signed)

    @property
    def views(self) -> tuple[View, ...]:
        """What the model was shown of each image."""
        return self.about.views

    @property
    def contrasts(self) -> tuple[bool, ...]:
        """Whether each of the K targets is a contrast, which has two signs."""
        return tuple(asked.signed for asked in self.about.asked) or (False,) * self.target[:1].numel()

    def __getitem__(self, index: int | slice) -> Explanation:
        if isinstance(index, slice):
            some = list(range(len(self)))[index]
        else:
            some = [_place(index, "the number of an image", len(self))]
        # a copy, so that one image of a batch does not keep the others
        tensors = {name: getattr(self, name)[some] for name in _OF_IMAGES}
        depths = None if self.depths is None else self.depths.map(lambda t: t[some])
        views = tuple(self.views[b] for b in some) if self.views else ()
        return replace(self, **tensors, depths=depths, about=replace(self.about, views=views))

    def __iter__(self) -> Iterator[Explanation]:
        return (self[b] for b in range(len(self)))

    def only(self, target: int = 0, level: int = 0) -> Explanation:
        """Return the explanation of one target at one depth, of all images, without dimensions for others.

        Args:
            target: its number, of K.
            level: the number of the depth, of several.

        Raises:
            InputError: there is no such target or depth.
        """
        target = _place(target, "the number of the target", len(self.contrasts))
        level = _place(level, "the number of the depth", len(self.levels))
        several = isinstance(self.depth, tuple)
        of_target = (slice(None), target) if self.target.dim() > 1 else (slice(None),)
        of_map = (*of_target, level) if several else of_target
        return replace(
            self,
            maps=self.maps[of_map],
            raw=self.raw[of_map],
            signed=self.signed[of_map],
            target=self.target[of_target],
            probability=self.probability[of_target],
            depth=self.levels[level],
            depths=None if self.depths is None else self.depths.map(lambda t: t[of_target]),
            about=replace(self.about, asked=self.about.asked[target : target + 1]),
        )

    def answers(self) -> list[list[Scored]]:
        """Return of each image its K targets: class (−1 for none), name and probability (NaN for none)."""
        targets, known = ((t if t.dim() > 1 else t[:, None]).tolist() for t in (self.target, self.probability))
        return [
            [(k, self._words(number, k), p) for number, (k, p) in enumerate(zip(of_image, likely, strict=True))]
            for of_image, likely in zip(targets, known, strict=True)
        ]

    def _words(self, number: int, target: int) -> str:
        words = self.about.asked[number].words if number < len(self.about.asked) else None
        return words or (self.about.labels.name(target) if target >= 0 else "target")

    def top(self, k: int = BARS) -> list[list[Scored]]:
        """Return of each image its k most probable classes; empty for a model without classes."""
        check_integer(k, "k", 0)
        if self.output.dim() != 2 or self.about.labels.count == 0:
            return [[] for _ in range(len(self))]
        best = self.output.topk(min(k, self.output.shape[1])).indices
        known = as_probabilities(self.output, self.about.link).gather(1, best)
        return [
            [(index, self.about.labels.name(index), p) for index, p in zip(*row, strict=True)]
            for row in zip(best.tolist(), known.tolist(), strict=True)
        ]

    def __repr__(self) -> str:
        images = f"{len(self)} image{'s' * (len(self) != 1)}"
        lines = [f"{self.about.method} of {images} by {self.about.model}: maps {tuple(self.maps.shape)}"]
        answers = self.answers()
        for number, of_image in enumerate(answers[:1]):
            named = [name if math.isnan(p) else f"{name} {percent(p)}" for _, name, p in of_image]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            of = (self.views[number].name if self.views else "") or f"image {number}"
            lines.append(f"  {of}: {', '.join(named[:_NAMED])}{more}")
        where = ", ".join(map(name_of, self.levels))
        shrunk = "shrunk" if self.shrink else "not shrunk"
        alpha = "" if math.isnan(self.about.noise_alpha) else f", noise_alpha = {self.about.noise_alpha:g}"
        lines.append(f"  at {where}; {self.n_samples} samples, seed {self.seed}{alpha}, {shrunk}")
        lines.append('  .show(), .overlay(), .save("map.png"), .to_dict(); .maps, .raw, .signed, .target, .probability')
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation of one image as NumPy arrays, numbers and strings, named as in an .npz file.

        `dave_fast.explain.arrays` lists them.

        Raises:
            InputError: there are several images, or there is no picture of the input.
        """
        if len(self) != 1:
            raise InputError(f"there are {len(self)} images; expected one: found[0], or a loop over them")
        count, depths = len(self.levels), self.levels
        shape = (-1, count) if count > 1 else (-1,)
        (answers,), (top,) = self.answers(), self.top()
        return arrays_of(
            maps=self.maps.reshape(*shape, *self.maps.shape[-2:]),
            raw=self.raw.reshape(*shape, *self.raw.shape[-3:]),
            crop=self._view(0).crop,
            targets=answers,
            top=top if len(answers) <= len(top) else self.top(len(answers))[0],
            samples=self.n_samples,
            n_samples=self.n_samples,
            seed=self.seed,
            shrink=self.shrink,
            method=self.about.method,
            model=self.about.model,
            precision=self.about.precision,
            noise_alpha=self.about.noise_alpha,
            depths=depths,
            image=self._view(0).name,
        )

    def save_npz(self, path: str | os.PathLike[str]) -> Path:
        """Write what `to_dict` returns as an .npz file, and return its path.

        Raises:
            InputError: as `to_dict`, and where the file cannot be written.
        """
        arrays = self.to_dict()
        with atomically(path) as file:
            np.savez_compressed(file, **arrays)
        return Path(path)


def _place(number: int, what: str, count: int) -> int:
    """Return the number of one of `count`, of which negative ones count from the end, from 0."""
    return check_integer(number, what, -count, count - 1) % count
