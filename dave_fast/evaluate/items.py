"""Photographs and mosaics one by one, each scored under every row of a family (`dave_fast.evaluate.rows`).

For measurements that are stored item by item and go on where they were stopped. A score is the mean over the maps of an
item, those of its classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics, probes
from dave_fast.evaluate.rows import Family
from dave_fast.evaluate.scoring import Maps
from dave_fast.evaluate.settings import VARIANTS
from dave_fast.evaluate.sources import Examples
from dave_fast.evaluate.stages import stages

PROTOCOLS = ("dave", "rise-deletion", "rise-insertion")
CURVE_STEPS, STABILITY_SIGMA = 16, 0.02


@dataclass(frozen=True)
class Item:
    """One photograph or mosaic.

    Attributes:
        name: of it.
        key: of its draws.
        image: (1, 3, H, W).
        classes: (K,), what is explained.
        mask: (H, W) of a photograph's object.
        cells: (K,) of a mosaic.
        grid: cells along each side.
    """

    name: str
    key: int
    image: Tensor
    classes: Tensor
    mask: Tensor | None = None
    cells: Tensor | None = None
    grid: int = 1


def photographs(examples: Examples, count: int) -> list[Item]:
    """Return photographs with objects."""
    with_object = [row for row in range(len(examples)) if examples.masks[row].any()]
    return [_photograph(examples, row) for row in with_object[:count]]


def of_all_classes(examples: Examples, count: int, seed: int) -> list[Item]:
    """Return photographs of all classes in turns."""
    turns = probes.draw_mosaics(examples.labels, 1, count, seed)[:, 0]
    return [_photograph(examples, row) for row in dict.fromkeys(turns.tolist())]


def _photograph(examples: Examples, row: int) -> Item:
    some = slice(row, row + 1)
    return Item(examples.names[row], row, examples.images[some], examples.labels[some], examples.masks[row])


def mosaics(examples: Examples, grid: int, count: int, seed: int) -> list[Item]:
    """Return mosaics, with the cells whose class occurs once."""
    chosen = probes.draw_mosaics(examples.labels, grid, count, seed + grid)
    images = metrics.build_mosaics(examples.images[chosen])
    items = []
    for number, (image, labels) in enumerate(zip(images, examples.labels[chosen], strict=True)):
        cells = probes.asked_cells(labels)
        items.append(Item(f"mosaic {number}", number, image[None], labels[cells], cells=cells, grid=grid))
    return items


# row -> metric -> variant -> the mean over the item's maps
Scores = dict[str, dict[str, dict[str, float]]]


def _scores(found: dict[str, Maps], metric: str, function: Callable[[str, str, Tensor], Tensor]) -> Scores:
    """Return the mean of a function of (row, variant, maps) for each row and variant."""
    return {
        row: {metric: {variant: function(row, variant, each).nanmean().item() for variant, each in maps.items()}}
        for row, maps in found.items()
    }


def _joined(*scores: Scores) -> Scores:
    whole: Scores = {}
    for one in scores:
        for row, scored in one.items():
            whole.setdefault(row, {}).update(scored)
    return whole


def localise(item: Item, family: Family) -> Scores:
    """Score EnergyPG and the pointing game, or GridPG."""
    found, cells, mask = family(item.image, item.classes, item.key), item.cells, item.mask
    if cells is not None:
        title = f"GridPG {item.grid}x{item.grid}"
        return _scores(found, title, lambda row, variant, maps: metrics.grid_pointing_game(maps, cells, item.grid))
    if mask is None:
        raise InputError(f"{item.name} has neither an object nor cells to look for")
    return _joined(
        _scores(found, "EnergyPG", lambda row, variant, maps: metrics.energy_pointing_game(maps, mask[None])),
        _scores(found, "pointing game", lambda row, variant, maps: metrics.pointing_game(maps, mask[None])),
    )


def behave(model: nn.Module, item: Item, family: Family) -> Scores:
    """Score deletion and insertion by smoothed maps, stability under noise, and the likeness of two classes' maps."""
    found = family(item.image, item.classes, item.key)
    noise = torch.randn(item.image.shape, generator=torch.Generator().manual_seed(item.key)).to(item.image)
    noisy = family(item.image + STABILITY_SIGMA * noise, item.classes, item.key)
    second = model(item.image).scatter(1, item.classes[:, None], -torch.inf).argmax(1)
    other = family(item.image, second, item.key)
    smoothed = {row: {VARIANTS[1]: maps[VARIANTS[1]]} for row, maps in found.items()}

    def mean_along(protocol: str, row: str, variant: str, maps: Tensor) -> Tensor:
        curve = metrics.perturbation_curve(model, item.image, maps, item.classes, protocol, steps=CURVE_STEPS)
        return metrics.mean_score(curve)

    def likeness(others: dict[str, Maps], row: str, variant: str, maps: Tensor) -> Tensor:
        return metrics.correlation(maps, others[row][variant])

    return _joined(
        *(_scores(smoothed, f"{name} curve", partial(mean_along, name)) for name in PROTOCOLS),
        _scores(found, "stability", partial(likeness, noisy)),
        _scores(found, "class similarity", partial(likeness, other)),
    )


def resemble(changed: Sequence[Family], item: Item, family: Family) -> Scores:
    """Score the rank correlation with the maps of ever more randomised models."""
    found = family(item.image, item.classes, item.key)
    others = [each(item.image, item.classes, item.key) for each in changed]
    return _scores(
        found,
        "random model",
        lambda row, variant, maps: torch.stack([metrics.rank_correlation(maps, each[row][variant]) for each in others]),
    )


def randomised(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Yield the model with its head, a third, two thirds and all of its stages randomised, the same copy each time."""
    disturbed = copy.deepcopy(model)
    changes = stages(disturbed, seed)
    stops = {round(share * (len(changes) - 1)) for share in (0, 1 / 3, 2 / 3, 1)}
    for number, (_, change) in enumerate(changes):
        change()
        if number in stops:
            yield copy.deepcopy(disturbed)
