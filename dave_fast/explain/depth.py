"""The depth of a map: at the pixels, as in the paper, or at the tokens that enter a block.

A map at the pixels says how each pixel, times the frozen gradient, adds to the decision. It leaves out all that
position embeddings, prefix tokens and biases carry, which in a deep model can be most of the logit. A map at a block
says how the tokens there add to it (`dave_fast.engine.levels`): it is no statement about single pixels, since a token
holds by then what attention brought from other patches, and accounts for more of the logit. `Depths` tells how much
(`dave_fast.explain.depth_account`). A map at a range of blocks is that of the mean of their evidence, for which the
same holds.

"auto" is the range of the deeper half. Single blocks differ by chance, and which of them is best differs from model to
model; their mean was near the best of each (docs/depth.md). The names of depths are here, without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from dave_fast.errors import InputError
from dave_fast.numbers import number_in, shown, whole_in

PIXELS, AUTO = "pixels", "auto"

Depth = str | int | float
# a number of a block, several in a row, or None for the pixels: `engine.levels.Place`
Place = int | range | None
FORMS = "'pixels', 'auto', the number of a block, a range of blocks such as '5-9', or a share of the depth such as 0.5"
# no model has as many: numbers of blocks have four digits
_MOST_BLOCKS = 10**4
_RANGE = re.compile(r"([0-9]{1,4})-([0-9]{1,4})")


def parse_depth(text: str) -> Depth | list[Depth]:
    """Return the depth that a text names: 'pixels', 'auto', '6', '5-9', '0.5', or several with commas between.

    Raises InputError for any other text.
    """
    parts = [_parsed(part.strip()) for part in text.split(",")]
    return parts if len(parts) > 1 else parts[0]


def _parsed(word: str) -> Depth:
    if word in (PIXELS, AUTO) or _RANGE.fullmatch(word):
        return check_one(word)
    try:
        whole = whole_in(word)
        return check_one(number_in(word) if whole is None else whole)
    except InputError as error:
        raise InputError(f"depth {shown(word)} is unknown; expected {FORMS}") from error


def check_depth(depth: object) -> tuple[Depth, ...]:
    """Return the depths that are given, one or a sequence; raise InputError unless each has one of the forms."""
    if isinstance(depth, Sequence) and not isinstance(depth, str | bytes):
        if not depth:
            raise InputError(f"depth is an empty sequence; expected {FORMS}, or several of them")
        return tuple(check_one(each) for each in depth)
    return (check_one(depth),)


def check_one(depth: Any) -> Depth:
    """Return a depth; raise InputError unless it has one of the forms."""
    # True and False are integers of Python, and numbers of other libraries are welcome
    number = None if isinstance(depth, bool) else depth
    if isinstance(depth, str) and (depth in (PIXELS, AUTO) or _range_of(depth)):
        return depth
    if isinstance(number, Integral) and 0 <= int(number) < _MOST_BLOCKS:
        return int(number)
    if isinstance(number, Real) and not isinstance(number, Integral) and bool(0 <= number <= 1):  # type: ignore[operator]
        return float(number)
    raise InputError(f"depth is {shown(depth)}; expected {FORMS}")


def _range_of(text: str) -> range | None:
    """Return the range that a text such as '5-9' names, of two blocks or more; None for any other text."""
    found = _RANGE.fullmatch(text)
    named = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    return named if len(named) > 1 else None


def place_of(depth: Depth, blocks: Sequence[object]) -> Place:
    """Return the block or the blocks that a depth names; None for the pixels.

    Args:
        depth: one that was checked.
        blocks: of the model, each with the grid of its tokens; those of a range have the same.

    Raises:
        InputError: the model has no such block, or blocks of other grids in that range.
    """
    if depth == PIXELS:
        return None
    last = len(blocks) - 1
    if depth == AUTO:
        return _automatic(blocks)
    if isinstance(depth, float):
        return min(last, math.floor(depth * len(blocks) + 0.5))
    wanted = _range_of(depth) if isinstance(depth, str) else range(depth, depth + 1)
    assert wanted is not None
    if wanted[-1] > last:
        raise InputError(f"depth is {name_of(depth)} and the model has the blocks 0 to {last}; expected {FORMS}")
    if len({blocks[block] for block in wanted}) > 1:
        raise InputError(
            f"depth is {name_of(depth)}, whose tokens lie on different grids; expected blocks of one grid: "
            f"{', '.join(f'{block}: {blocks[block]}' for block in wanted)}"
        )
    return wanted if len(wanted) > 1 else wanted[0]


def _automatic(blocks: Sequence[object]) -> Place:
    """Return the blocks of "auto": the deeper half, as far as their grids are the same."""
    first = len(blocks) // 2
    last = first
    while last + 1 < len(blocks) and blocks[last + 1] == blocks[first]:
        last += 1
    return range(first, last + 1) if last > first else first


def depth_of(place: Place) -> str | int:
    """Return the resolved depth of a place: "pixels", the number of a block, or a range such as "5-9"."""
    if place is None:
        return PIXELS
    return f"{place[0]}-{place[-1]}" if isinstance(place, range) else place


def name_of(depth: Depth) -> str:
    """Return a depth in words, that of an explanation as "pixels", "block 6" or "blocks 5-9"."""
    if isinstance(depth, str) and _range_of(depth):
        return f"blocks {depth}"
    return f"block {depth}" if isinstance(depth, int) else str(depth)


def places_of(depths: Sequence[Depth], blocks: Callable[[], Sequence[object]]) -> list[Place]:
    """Return the block or the blocks at each depth, None for the pixels.

    Args:
        depths: that were checked.
        blocks: returns the model's blocks, as for `place_of`; called only where it matters, since a model without a
            sequence of blocks has pixels too.

    Raises:
        InputError: the model has no such block, or blocks of other grids in a range.
    """
    known = () if all(depth == PIXELS for depth in depths) else blocks()
    return [place_of(depth, known) for depth in depths]
