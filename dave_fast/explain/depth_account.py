"""What of a decision each depth of a model accounts for: as numbers, a sentence, a table, a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dave_fast.engine.levels import Levels, blocks_of, levels_of
from dave_fast.engine.micro_batches import MicroBatches
from dave_fast.errors import InputError
from dave_fast.explain.depth import name_of, place_of
from dave_fast.images import figures
from dave_fast.sampling import identity
from dave_fast.targets.cotangents import Cotangent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 32
PARTS = ("patches", "prefix tokens", "biases behind")
NOTE = "at the pixels, position embedding and prefix tokens count among the biases"
# orange as in maps, blue, grey
_COLOURS = ("#e8713c", "#3b7fc4", "0.8")
# inches
_WIDTH, _BAR, _HEIGHT, _GAP, _TOP, _BOTTOM, _LEFT = 4.4, 0.3, 1.5, 0.46, 0.16, 0.3, 0.55


@dataclass(frozen=True)
class Depths:
    """What of a decision each depth accounts for, at the unperturbed images.

    The score is ⟨cotangent, output⟩, for a class its logit. With frozen operators it is, at every block, the evidence
    of the tokens that enter it plus what biases behind that contribute, and at the pixels their evidence plus what
    position embeddings, prefix tokens and biases contribute.

    Of K targets the tensors have a dimension K after B. They are float32, in fp64 float64.

    Attributes:
        score: (B,).
        pixels: (B,), Σ pixel ⊙ effective gradient.
        patches: (B, L), the evidence of the patches that enter each of L blocks.
        prefix: (B, L), that of class token, registers and other tokens without a place in the image.
    """

    score: Tensor
    pixels: Tensor
    patches: Tensor
    prefix: Tensor

    @property
    def tokens(self) -> Tensor:
        """The evidence of all tokens that enter each block, (B, L)."""
        return self.patches + self.prefix

    @property
    def biases(self) -> Tensor:
        """What the biases behind the entry of each block contribute, (B, L)."""
        return self.score[..., None] - self.tokens

    def map(self, change: Callable[[Tensor], Tensor]) -> Depths:
        """Return it with every tensor changed."""
        return Depths(change(self.score), change(self.pixels), change(self.patches), change(self.prefix))

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a table for each image and target: what patches, prefix tokens and biases carry at each depth."""
        return _summary(self)

    def show(self) -> Image.Image:
        """Return a picture of it, a row for each image and target: a bar for the pixels and one for each block.

        Raises:
            InputError: there are more images and targets than fit in a picture.
        """
        return _figure(self)


def every_level(blocks: Sequence[object]) -> Levels:
    """Return the levels of an account: the pixels and every block."""
    return levels_of([None, *range(len(blocks))])


def account(batches: MicroBatches, images: Tensor, targets: Sequence[Cotangent]) -> Depths:
    """Return what each depth accounts for of every target, with a dimension K, by K walks back.

    Args:
        batches: the loop over micro-batches.
        images: (B, C, H, W).
        targets: K cotangents of the output.
    """
    grids = batches.route.blocks
    output, on_device = batches.outputs(images), identity(len(images)).to(images.device)
    scores = [(output * target(output, on_device)).flatten(1).sum(1) for target in targets]
    found = batches.unperturbed_vjps(images, targets, images.dtype, every_level(grids))
    assert found.pixels is not None
    prefix = [of.split([grid.prefix, grid.patches], -1) for of, grid in zip(found.evidence, grids, strict=True)]
    made = Depths(
        torch.stack(scores),
        found.pixels.flatten(2).sum(2),
        torch.stack([patches.sum(-1) for _, patches in prefix], -1),
        torch.stack([others.sum(-1) for others, _ in prefix], -1),
    )
    return made.map(lambda t: t.transpose(0, 1))


class _Row(NamedTuple):
    """One target of one image.

    Attributes:
        name: "image 0", "image 0, target 1", or empty where there is one.
        score: of the target.
        parts: (L + 1, 3), of the pixels and of each of L blocks; each depth's sum is the score.
    """

    name: str
    score: float
    parts: Tensor

    def share(self, depth: int) -> str:
        """Return the share of the score that all tokens of a depth carry, for readers; "–" for a score of zero."""
        carried = float(self.parts[depth, :2].sum())
        return f"{100 * carried / self.score:.0f} %".replace("-", "−") if self.score else "–"


