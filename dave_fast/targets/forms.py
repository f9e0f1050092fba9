"""The forms in which a target says which score of the output is explained.

Captum's forms, and callables:

None                       the predicted class of each image
int, or a tensor of one    that class, for every image
list of ints, (B,) tensor  a class per image
tuple of ints              an index into outputs with more than two dimensions, for every image
list of tuples             one such index per image
callable                   output (R, ...) -> scores (R,), for scores that are no class logit
list of callables          per image: output of one row (...) -> scalar

For classes in a tensor on a GPU, and for a list of callables, the host waits for the device.

`resolve_target` checks a target against the unperturbed output and makes its cotangent. Further targets are
subclasses of `Question`, from `dave_fast.targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.models.meaning import has_classes
from dave_fast.numbers import check_integer, is_integer, shown
from dave_fast.targets.cotangents import Cotangent, ElementCotangent, GradientCotangent, Score, score_rows
from dave_fast.transfers import to_device

Index = tuple[int, ...]


@dataclass(frozen=True)
class ModelView:
    """What a question is given to resolve itself.

    Attributes:
        model: the explained model.
        output: images (B, C, H, W) -> the model's output (B, ...).
    """

    model: nn.Module
    output: Callable[[Tensor], Tensor]


class Question:
    """A target that is none of captum's forms.

    `bind` looks up what depends on the model (the index of a class name, the embedding of a text); `resolve` makes the
    cotangent. A subclass overrides one or both.
    """

    def bind(self, view: ModelView) -> Question:
        """Return an equal question that needs no further look-up in the model."""
        return self

    def resolve(self, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
        """Return the cotangent, checked against the output.

        Args:
            output: (B, ...), the model's output for the unperturbed images.
            size: (H, W) of the images.
            view: the model.
        """
        bound = self.bind(view)
        if bound is self:
            raise NotImplementedError(f"{type(self).__name__} must bind to another question, or resolve itself")
        return bound.resolve(output, size, view)


Target = int | Index | Tensor | np.ndarray | Sequence[Any] | Score | Question | None


def resolve_target(target: Target, output: Tensor, size: tuple[int, int], view: ModelView) -> Cotangent:
    """Return the cotangent of a target, checked against the output.

    Args:
        target: in one of the forms above.
        output: (B, ...), the model's output for the unperturbed images.
        size: (H, W) of the images.
        view: the model.

    Raises:
        InputError: the number of targets is not B, an index is out of range, the form is unknown, or the model does
            not support the question.
    """
    if target is None:
        return _predicted(output, view.model)
    if isinstance(target, Question):
        return target.resolve(output, size, view)
    if callable(target):
        return GradientCotangent(lambda of_rows, rows: target(of_rows))
    return _listed(target, output)


def split_targets(targets: Any) -> list[Target]:
    """Split `targets` into a list of targets.

    Args:
        targets: a sequence of targets; or a tensor or array of classes, one for each target, or (B, targets), where
            each image has its own.

    Raises:
        InputError: `targets` has another form, or is empty.
    """
    if isinstance(targets, np.ndarray | Tensor):
        targets = torch.as_tensor(targets)
        if targets.dim() not in (1, 2) or targets.is_floating_point() or targets.dtype == torch.bool:
            raise InputError(
                f"targets are a tensor {tuple(targets.shape)} of {targets.dtype}; expected integers, one for each "
                "target, or (images, targets)"
            )
        targets = list(targets.unbind(-1))
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not len(targets):
        got = "nothing" if isinstance(targets, Sequence) and not len(targets) else f"a {type(targets).__name__}"
        raise InputError(f"targets are {got}; expected a list of at least one target, or a tensor of classes")
    return list(targets)


def _predicted(output: Tensor, model: nn.Module) -> Cotangent:
    if output.dim() == 1:
        # captum's rule for models with one score for each image
        return ElementCotangent(torch.zeros(len(output), dtype=torch.int64, device=output.device))
    if not has_classes(model, output):
        what = "an embedding" if output.dim() == 2 else tuple(output.shape)
        raise InputError(
            f"target=None takes the predicted class and needs an output (B, classes); this model's is {what}. Give "
            "an index tuple, a callable, or a question of dave_fast.targets: SimilarTo(image), Text('...') for CLIP "
            "and SigLIP, Patch(row, column) for outputs with tokens"
        )
    predicted = output.argmax(1)
    return ElementCotangent(predicted, predicted)


def _listed(target: Target, output: Tensor) -> Cotangent:
    """Resolve an index, or a list of indices or callables."""
    images = output.shape[0]
    listed = _as_list(target)
    if len(listed) == 1 and not isinstance(target, list):
        listed = listed * images
    if any(isinstance(t, Question) for t in listed):
        raise InputError(
            "target is a list of questions; a list has one class or callable for each image. For several questions of "
            "each image give targets=[...]; questions that differ by image take lists: Contrast([3, 4], [5, 6])"
        )
    if len(listed) != images:
        raise InputError(f"{len(listed)} targets were given for {images} images; give one, or one for each")
    if all(callable(t) for t in listed):
        return GradientCotangent(partial(score_rows, listed))
    indices, sizes = [_checked(t, output) for t in listed], tuple(output.shape[1:])
    places = np.array([np.ravel_multi_index(index, sizes) if sizes else 0 for index in indices], dtype=np.int64)
    classes = torch.tensor([index[0] if len(index) == 1 else -1 for index in indices])
    return ElementCotangent(to_device(torch.from_numpy(places), output.device), classes)


def _as_list(target: Any) -> list[Any]:
    """Return the targets as integers, tuples or callables; a single one is a list of one element."""
    if isinstance(target, np.ndarray | Tensor):
        target = torch.as_tensor(target)
        if target.is_floating_point() or target.dtype == torch.bool or target.dim() > 1:
            raise InputError(
                f"target is a tensor {tuple(target.shape)} of {target.dtype}; expected integers, shape () or (B,)"
            )
        return target.reshape(-1).tolist()
    if isinstance(target, tuple) or is_integer(target):
        return [target]
    if isinstance(target, Sequence) and not isinstance(target, str):
        return [t.item() if isinstance(t, Tensor) and t.numel() == 1 else t for t in target]
    hint = f" (a class by name is dave_fast.targets.Class({target!r}))" if isinstance(target, str) else ""
    raise InputError(
        f"target is a {type(target).__name__}; expected None, an int, a tuple, a tensor, a list of these, a callable, "
        f"or a question of dave_fast.targets{hint}"
    )


def _checked(target: Any, output: Tensor) -> Index:
    if not isinstance(target, tuple) and not is_integer(target):
        raise InputError(
            f"target {shown(target)} is a {type(target).__name__}, neither an integer nor a tuple of integers; give "
            "class indices"
        )
    given = target if isinstance(target, tuple) else (target,)
    target, sizes = tuple(check_integer(i, "an index of the target") for i in given), tuple(output.shape[1:])
    if len(target) != len(sizes):
        raise InputError(
            f"target {shown(target)} has {len(target)} indices; an output of shape (B, *{sizes}) needs {len(sizes)}"
        )
    for i, size in zip(target, sizes, strict=True):
        if not -size <= i < size:
            raise InputError(f"target {i} is out of range: the model's output has {size} classes, 0 to {size - 1}")
    return tuple(i % size for i, size in zip(target, sizes, strict=True))
