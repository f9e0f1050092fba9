"""The levels of a model at which one walk back tells evidence: its pixels, and the tokens that enter its blocks.

At block l let X_l be the tokens that enter it at a perturbed image, and w_l the cotangent there with every operator
from l on held constant. The evidence of a token is a_l = Σ_channels X_l ⊙ w_l. Everything behind the entry of block l
is affine in X_l, so that

    Σ_tokens a_l + (what biases behind l contribute) = ⟨cotangent, output⟩

which for a class is its logit. At the pixels, a contribution is the pixel ⊙ its cotangent, and all of position
embeddings, prefix tokens and biases is left out; the deeper, the less.

The engine's folded weights change neither factor: LayerScale and norms are folded into readers and writers of the
stream, not into the stream. Where the stream is centred, X_l is the model's without its mean over the channels; every
reader of such a stream removes that mean itself, so that w_l sums to zero over the channels and a_l is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The levels that a walk back returns.

    Attributes:
        pixels: whether the walk goes to the pixels; otherwise it ends at the first of `blocks`.
        blocks: numbers of blocks, ascending.
    """

    pixels: bool = True
    blocks: tuple[int, ...] = ()


PIXELS = Levels()


# of a map: a number of a block, several in a row, whose evidence is averaged, or None for the pixels
Place = int | range | None


def blocks_of(place: Place) -> Sequence[int]:
    """Return the numbers of the blocks of a place; none for the pixels."""
    if place is None:
        return ()
    return place if isinstance(place, range) else (place,)


def levels_of(places: Sequence[Place]) -> Levels:
    """Return the levels that hold all of these places."""
    return Levels(None in places, tuple(sorted({block for place in places for block in blocks_of(place)})))


class Pulled(NamedTuple):
    """What a walk back returns for R rows.

    Attributes:
        pixels: their cotangent as the tokens of patches have it, (R, n, C·p_h·p_w) in the dtype of the walk, or their
            contributions (R, C, H, W); None where the walk ends before them.
        evidence: of each block of the levels, (R, N) in the dtype of statistics.
    """

    pixels: Tensor | None
    evidence: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the same order for the same levels."""
        return [*(() if self.pixels is None else (self.pixels,)), *self.evidence]

    def map(self, change: Callable[[Tensor], Tensor]) -> Pulled:
        """Return it with every tensor changed."""
        return Pulled(None if self.pixels is None else change(self.pixels), tuple(map(change, self.evidence)))

    def rows(self, count: int) -> Pulled:
        """Return the first rows."""
        return self.map(lambda t: t[:count])

    def part(self, rows: slice) -> Pulled:
        """Return some rows of what several targets have, (targets, R, ...)."""
        return self.map(lambda t: t[:, rows])

    def like(self, targets: int, rows: int) -> Pulled:
        """Return memory for the same of several targets and all rows, (targets, R, ...)."""
        return self.map(lambda t: t.new_empty((targets, rows, *t.shape[1:])))

    def store(self, found: Pulled, target: int, at: slice) -> None:
        """Copy what was found for some rows of a target into the memory of `like`."""
        for memory, values in zip(self.tensors(), found.tensors(), strict=True):
            memory[target, at].copy_(values)


@dataclass(frozen=True)
class TokenGrid:
    """The tokens that enter a block: first those that are no patches, then the patches row by row.

    Attributes:
        prefix: tokens that are no patches, such as a class token and registers.
        height: rows of patches.
        width: patches of a row.
    """

    prefix: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.height * self.width
