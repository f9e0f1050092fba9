"""Cotangents of the output, ∂ score / ∂ output, computed for each micro-batch: where the VJP walk starts.

A cotangent maps the output (R, ...) of a micro-batch, detached, and its rows' draws to a tensor of the output's shape.
Linear scores have a closed form, which needs neither autograd nor a synchronisation with the device; so a GPU replays
one graph before it and one after it (`engine.graphs`). A norm in the score depends on the input and is held constant
like every other operator (DAVE, arXiv 2602.06613, Eq. 5).

R rows (image, sample) · B images · D width of an embedding or token · (h, w) grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.sampling import Draws
from dave_fast.targets.places import Place, moved_boxes, of_rows, overlap

Score = Callable[[Tensor], Tensor]


class Cotangent:
    """The function that gives ∂ score / ∂ output of every row.

    Attributes:
        classes: (B,) or (1,) int64, the explained class of each image, −1 for a score that is no class logit; on the
            host or on the output's device.
    """

    classes: Tensor = torch.full((1,), -1, device="cpu")

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """Return ∂ score / ∂ output.

        Args:
            output: (R, ...), detached.
            rows: the draws of the R rows, on the output's device.

        Returns:
            (R, ...) in the output's dtype.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ElementCotangent(Cotangent):
    """One element of each image's output, such as a class logit.

    Attributes:
        places: (B,) int64, the element's position in the flattened output of an image, on the output's device.
        classes: see `Cotangent`.
    """

    places: Tensor
    classes: Tensor = Cotangent.classes

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`."""
        cotangent = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        cotangent.view(len(output), -1).scatter_(1, self.places[rows.image_index][:, None], 1)
        return cotangent


@dataclass(frozen=True)
class WeightedCotangent(Cotangent):
    """Σ weight · score of several cotangents.

    Attributes:
        parts: pairs (weight, cotangent), at least one.
    """

    parts: tuple[tuple[float, Cotangent], ...]

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`."""
        (weight, first), *others = self.parts
        total = weight * first(output, rows)
        for weight, part in others:
            total += weight * part(output, rows)
        return total


@dataclass(frozen=True)
class DirectionCotangent(Cotangent):
    """scale · ⟨f/‖f‖, e⟩ of an embedding f, its norm held constant: the cotangent is scale · e/‖f‖.

    Autograd's gradient of the same score has no component along f and vanishes where f and e agree. With the norm
    held constant, like that of an RMSNorm, the score is a linear function of f.

    Attributes:
        directions: e, (B, D), or (1, D) for all images, of norm 1.
        scale: factor of the score.
    """

    directions: Tensor
    scale: float

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`."""
        norms = torch.linalg.vector_norm(output.to(self.directions.dtype), dim=1, keepdim=True)
        chosen = of_rows(self.directions, rows)
        smallest = torch.finfo(norms.dtype).tiny
        return (self.scale * chosen / norms.clamp_min(smallest)).to(output.dtype)


