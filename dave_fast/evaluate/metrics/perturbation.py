"""Deletion and insertion: the class's score while pixels are replaced in the order of a map, by named protocols.

Published "deletion" numbers differ in seven choices, so they are comparable only under the same protocol:

    dave             least important pixels first; 0, every ⌊⌊0.9·n⌋/128⌋ up to ⌊0.9·n⌋ of them give way to the image's
                     own blur (31×31, σ 7, zeros outside); probability; area: trapezoids over per cent, 0 to 90
    rise-deletion    most important pixels first; 0, every ⌈n/224⌉ up to n of them become 0, a normalised image's mean;
                     probability; area: trapezoids over fractions
    rise-insertion   the same points, from the image's own blur (11×11, σ 5, zeros outside) to the image
    quantus          most important elements of C·H·W first; every ⌈n/224⌉ up to n (never 0) become the image's
                     minimum; probability; area: trapezoids over points, one apart

A probability is the softmax of the logits, or what else the model's link says (`dave_fast.models.meaning`).
n is the number of pixels (or elements) of an image; 128 and 224 are `steps`. Sources: the authors' script
(github.com/a-vrobell/DAVE at ee412e5); Petsiuk et al., RISE, BMVC 2018, whose script folds the tails of its blur back
into the 11 pixels where this one cuts them; Quantus 0.6 `PixelFlipping`, whose default of one element a step (150,528
forward passes an image at 224 px) is `steps=n` here.

Equal values change in the order of index · 2654435761 mod 2³², a fixed scatter over the image, so that a flat map
changes evenly everywhere. (NumPy's default sort leaves the order of ties open.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.models.meaning import link_of, probabilities

# Knuth's multiplicative hash: scatters pixel indices evenly and repeatably
_SCATTER, _SCATTER_RANGE = 2654435761, 2**32
ORDERS, FILLS, AREAS = ("least", "most"), ("blur", "zero", "minimum"), ("per cent", "fraction", "points")


class Curve(NamedTuple):
    """Scores along a perturbation.

    Attributes:
        changed: (points,) float64, the share of an image that has been changed.
        scores: (B, points) float64.
    """

    changed: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Protocol:
    """How an image is changed to test its map; the named protocols are listed above.

    Attributes:
        order: whether the "least" or the "most" important units are changed first.
        insert: whether to go from the fill to the image instead of from the image to the fill.
        fill: "blur", "zero" or "minimum".
        blur: size and σ of the blur's window, in pixels.
        element: whether units are single channel values instead of pixels.
        fraction: the share of the units that are changed in the end.
        steps: about how many points there are.
        coarse: whether strides between points are rounded up instead of down.
        start: whether the unchanged image is a point.
        probability: whether the score is the model's probability, a softmax or a sigmoid, instead of the logit.
        area: the abscissa of `published_area`, "per cent", "fraction" or "points".
    """

    order: str = "most"
    insert: bool = False
    fill: str = "zero"
    blur: tuple[int, float] = (11, 5.0)
    element: bool = False
    fraction: float = 1.0
    steps: int = 224
    coarse: bool = True
    start: bool = True
    probability: bool = True
    area: str = "fraction"

    def __post_init__(self) -> None:
        for name, allowed in (("order", ORDERS), ("fill", FILLS), ("area", AREAS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}.")
        if not 0 < self.fraction <= 1 or self.steps < 1:
            raise InputError(f"fraction={self.fraction}, steps={self.steps}: expected 0 < fraction ≤ 1 and steps ≥ 1.")

    @property
    def higher_is_better(self) -> bool:
        """Whether a faithful map gives a larger area: it keeps the evidence longest, or inserts it first."""
        return self.insert == (self.order == "most")

    def counts(self, units: int) -> list[int]:
        """Return how many of an image's units are changed at each point."""
        last = max(1, int(self.fraction * units))
        stride = max(1, -(-last // self.steps) if self.coarse else last // self.steps)
        points = [*range(stride, last, stride), last]
        return [0, *points] if self.start else points


PROTOCOLS = {
    "dave": Protocol("least", fill="blur", blur=(31, 7.0), fraction=0.9, steps=128, coarse=False, area="per cent"),
    "rise-deletion": Protocol(),
    "rise-insertion": Protocol(insert=True, fill="blur"),
    "quantus": Protocol(fill="minimum", element=True, start=False, area="points"),
}


def protocol_of(protocol: str | Protocol, steps: int | None = None) -> Protocol:
    """Return a protocol by its name, or the given one, with another number of steps unless None.

    Raises:
        InputError: the name is unknown.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise InputError(f"there is no protocol {protocol!r}; expected one of {', '.join(PROTOCOLS)}.")
        protocol = PROTOCOLS[protocol]
    return protocol if steps is None else replace(protocol, steps=steps)


@torch.no_grad()
def perturbation_curve(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    protocol: str | Protocol = "dave",
    *,
    steps: int | None = None,
    fill: Tensor | None = None,
    batch_size: int = 128,
) -> Curve:
    """Compute the class's score while an image is changed in the order of its map.

    The authors use only images that the model classifies correctly with a probability of 0.9 or more; choose them
    beforehand.

    Args:
        model: images (n, C, H, W) -> logits (n, K), on the images' device; what they mean is read from its attributes
            (see `dave_fast.models.meaning`).
        images: (B, C, H, W), normalised.
        maps: (B, H, W), signed or not; or (B, C, H, W), summed over channels unless the protocol changes elements.
        targets: (B,) int64, classes.
        protocol: a name of `PROTOCOLS`, or a protocol.
        steps: replaces the protocol's own.
        fill: (B, C, H, W), replaces the protocol's own.
        batch_size: perturbed images in one forward pass.

    Returns:
        The curve; its scores are NaN for a map with NaN.

    Raises:
        InputError: maps and images do not fit, the protocol is unknown, or it takes probabilities of a model without.
    """
    chosen = protocol_of(protocol, steps)
    if maps.shape not in (images.shape, images[:, 0].shape):
        raise InputError(
            f"maps {tuple(maps.shape)} do not belong to images {tuple(images.shape)}: expected (B, H, W) or "
            "(B, C, H, W)."
        )
    values = _values(maps, images, chosen)
    ranks = _ranks(values if chosen.order == "least" else -values)
    filled = _fill(images, chosen) if fill is None else fill
    counts = torch.tensor(chosen.counts(ranks[0].numel()), device=images.device)
    rows = torch.arange(len(images), device=images.device).repeat_interleave(len(counts))
    points = counts.repeat(len(images))
    scores = torch.empty(len(rows), dtype=torch.float64, device=images.device)
    for start in range(0, len(rows), batch_size):
        some = slice(start, start + batch_size)
        row = rows[some]
        changed = ranks[row] < points[some, None, None, None]
        first, second = (images[row], filled[row]) if chosen.insert else (filled[row], images[row])
        output = model(torch.where(changed, first, second)).double()
        output = _probabilities(model, output) if chosen.probability else output
        scores[some] = output.gather(1, targets.to(images.device)[row, None])[:, 0]
    scores = scores.view(len(images), len(counts))
    scores[values.flatten(1).isnan().any(1)] = torch.nan
    return Curve(counts.double() / ranks[0].numel(), scores)


def _probabilities(model: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Return the probabilities of logits (n, K); raise InputError for a model that has none."""
    if link_of(model, output.shape[1]) is None:
        raise InputError(
            "the model's output has no probabilities (embeddings, or its link is None): measure the score itself, by a "
            "protocol of its own: Protocol(..., probability=False)."
        )
    return probabilities(model, output)


def mean_score(curve: Curve) -> Tensor:
    """Return the mean score along curves, (B,): trapezoids over the changed share, divided by its range.

    It hardly depends on the number of points, and is the published area of both protocols of RISE.
    """
    return torch.trapezoid(curve.scores, curve.changed, dim=1) / (curve.changed[-1] - curve.changed[0])


def published_area(curve: Curve, protocol: str | Protocol) -> Tensor:
    """Return the area under curves as the protocol's source integrates it (listed above), (B,).

    That of "quantus" grows with the number of points; Quantus 0.6 itself cannot compute it under NumPy 2.4 and later,
    which have no `trapz`.
    """
    area = protocol_of(protocol).area
    if area == "points":
        return torch.trapezoid(curve.scores, dim=1)
    return torch.trapezoid(curve.scores, curve.changed * (100 if area == "per cent" else 1), dim=1)


def blur(images: Tensor, size: int = 31, sigma: float = 7.0) -> Tensor:
    """Blur images by a normalised Gaussian window; outside of the image counts as 0, a normalised image's mean.

    Args:
        images: (B, C, H, W).
        size: of the window along each axis, in pixels.
        sigma: σ in pixels.

    Returns:
        (B, C, H, W) in the images' dtype.
    """
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = (window / window.sum()).to(images)
    channels = images.shape[1]
    across = F.conv2d(images, window.expand(channels, 1, 1, size), padding=(0, size // 2), groups=channels)
    return F.conv2d(across, window[:, None].expand(channels, 1, size, 1), padding=(size // 2, 0), groups=channels)


def _values(maps: Tensor, images: Tensor, protocol: Protocol) -> Tensor:
    """Return the importance of the units: (B, 1, H, W) for pixels, (B, C, H, W) for elements."""
    maps = maps if maps.ndim == 4 else maps[:, None]
    return maps.expand_as(images) if protocol.element else maps.sum(1, keepdim=True)


def _fill(images: Tensor, protocol: Protocol) -> Tensor:
    if protocol.fill == "blur":
        return blur(images, *protocol.blur)
    if protocol.fill == "minimum":
        return images.amin(dim=(1, 2, 3), keepdim=True).expand_as(images)
    return torch.zeros_like(images)


def _ranks(values: Tensor) -> Tensor:
    """Return each unit's place in the order of change, from 0: int64 like values (B, ...), ties by the scatter."""
    flat = values.flatten(1)
    scatter = torch.arange(flat.shape[1], device=values.device) * _SCATTER % _SCATTER_RANGE
    by_scatter = torch.argsort(scatter)
    order = by_scatter[torch.argsort(flat[:, by_scatter], dim=1, stable=True)]
    places = torch.arange(flat.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(values.shape)
