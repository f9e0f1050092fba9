"""Blocks of models: evidence with the biases behind it is the logit; layouts are those of the image, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dave_fast.frozen.blocks import BlockInput, evidence, find_blocks, watching
from dave_fast.frozen.mode import freeze
from dave_fast.frozen.replay import Replay
from dave_fast.frozen.trace import Trace
from tests.tolerances import EXACT
from tests.variants import ALL, CLASSES, Variant


class Toy(nn.Module):
    """Patches, residual blocks of attention, a head; what stands between patches and blocks is a test's."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        blocks: nn.Module | None = None,
        stride: int = 8,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride, padding)
        self.between = between
        self.blocks = blocks or nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(self.between(x)).mean(1))


class Block(nn.Module):
    """x + attention(x), in place where asked for; tokens come first or second, or by keyword."""

    def __init__(self, *, batch_first: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.in_place = in_place

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.attention(hidden, hidden, hidden)[0]
        return hidden.add_(y) if self.in_place else hidden + y


def toy(*args: Any, **kwargs: Any) -> Variant:
    return Variant(lambda: Toy(*args, **kwargs))


class ByKeyword(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(mask=None, hidden=x)
        return x


class SequenceFirst(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def window_order(x: Tensor) -> Tensor:
    """(B, 16, D) row by row -> window by window of 2×2."""
    return x.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(1, 4)


OWN: dict[str, Variant] = {
    "sequence-first": toy(blocks=SequenceFirst(Block(batch_first=False), Block(batch_first=False))),
    "in-place": toy(torch.clone, blocks=nn.Sequential(Block(in_place=True), Block(in_place=True))),
    "by-keyword": toy(blocks=ByKeyword(Block(), Block())),
    "windows": toy(window_order),
    "prefix-behind": toy(lambda x: torch.cat([x, torch.ones_like(x[:, :2])], 1)),
    "overlapping-stem": toy(stride=4, padding=2),
}
SUMMED = (
    "vit vit-average vit-registers deit-distilled vit-parallel-things dinov3 siglip clip cait xcit swin swin2 "
    "torchvision encoder-post-norm-relu " + " ".join(OWN)
).split()


def built(name: str) -> tuple[nn.Module, Tensor]:
    variant = {**ALL, **OWN}[name]
    return variant.build(torch.float64), variant.images(1, torch.float64)


# Σ tokens + biases = logit


def biases_behind(replay: Replay, block: BlockInput) -> Tensor:
    """Return the output (1, K) with the recorded operators where zeros enter a block."""

    def zeros(module: nn.Module, args: Any, kwargs: Any) -> None:
        # in place, since later blocks may be given the same tensor
        next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad).mul_(0)

    handle = replay.model.get_submodule(block.path).register_forward_pre_hook(zeros, with_kwargs=True)
    try:
        return replay.forward(replay.x, Trace()).detach()
    finally:
        handle.remove()


@pytest.mark.parametrize("name", SUMMED)
def test_evidence_of_all_tokens_and_the_biases_behind_a_block_are_the_output(name: str) -> None:
    model, images = built(name)
    blocks = find_blocks(model, images)
    replay = Replay(model, images, name)
    with watching(replay.model, blocks) as entered:
        output = replay.forward(replay.x, Trace())
    cotangent = torch.zeros_like(output).index_fill_(1, torch.tensor(2), 1)
    with freeze(replay.x):
        gradients = torch.autograd.grad(output, [each.edge for each in entered], cotangent)
    assert len(blocks) == len(gradients) >= 2
    for block, each, gradient in zip(blocks, entered, gradients, strict=True):
        told = evidence(each.tokens, gradient, block)
        assert told.shape == (1, block.prefix + block.grid[0] * block.grid[1])
        bias = biases_behind(replay, block)[0, 2]
        scale = told.abs().sum() + bias.abs()
        assert abs(told.sum() + bias - output[0, 2]) <= EXACT * scale