def _rows(depths: Depths) -> Iterator[_Row]:
    """Yield a row for each image and target."""
    depths = depths.map(lambda t: t.double().cpu())
    zero = torch.zeros_like(depths.pixels)
    pixels = torch.stack([depths.pixels, zero, depths.score - depths.pixels], -1)
    blocks = torch.stack([depths.patches, depths.prefix, depths.biases], -1)
    parts = torch.cat([pixels[..., None, :], blocks], -2)
    shape = depths.score.shape
    for index in product(*map(range, shape)):
        words = [f"{name} {at}" for name, at, of in zip(("image", "target"), index, shape, strict=False) if of > 1]
        yield _Row(", ".join(words), float(depths.score[index]), parts[index])


def sentence(one: Depths, depth: str | int, score: str = "score") -> str:
    """Return in words what the tokens at a depth and the pixels account for; of a range of blocks, their mean.

    Args:
        one: of one image and target, tensors () and (L,).
        depth: a resolved one, the number of a block or a range.
        score: what the score is called.
    """
    count = one.patches.shape[-1]
    at = list(blocks_of(place_of(depth, (None,) * count)))
    tokens, behind = float(one.tokens[at].mean()), float(one.biases[at].mean())
    words = ("its tokens account", "it") if len(at) == 1 else ("their tokens account, on average,", "them")
    return (
        f"{name_of(depth)} of {count}: {words[0]} for {tokens:.3g} of the {score} {float(one.score):.3g}, "
        f"biases behind {words[1]} for {behind:.3g}; pixels for {float(one.pixels):.3g}"
    )


def _summary(depths: Depths) -> str:
    """Return a table for each image and target: what patches, prefix tokens and biases carry at each depth."""
    lines = []
    for row in _rows(depths):
        lines.append(_named(row))
        lines.append(f"{'':9}" + "".join(f"{name:>15}" for name in (*PARTS, "tokens' share")))
        for depth, parts in enumerate(row.parts.tolist()):
            cells = [f"{parts[0]:.4g}", f"{parts[1]:.4g}" if depth else "", f"{parts[2]:.4g}", row.share(depth)]
            lines.append(f"{_name(depth):9}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join([*lines, f"({NOTE})"])


def _figure(depths: Depths) -> Image.Image:
    """Draw a row of bars for each image and target: a bar for the pixels and one for each block.

    Raises:
        InputError: there are more rows than fit in a picture.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(_rows(depths))
    if len(rows) > MOST_ROWS:
        raise InputError(
            f"there are {len(rows)} images and targets; a figure has at most {MOST_ROWS} rows: choose some, as in "
            "depths.map(lambda t: t[:8]).show()"
        )
    width = max(_WIDTH, _LEFT + _BAR * len(rows[0].parts) + 0.1)
    height = _TOP + len(rows) * (_HEIGHT + _GAP) + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=figures.DPI)
    canvas = FigureCanvasAgg(figure)
    for number, row in enumerate(rows):
        bottom = height - _TOP - (number + 1) * (_HEIGHT + _GAP) + 0.2
        axes = figure.add_axes((_LEFT / width, bottom / height, 1 - (_LEFT + 0.1) / width, _HEIGHT / height))
        _draw(axes, row)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1),
        ncols=len(PARTS),
        frameon=False,
        fontsize=figures.SMALL,
        handlelength=1,
        borderpad=0.3,
        borderaxespad=0,
    )
    axes.set_xlabel(f"tokens that enter block …\n{NOTE}", fontsize=figures.SMALL - 0.5, labelpad=2)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw(axes: Axes, row: _Row) -> None:
    """Draw the bars of one image and target: what adds to the score above zero, what takes from it below."""
    at = range(len(row.parts))
    above = below = row.parts.new_zeros(len(at))
    for name, colour, values in zip(PARTS, _COLOURS, row.parts.T, strict=True):
        axes.bar(at, values, 0.75, torch.where(values > 0, above, below), color=colour, label=name, lw=0)
        above, below = above + values.clamp(min=0), below + values.clamp(max=0)
    for depth, top in enumerate(above.tolist()):
        text = axes.annotate(row.share(depth), (depth, top), (0, 1.5), textcoords="offset points", ha="center")
        text.set(fontsize=figures.SMALL - 1.5, color=figures.GREY)
    axes.axhline(0, color="black", lw=0.6)
    axes.axhline(row.score, color="black", lw=0.6, ls="--")
    axes.set_xticks(list(at), ["pixels", *(str(block) for block in at[:-1])])
    axes.tick_params(labelsize=figures.SMALL - 0.5, length=2, width=0.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.margins(x=0.02, y=0.12)
    title = f"{_named(row)} (dashed), the sum of each bar; %: share of tokens"
    axes.set_title(title.replace("-", "−"), fontsize=figures.SMALL, loc="left", pad=4)


def _named(row: _Row) -> str:
    return f"{row.name + ': ' if row.name else ''}score {row.score:.4g}"


def _name(depth: int) -> str:
    return f"block {depth - 1}" if depth else "pixels"