@dataclass(frozen=True)
class PatchCotangent(Cotangent):
    """⟨weights, token⟩ of a dense output at a given place of the image, wherever a row's warp has moved it.

    Attributes:
        weights: (B, D), or (1, D) for all images.
        place: in the unperturbed image.
        grid: (h, w), tokens along each axis.
        cell: (height, width) of a token in pixels.
        prefix: tokens before the grid's in outputs (R, N, D).
        channels_last: whether outputs with four dimensions are (R, h, w, D) rather than (R, D, h, w).
    """

    weights: Tensor
    place: Place
    grid: tuple[int, int]
    cell: tuple[float, float]
    prefix: int = 0
    channels_last: bool = False

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`."""
        shares = self.place.shares(rows, self.grid, self.cell).to(self.weights.dtype)
        patches = shares[..., None] * of_rows(self.weights, rows)[:, None, None]
        cotangent = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        if output.dim() == 3:
            cotangent[:, self.prefix :] = patches.flatten(1, 2)
        else:
            cotangent.copy_(patches if self.channels_last else patches.permute(0, 3, 1, 2))
        return cotangent


@dataclass(frozen=True)
class BoxCotangent(Cotangent):
    """A logit of the detection whose box fits a given box best, wherever a row's warp has moved that box.

    The order of detections is the row's own, so that each row's is found by the intersection over union of its box and
    the moved one. Boxes choose and have no part in the score. A row in which nothing overlaps gives zero.

    Attributes:
        boxes: (B, 4) float64, left, top, right and bottom edges in pixels of the unperturbed image.
        index: of the logit.
        size: (H, W) of the images.
    """

    boxes: Tensor
    index: int
    size: tuple[int, int]

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`."""
        wanted = moved_boxes(of_rows(self.boxes, rows), rows, self.size)
        found, query = overlap(detected_boxes(output, self.size), wanted[:, None]).max(dim=1)
        cotangent = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        place = query * output.shape[2] + self.index
        cotangent.view(len(output), -1).scatter_(1, place[:, None], (found > 0).to(output.dtype)[:, None])
        return cotangent


def detected_boxes(output: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the boxes of detections, (R, Q, 4) float64: left, top, right and bottom edges in pixels.

    Args:
        output: (R, Q, K + 4), logits and behind them the box's centre x, y, width and height as shares of the image.
        size: (H, W) of the images.
    """
    x, y, width, height = output[..., -4:].double().unbind(-1)
    edges = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return torch.stack([edge * size[1 - number % 2] for number, edge in enumerate(edges)], dim=-1)


@dataclass(frozen=True)
class ImageCotangents(Cotangent):
    """Another cotangent for each image, for callers whose images have questions of their own; waits for the device.

    Attributes:
        parts: B cotangents, each of its image alone.
    """

    parts: tuple[Cotangent, ...]

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`."""
        index, found = rows.image_index.tolist(), []
        for image, run in groupby(range(len(index)), key=index.__getitem__):
            first, *others = run
            at = slice(first, first + 1 + len(others))
            alone = replace(rows[at], image_index=torch.zeros_like(rows.image_index[at]))
            found.append(self.parts[image](output[at], alone))
        return torch.cat(found)


@dataclass(frozen=True)
class GradientCotangent(Cotangent):
    """The gradient of a callable, by autograd.

    Attributes:
        score: output (R, ...) and the draws of the rows -> scores (R,).
    """

    score: Callable[[Tensor, Draws], Tensor]

    def __call__(self, output: Tensor, rows: Draws) -> Tensor:
        """See `Cotangent`.

        Raises:
            InputError: the scores have another shape than (R,), or no gradient.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            scores = self.score(leaf, rows)
            if not isinstance(scores, Tensor) or scores.shape != leaf.shape[:1]:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise InputError(
                    f"the target callable returned {got}; it must map the output {tuple(leaf.shape)} to one "
                    f"score for each row, shape {tuple(leaf.shape[:1])}"
                )
            if not scores.requires_grad:
                raise InputError("the target callable's score carries no gradient; compute it from the output by torch")
            (cotangent,) = torch.autograd.grad(scores.sum(), leaf)
        return cotangent


def score_rows(scores: Sequence[Score], output: Tensor, rows: Draws) -> Tensor:
    """Return the score of each row by the callable of its image, which waits for the device.

    Args:
        scores: B callables, output of one row (...) -> scalar.
        output: (R, ...).
        rows: the draws of the R rows.

    Returns:
        (R,).

    Raises:
        InputError: a callable returns no scalar.
    """
    listed = [scores[i](row) for i, row in zip(rows.image_index.tolist(), output, strict=True)]
    odd = next((s for s in listed if not isinstance(s, Tensor) or s.numel() != 1), None)
    if odd is not None:
        raise InputError(f"a target callable returned {odd!r}; it must map one image's output to a scalar tensor")
    return torch.stack([s.reshape(()) for s in listed])
