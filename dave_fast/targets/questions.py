"""The targets beyond captum's forms that ask about the whole image: each is a `Question`, with one cotangent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.images import preprocessing
from dave_fast.images.given import Photograph
from dave_fast.models.adapter import TextImageModel
from dave_fast.models.labels import labels_of
from dave_fast.targets import cotangents
from dave_fast.targets.cotangents import Cotangent
from dave_fast.targets.forms import ModelView, Question, Target, resolve_target
from dave_fast.transfers import to_device


@dataclass(frozen=True)
class Class(Question):
    """One class.

    Attributes:
        index: an int, or a name: one of the model's class names, or a part that occurs in only one of them.
        of: number of classes that the name was looked up among; an output with another number is refused.
    """

    index: int | str
    of: int | None = field(default=None, compare=False, repr=False)

    def bind(self, view: ModelView) -> Class:
        """See `Question`.

        Raises:
            InputError: the name fits no class, or several.
        """
        if not isinstance(self.index, str):
            return self
        labels = labels_of(view.model)
        return Class(labels.resolve(self.index), labels.count)

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`.

        Raises:
            InputError: the output has another number of classes than there are names.
        """
        bound = self.bind(view)
        if bound.of is not None and output.shape[1:] != (bound.of,):
            raise InputError(
                f"class {self.index!r} was looked up among {bound.of} classes, and the model's output is "
                f"{tuple(output.shape)}: its names are those of another head; give the index"
            )
        return resolve_target(bound.index, output, size, view)


class Sum(Question):
    """The sum of several targets' scores.

    Args:
        parts: the targets, at least one.

    Raises:
        InputError: no target is given.
    """

    def __init__(self, *parts: Target) -> None:
        if not parts:
            raise InputError("Sum() has nothing to add; give targets: Sum(3, 5)")
        self.parts = parts

    def bind(self, view: ModelView) -> Sum:
        """See `Question`."""
        return Sum(*(_bound(part, view) for part in self.parts))

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`."""
        parts = (resolve_target(part, output, size, view) for part in self.parts)
        return cotangents.WeightedCotangent(tuple((1.0, part) for part in parts))


@dataclass(frozen=True)
class Contrast(Question):
    """The difference of two targets' scores: why `this` and not `that`.

    Attributes:
        this: the target whose score is explained.
        that: the target whose score is subtracted.
    """

    this: Target
    that: Target

    def bind(self, view: ModelView) -> Contrast:
        """See `Question`."""
        return Contrast(_bound(self.this, view), _bound(self.that, view))

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`."""
        this, that = (resolve_target(part, output, size, view) for part in (self.this, self.that))
        return cotangents.WeightedCotangent(((1.0, this), (-1.0, that)))


@dataclass(frozen=True)
class Similarity(Question):
    """scale · cosine of the output (B, D) and an embedding, the output's norm held constant.

    Attributes:
        embedding: (D,), or (B, D), one for each image; of any norm except zero.
        scale: factor of the cosine.
        words: what the embedding is of, for captions.
    """

    embedding: Tensor
    scale: float = 1.0
    words: str = field(default="", compare=False)

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`.

        Raises:
            InputError: the output is not (B, D), or the embedding does not fit it or is zero.
        """
        given = torch.as_tensor(self.embedding).detach()
        if output.dim() != 2:
            raise InputError(
                f"the model's output is {tuple(output.shape)}; a similarity needs one embedding an image, (B, D)"
            )
        vectors = vectors_of(given, output.shape[1], len(output), "the embedding")
        vectors = vectors.to(torch.promote_types(output.dtype, torch.float32))
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        # checked before the move, so that an embedding on the host needs no wait for the device
        if not bool((norms > 0).all()):
            raise InputError("the embedding is zero, so it has no direction; give one with a norm above zero")
        return cotangents.DirectionCotangent(to_device(vectors / norms, output.device), float(self.scale))


@dataclass(frozen=True)
class Text(Question):
    """Similarity to a text prompt, for models with a text tower (CLIP, SigLIP).

    Attributes:
        prompt: the text.
        scale: factor of the cosine; None is the model's own logit scale.
    """

    prompt: str
    scale: float | None = None

    def bind(self, view: ModelView) -> Similarity:
        """See `Question`.

        Raises:
            InputError: the model has no text tower.
        """
        model: Any = view.model
        if not isinstance(model, TextImageModel):
            raise InputError(
                f"{type(model).__name__} takes no text prompts; load a CLIP or SigLIP model with its text tower "
                "(open_clip:ViT-B-16:TAG, hf:openai/clip-vit-base-patch16), or give Similarity(embedding)"
            )
        scale = float(model.logit_scale) if self.scale is None else self.scale
        return Similarity(model.text_embedding([self.prompt])[0], scale, f"“{self.prompt}”")


@dataclass(frozen=True)
class SimilarTo(Question):
    """Similarity to another image: the cosine of the two outputs.

    Attributes:
        image: a tensor normalised as the model expects it, (C, H, W), or (B, C, H, W), one for each image; or a
            photograph as `DAVE.explain` takes it, to which the model's own preprocessing is applied.
        scale: factor of the cosine.
    """

    image: Any
    scale: float = 1.0

    def bind(self, view: ModelView) -> Similarity:
        """See `Question`.

        Raises:
            ImageError: the file is no image that can be read.
            InputError: the image does not fit the model.
        """
        image, words = self.image, "like an image"
        if not isinstance(image, Tensor):
            photograph = Photograph.of(image)
            image, words = preprocessing(view.model)(photograph.read())[0], f"like {photograph.name or 'an image'}"
        output = view.output(image)
        return Similarity(output[0] if len(output) == 1 else output, self.scale, words)


def vectors_of(given: Tensor, width: int, images: int, what: str) -> Tensor:
    """Return (1, D) or (B, D), checked against the width D and the number of images."""
    vectors = given[None] if given.dim() == 1 else given
    shapes = ((1, width), (images, width))
    if tuple(vectors.shape) not in shapes or not vectors.is_floating_point() or not bool(torch.isfinite(vectors).all()):
        finite = ", finite" if vectors.is_floating_point() else ""
        raise InputError(
            f"{what} is {tuple(given.shape)} of {given.dtype}; expected floating point{finite}, ({width},) for all "
            f"images or ({images}, {width})"
        )
    return vectors


def _bound(part: Target, view: ModelView) -> Target:
    return part.bind(view) if isinstance(part, Question) else part
