"""Blocks of models: evidence with the biases behind it is the logit; layouts are those of the image, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dave_fast.errors import ModelError
from dave_fast.frozen.blocks import BlockInput, NoBlocksError, evidence, find_blocks, watching
from dave_fast.frozen.mode import freeze, run_frozen
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


def toy(*args: Any, **kwargs: Any) -> Variant:
    return Variant(lambda: Toy(*args, **kwargs))


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


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_evidence_of_a_layout_is_in_the_dtype_of_statistics_with_prefix_tokens_first(
    dtype: torch.dtype, exact: torch.dtype
) -> None:
    tokens, cotangent = (torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    # tokens on the first axis; the two patch tokens, the last place ahead of the first, then nothing
    block = BlockInput(batch=1, channels=2, prefix=3, grid=(1, 2), order=(1, 2, 3, 4, 0), path="")
    told = evidence(tokens, cotangent, block)
    expected = (tokens.to(exact) * cotangent.to(exact)).sum(2).T[:, [1, 2, 3, 4, 0]]
    assert told.dtype == exact and torch.equal(told, expected)


# Layouts


def summary(blocks: tuple[BlockInput, ...]) -> list[tuple[int, int, int, tuple[int, int]]]:
    return [(block.batch, block.channels, block.prefix, block.grid) for block in blocks]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit-rectangle", [(0, 2, 1, (4, 6))] * 2),
        ("vit-registers", [(0, 2, 5, (4, 4))] * 2),
        ("deit-distilled", [(0, 2, 2, (4, 4))] * 2),
        ("siglip", [(0, 2, 0, (4, 4))] * 2),
        ("swin", [(0, 3, 0, (8, 8))] * 2 + [(0, 3, 0, (4, 4))] * 2),
        ("sequence-first", [(1, 2, 0, (4, 4))] * 2),
        ("overlapping-stem", [(0, 2, 0, (8, 8))] * 2),
    ],
)
def test_layout_of_a_model_is_that_of_its_tokens(name: str, expected: object) -> None:
    blocks = find_blocks(*built(name))
    assert summary(blocks) == expected and all(block.order is None for block in blocks)


def test_tokens_in_another_order_are_put_in_that_of_the_image() -> None:
    windows, behind = find_blocks(*built("windows")), find_blocks(*built("prefix-behind"))
    # the order of the places, taken to windows and back, is that of the image
    assert window_order(torch.arange(16)[None, :, None])[0, list(windows[1].order or ()), 0].tolist() == [*range(16)]
    assert behind[1].prefix == 2 and behind[1].order == (16, 17, *range(16))


def test_blocks_of_a_model_in_a_wrapper_in_bfloat16_are_those_of_the_model() -> None:
    model, images = built("vit")
    wrapped = nn.Sequential(nn.BatchNorm2d(3), model).eval().bfloat16()
    blocks = find_blocks(wrapped, images.bfloat16())
    assert [block.path for block in blocks] == ["1.blocks.0", "1.blocks.1"]
    assert summary(blocks) == summary(find_blocks(model, images))


def test_blocks_of_transformers_take_their_tokens_by_position_or_keyword() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Dinov2Config(**sizes, image_size=32, patch_size=8, num_labels=CLASSES)
    model = transformers.Dinov2ForImageClassification(config).eval()
    assert summary(find_blocks(model, torch.randn(1, 3, 32, 32))) == [(0, 2, 1, (4, 4))] * 2


# Refusals


def by_size(x: Tensor) -> Tensor:
    """Tokens sorted by their own values."""
    return x.gather(1, x.norm(dim=2).argsort(1)[:, :, None].expand_as(x))


once = Block()
REFUSED: dict[str, tuple[Variant, str]] = {
    "no-sequence": (ALL["hand-written"], "no item of an nn.ModuleList or nn.Sequential"),
    "pixels-enter": (Variant(lambda: nn.Sequential(ALL["hand-written"].make())), r"enters its block '0' has no tokens"),
    "runs-twice": (toy(blocks=nn.Sequential(once, once)), "'blocks.0' runs 2 times"),
    "skipped": (toy(blocks=Skipping(nn.LayerNorm(16), Block())), "around the tokens that enter"),
    "in-place-on-a-view": (toy(blocks=nn.Sequential(Block(in_place=True))), "around the tokens that enter"),
    "dropped": (
        toy(lambda x: x[:, [0, 1, 2, 4, 5, 8, 10, 15]]),
        r"\(B, 8, 16\) that enters its block 'blocks.0' has no tokens",
    ),
    "lower-half-dropped": (toy(lambda x: x[:, :8]), "has no tokens"),
    "sorted": (toy(by_size), "has no tokens that are those of a grid that divides images of 32×32"),
    "averaged": (toy(lambda x: x + 20 * x.mean(1, keepdim=True)), "has no tokens"),
    "not-dividing": (toy(stride=3), "has no tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_without_blocks_that_have_places_is_refused_with_the_reason(name: str) -> None:
    variant, reason = REFUSED[name]
    with pytest.raises(NoBlocksError, match=reason):
        find_blocks(variant.build(), variant.images(1))


# Watching


def test_finding_blocks_leaves_the_model_and_the_generator_as_they_were() -> None:
    model, images = built("torchvision")
    model.requires_grad_(True).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    find_blocks(model, images)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error_in_the_pass() -> None:
    model, images = built("vit")
    blocks = find_blocks(model, images)
    with pytest.raises(ZeroDivisionError), watching(model, blocks):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_that_run_in_another_order_raise() -> None:
    model, images = built("vit")
    blocks = find_blocks(model, images)
    leaf = images.requires_grad_()
    with pytest.raises(ModelError, match=r"ran as blocks\.0, blocks\.1 in this"), watching(model, blocks[::-1]):
        run_frozen(model, leaf.clone(), freeze(leaf))


# Many architectures

TIMM: dict[str, tuple[int, str]] = {
    "vit_tiny_patch16_224": (64, "blocks.0"),
    "convit_tiny": (64, "blocks.0"),
    "coat_lite_tiny": (128, "serial_blocks1.0"),
    "davit_tiny": (224, "stages.0.blocks.0.0"),
    "hiera_tiny_224": (128, "blocks.0"),
    "maxvit_pico_rw_256": (128, "stages.0.blocks.0"),
    "mvitv2_tiny": (224, "stages.0"),
    "pvt_v2_b0": (128, "stages.0.blocks.0"),
    "samvit_base_patch16": (128, "blocks.0"),
    "swin_tiny_patch4_window7_224": (112, "layers.0.blocks.0"),
    "vit_small_resnet26d_224": (128, "blocks.0"),
    "xcit_nano_12_p8_224": (64, "blocks.0"),
    "crossvit_9_240": (240, "around the tokens that enter 'blocks.0'"),
    "levit_128s": (128, "'stages.1.blocks.0' has no tokens"),
    "nest_tiny": (112, "'levels.0.transformer_encoder.0' has no tokens"),
    "pit_ti_224": (112, "'transformers.0.blocks.0' has no tokens"),
    "poolformer_s12": (96, "has attention in it"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_first_block_or_the_reason_of_a_model_of_timm(name: str) -> None:
    side, expected = TIMM[name]
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, img_size=side)
    except TypeError:
        model = timm.create_model(name)
    try:
        found = find_blocks(model.eval(), torch.randn(1, 3, side, side))[0].path
    except NoBlocksError as error:
        found = str(error)
    assert expected in found if " " in expected else found == expected
