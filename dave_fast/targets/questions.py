"""The targets beyond captum's forms: each is a `Question`, which resolves to one cotangent of the output."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.images import preprocessing
from dave_fast.images.given import Photograph
from dave_fast.models.adapter import TextImageModel
from dave_fast.models.labels import labels_of
from dave_fast.numbers import check_integer
from dave_fast.targets import cotangents
from dave_fast.targets.cotangents import Cotangent
from dave_fast.targets.forms import ModelView, Question, Target, resolve_target
from dave_fast.transfers import to_device

# the most prefix tokens that are tried where the model does not give their number: two class tokens, eight registers
MOST_PREFIX = 10


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
        vectors = _vectors(given, output.shape[1], len(output), "the embedding")
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


@dataclass(frozen=True)
class Patch(Question):
    """A token of the output: ⟨weights, token⟩ of the patch in `row` and `column` of the grid, both from 0.

    Outputs with tokens are (B, N, D), patches in rows behind any prefix tokens, or (B, D, h, w) or (B, h, w, D); timm
    models have them when made with num_classes=0, global_pool="", or by `tokens_of(model)`. The target follows the
    patch's content through each sample's rotation, scaling, shift and flip.

    Attributes:
        row: of the patch in the grid, from 0.
        column: of the patch in the grid, from 0.
        weights: (D,), the linear probe's row for a class (`load_probe`), or (B, D), one for each image; None is the
            patch's own token in the unperturbed image, normalised.
        prefix: the number of prefix tokens; None where it follows from the model's patch size or the number of tokens.
    """

    row: int
    column: int
    weights: Tensor | None = None
    prefix: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless row, column and prefix are integers."""
        for name, number in (("row", self.row), ("column", self.column), ("prefix", self.prefix or 0)):
            check_integer(number, f"the patch's {name}")

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """See `Question`.

        Raises:
            InputError: the output has no tokens, their grid is not known, the patch is outside of it, or the weights
                do not fit.
        """
        if output.dim() not in (3, 4):
            raise InputError(
                f"the model's output is {tuple(output.shape)}; a patch needs tokens, (B, N, D) or (B, D, h, w). timm "
                "models give them when made with num_classes=0, global_pool='', or by "
                "dave_fast.targets.tokens_of(model)"
            )
        prefix, last = 0, False
        if output.dim() == 4:
            last = _channels_last(output, size, view)
            features = output if last else output.permute(0, 2, 3, 1)
            grid, tokens = (features.shape[1], features.shape[2]), features.flatten(1, 2)
        else:
            prefix, grid = self._layout(output.shape[1], size, view)
            tokens = output[:, prefix:]
        if not (0 <= self.row < grid[0] and 0 <= self.column < grid[1]):
            raise InputError(
                f"patch ({self.row}, {self.column}) is not in the grid of {grid[0]} rows and {grid[1]} columns"
            )
        if self.weights is None:
            weights = torch.nn.functional.normalize(tokens[:, self.row * grid[1] + self.column], dim=1)
        else:
            weights = _vectors(
                torch.as_tensor(self.weights).detach(), tokens.shape[2], len(output), "the tensor of weights"
            )
        weights = to_device(weights.to(torch.promote_types(output.dtype, torch.float32)), output.device)
        cell = (size[0] / grid[0], size[1] / grid[1])
        place = ((self.column + 0.5) * cell[1] - 0.5, (self.row + 0.5) * cell[0] - 0.5)
        return cotangents.PatchCotangent(weights, place, grid, cell, prefix, last)

    def _layout(self, tokens: int, size: tuple[int, int], view: ModelView) -> tuple[int, tuple[int, int]]:
        """Return the number of prefix tokens and the grid (h, w)."""
        patch = getattr(getattr(view.model, "patch_embed", None), "patch_size", None)
        if isinstance(patch, tuple):
            grid = (size[0] // patch[0], size[1] // patch[1])
            if self.prefix in (None, tokens - grid[0] * grid[1]) and 0 <= tokens - grid[0] * grid[1] <= MOST_PREFIX:
                return tokens - grid[0] * grid[1], grid
        # otherwise the smallest number of prefix tokens that leaves a grid of the image's aspect ratio
        for prefix in range(MOST_PREFIX + 1) if self.prefix is None else [self.prefix]:
            found = _grid(tokens - prefix, size)
            if found is not None:
                return prefix, found
        raise InputError(
            f"the output's {tokens} tokens are no grid of patches of an image of {size[0]}×{size[1]}"
            f"{'' if self.prefix is None else f' behind {self.prefix} prefix tokens'}; give Patch(..., prefix=) "
            "the number of tokens before the patches"
        )


def tokens_of(model: nn.Module) -> nn.Module:
    """Return a copy of a timm model without pooling and head, whose output is its tokens, as `Patch` needs it.

    Raises:
        InputError: the model has no `reset_classifier` like timm's.
    """
    made: Any = copy.deepcopy(model)
    try:
        made.reset_classifier(0, global_pool="")
    except (AttributeError, TypeError, AssertionError) as error:
        raise InputError(
            f"{type(model).__name__} has no reset_classifier() as timm's models have, so its tokens are not known; "
            "give a module whose output is (B, N, D) or (B, D, h, w)"
        ) from error
    return made


def _channels_last(output: Tensor, size: tuple[int, int], view: ModelView) -> bool:
    """Return whether outputs are (B, h, w, D) rather than (B, D, h, w), by timm's `output_fmt` or the image's shape."""
    if getattr(view.model, "output_fmt", None) is not None:
        return str(view.model.output_fmt) == "NHWC"
    wanted = size[0] / size[1]
    first, last = (abs(math.log(output.shape[at] / output.shape[at + 1] / wanted)) for at in (2, 1))
    return last < first


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return (h, w) with h·w patches and the aspect ratio of the image; None if there is no such grid."""
    if patches < 1:
        return None
    height = round((patches * size[0] / size[1]) ** 0.5)
    width = patches // max(1, height)
    fits = height * width == patches and height * size[1] == width * size[0]
    return (height, width) if fits else None


def _vectors(given: Tensor, width: int, images: int, what: str) -> Tensor:
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
