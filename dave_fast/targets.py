"""Targets: which score of the output is explained, in captum's forms and as callables.

None                       the predicted class of each image
int, or a tensor of one    that class, for every image
list of ints, (B,) tensor  a class per image
tuple of ints              an index into outputs with more than two dimensions, for every image
list of tuples             one such index per image
callable                   output (R, ...) -> scores (R,), for scores that are no class logit
list of callables          per image: output of one row (...) -> scalar
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dave_fast.errors import InputError

Index = tuple[int, ...]
Score = Callable[[Tensor], Tensor]
Target = int | Index | Tensor | Sequence[int] | Sequence[Index] | Score | Sequence[Score] | None


@dataclass(frozen=True)
class ResolvedTarget:
    """A target checked against the outputs: indices with their places, or a score, or scores.

    indices: per image an index into one row's output · places: (B,) int64, the same as positions in one row's
    flattened output, on the output's device · score: all rows at once · scores: one per image.
    """

    indices: list[Index] | None = None
    places: Tensor | None = None
    score: Score | None = None
    scores: list[Score] | None = None

    @property
    def classes(self) -> Tensor:
        """(B,) int64 class per image; −1 where the target is no class."""
        if self.indices is None:
            return torch.full((len(self.scores or [None]),), -1)
        return torch.tensor([index[0] if len(index) == 1 else -1 for index in self.indices])

    def cotangent(self, output: Tensor, image_index: Tensor) -> Tensor:
        """∂ Σ scores / ∂ output, of output's shape.

        output: (R, ...) detached; image_index: (R,) int64, the image that each row belongs to. Nothing waits for the
        device where image_index is on the output's, but for one callable an image, which Python runs row by row.
        """
        if self.places is not None:
            cotangent = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
            cotangent.view(len(output), -1).scatter_(1, self.places[image_index][:, None], 1)
            return cotangent
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            scores = self._scores(leaf, image_index)
            if not scores.requires_grad:
                raise InputError("the target callable's score carries no gradient; compute it from the output by torch")
            (cotangent,) = torch.autograd.grad(scores.sum(), leaf)
        return cotangent

    def _scores(self, output: Tensor, image_index: Tensor) -> Tensor:
        if self.score is not None:
            scores = self.score(output)
            if not isinstance(scores, Tensor) or scores.shape != output.shape[:1]:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise InputError(
                    f"the target callable returned {got}; it must map the output {tuple(output.shape)} to one "
                    f"score a row, shape {tuple(output.shape[:1])}"
                )
            return scores
        assert self.scores is not None
        listed = [self.scores[i](row) for i, row in zip(image_index.tolist(), output, strict=True)]
        odd = next((s for s in listed if not isinstance(s, Tensor) or s.numel() != 1), None)
        if odd is not None:
            raise InputError(f"a target callable returned {odd!r}; it must map one image's output to a scalar tensor")
        return torch.stack([s.reshape(()) for s in listed])


def resolve_target(target: Target, output: Tensor) -> ResolvedTarget:
    """Check a target against the unperturbed images' output (B, ...).

    Raises InputError where the number of targets is not B, an index is out of range, or the form is unknown.
    """
    images = output.shape[0]
    if target is None:
        if output.dim() != 2:
            raise InputError(
                f"target=None takes the predicted class and needs an output (B, classes); this model's is "
                f"{tuple(output.shape)}. Give an index tuple or a callable."
            )
        return _of_indices([(c,) for c in output.argmax(1).tolist()], output)
    if callable(target):
        return ResolvedTarget(score=target)
    listed = _as_list(target)
    if len(listed) == 1 and not isinstance(target, list):
        listed = listed * images
    if len(listed) != images:
        raise InputError(f"{len(listed)} targets were given for {images} images; give one, or one for each")
    if all(callable(t) for t in listed):
        return ResolvedTarget(scores=listed)
    return _of_indices([_checked(t, output) for t in listed], output)


def _of_indices(indices: list[Index], output: Tensor) -> ResolvedTarget:
    sizes = tuple(output.shape[1:])
    places = np.array([np.ravel_multi_index(index, sizes) if sizes else 0 for index in indices], dtype=np.int64)
    return ResolvedTarget(indices, torch.from_numpy(places).to(output.device))


def _as_list(target: Any) -> list[Any]:
    """The targets as Python ints, tuples or callables; one element where one serves all images."""
    if isinstance(target, bool):
        raise InputError("target is a bool; give a class index")
    if isinstance(target, int | tuple):
        return [target]
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.dtype == torch.bool or target.dim() > 1:
            raise InputError(
                f"target is a tensor {tuple(target.shape)} of {target.dtype}; expected integers, shape () or (B,)"
            )
        return target.reshape(-1).tolist()
    if isinstance(target, Sequence) and not isinstance(target, str):
        return [t.item() if isinstance(t, Tensor) and t.numel() == 1 else t for t in target]
    if hasattr(target, "__index__"):
        return [int(target)]
    raise InputError(
        f"target is a {type(target).__name__}; expected None, an int, a tuple, a tensor, a list of these, or a callable"
    )


def _checked(target: Any, output: Tensor) -> Index:
    if hasattr(target, "__index__") and not isinstance(target, bool):
        target = (int(target),)
    if not isinstance(target, tuple) or not all(hasattr(i, "__index__") for i in target):
        raise InputError(f"target {target!r} is neither an integer nor a tuple of integers")
    sizes = tuple(output.shape[1:])
    if len(target) != len(sizes):
        raise InputError(
            f"target {target} has {len(target)} indices; an output of shape (B, *{sizes}) needs {len(sizes)}"
        )
    for i, size in zip(target, sizes, strict=True):
        if not -size <= i < size:
            raise InputError(f"target {i} is out of range: the model's output has {size} classes, 0 to {size - 1}")
    return tuple(int(i) % size for i, size in zip(target, sizes, strict=True))
