"""The depth of a map: at the pixels, as in the paper, or at the tokens that enter a block.

A map at the pixels says how each pixel, times the frozen gradient, adds to the decision. It leaves out all that
position embeddings, prefix tokens and biases carry, which in a deep model can be most of the logit. A map at a block
says how the tokens there add to it (`dave_fast.engine.levels`): it is no statement about single pixels, since a token
holds by then what attention brought from other patches, and accounts for more of the logit. `Depths` tells how much
(`dave_fast.explain.depth_account`). The names of depths are here, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from dave_fast.errors import InputError

PIXELS, AUTO = "pixels", "auto"
# the share of a model's blocks that "auto" takes
AUTO_SHARE = 0.55

Depth = str | int | float
FORMS = "'pixels', 'auto', the number of a block, or a share of the depth such as 0.5"


def parse_depth(text: str) -> Depth | list[Depth]:
    """Return the depth that a text names: 'pixels', 'auto', '6', '0.5', or several with commas between.

    Raises InputError for any other text.
    """
    parts = [_parsed(part.strip()) for part in text.split(",")]
    return parts if len(parts) > 1 else parts[0]


def _parsed(word: str) -> Depth:
    if word in (PIXELS, AUTO):
        return word
    try:
        return check_one(int(word) if word.isdecimal() else float(word))
    except ValueError:
        raise InputError(f"depth {word!r} is unknown; expected {FORMS}") from None


def check_depth(depth: object) -> tuple[Depth, ...]:
    """Return the depths that are given, one or a sequence; raise InputError unless each has one of the forms."""
    if isinstance(depth, Sequence) and not isinstance(depth, str):
        if not depth:
            raise InputError(f"depth is an empty sequence; expected {FORMS}, or several of them")
        return tuple(check_one(each) for each in depth)
    return (check_one(depth),)


def check_one(depth: Any) -> Depth:
    """Return a depth; raise InputError unless it has one of the forms."""
    named = isinstance(depth, str) and depth in (PIXELS, AUTO)
    # True and False are integers of Python, and numbers of other libraries are welcome
    number = None if isinstance(depth, bool) else depth
    if named:
        return str(depth)
    if isinstance(number, Integral) and int(number) >= 0:
        return int(number)
    if isinstance(number, Real) and not isinstance(number, Integral) and 0 <= float(number) <= 1:
        return float(number)
    raise InputError(f"depth is {depth!r}; expected {FORMS}")


def block_of(depth: Depth, blocks: int) -> int | None:
    """Return the number of the block that a depth names; None for the pixels.

    Args:
        depth: one that was checked.
        blocks: of the model.

    Raises:
        InputError: the model has no such block.
    """
    if depth == PIXELS:
        return None
    if depth == AUTO:
        depth = AUTO_SHARE
    if isinstance(depth, float):
        return min(blocks - 1, math.floor(depth * blocks + 0.5))
    assert isinstance(depth, int)
    if depth >= blocks:
        raise InputError(f"depth is block {depth} and the model has the blocks 0 to {blocks - 1}; expected {FORMS}")
    return depth


def name_of(depth: Depth) -> str:
    """Return a depth in words, that of an explanation as "pixels" or "block 6"."""
    return f"block {depth}" if isinstance(depth, int) else str(depth)


def places_of(depths: Sequence[Depth], count: Callable[[], int]) -> list[int | None]:
    """Return the number of the block at each depth, None for the pixels.

    Args:
        depths: that were checked.
        count: returns the number of the model's blocks; called only where it matters, since a model without a sequence
            of blocks has pixels too.

    Raises:
        InputError: the model has no such block.
    """
    blocks = 0 if all(depth == PIXELS for depth in depths) else count()
    return [block_of(depth, blocks) for depth in depths]
