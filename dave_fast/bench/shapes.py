"""The shapes of the ops for a model, an image size and a number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dave_fast.errors import InputError, ModelError
from dave_fast.models.catalog import load_model
from dave_fast.models.spec import ModelSpec, as_spec
from dave_fast.plan import families
from dave_fast.plan.reading import Attention, Mlp, NoPlanError

# tokens of a micro-batch that fill a GPU, used if no number of rows is given
GPU_TOKENS = 5516


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model.

    Attributes:
        samples: S.
        rows: R of a micro-batch.
        image: (C, H, W).
        patch: (height, width) in pixels.
        prefix: number of prefix tokens.
        width: D.
        heads: number of heads.
        head_dim: width of a head.
        hidden: M.
        activation: name of the MLP's activation.
        blocks: number of blocks.
        read: number of tokens that the head reads.
    """

    samples: int
    rows: int
    image: tuple[int, int, int]
    patch: tuple[int, int]
    prefix: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    activation: str
    blocks: int
    read: int

    @property
    def patches(self) -> int:
        """n, the number of patches."""
        return (self.image[1] // self.patch[0]) * (self.image[2] // self.patch[1])

    @property
    def tokens(self) -> int:
        """N, the number of tokens."""
        return self.patches + self.prefix

    @property
    def gated_hidden(self) -> int:
        """Width of the first MLP layer's output: M, or 2·M if the MLP is gated."""
        return self.hidden * (2 if "_glu" in self.activation else 1)

    def gigaflops(self) -> float:
        """Return the arithmetic of one sample in GFLOP, a multiply-add being 2: 60.0 for ViT-B/16 at 224 px.

        It counts both walks, attention probabilities twice, and the last block only as far as the head reads it.
        """
        inner = self.heads * self.head_dim
        tokens, scores = self.tokens, self.tokens**2 * inner
        first, second = tokens * self.width * self.gated_hidden, tokens * self.width * self.hidden
        # forward: qkv, proj, fc1, fc2; VJP: fc2, fc1 (the value half of a gated MLP), proj, the values' third of qkv
        whole = (3 + 1 + 1 + 1) * tokens * self.width * inner + first + 3 * second + 4 * scores
        last = 3 * tokens * self.width * inner if self.read < tokens else whole
        embed = 2 * self.patches * self.image[0] * self.patch[0] * self.patch[1] * self.width
        return 2e-9 * ((self.blocks - 1) * whole + last + embed)


def shapes_of(model: nn.Module, samples: int, *, size: int | None = None, rows: int | None = None) -> Shapes:
    """Return the shapes of a model that the engine has a plan for.

    Args:
        model: the model.
        samples: S.
        size: side of square images in pixels; None for the model's own.
        rows: of a micro-batch; None for as many as fill the device.

    Raises:
        ModelError: there is no plan for the model.
    """
    try:
        reading = families.read(model)
    except NoPlanError as reason:
        raise ModelError(
            f"only models of the engine have ops to time: {reason}. Use --op engine to time it whole."
        ) from None
    height, width = reading.image_size if size is None else (size, size)
    branches = [branch for step in reading.steps for branch in step]
    attention = next(branch for branch in branches if isinstance(branch, Attention))
    mlp = next(branch for branch in branches if isinstance(branch, Mlp))
    prefix, patch = len(reading.prefix), reading.patch_size
    tokens = (height // patch[0]) * (width // patch[1]) + prefix
    if rows is None:
        rows = max(1, (GPU_TOKENS if torch.cuda.is_available() else 800) // tokens)
    return Shapes(
        samples=samples,
        rows=rows,
        image=(reading.channels, height, width),
        patch=patch,
        prefix=prefix,
        width=reading.position.shape[1],
        heads=attention.heads,
        head_dim=attention.head_dim,
        hidden=mlp.fc2.weight.shape[1],
        activation=mlp.activation,
        blocks=len(reading.blocks),
        read=reading.read or tokens,
    )


def spec_of(wanted: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of the model in the command's options.

    Its weights are random unless they are `pretrained`; the demo model, modules by MODULE:FUNCTION and those with a
    file of weights have their own.
    """
    spec = ModelSpec(wanted["model"], wanted.get("weights"), wanted.get("num_classes"))
    return spec if wanted["pretrained"] else _untrained(spec)


def _untrained(spec: ModelSpec) -> ModelSpec:
    own = spec.weights is not None or spec.source[0] in ("demo", "python")
    return spec if own else replace(spec, random_weights=True)


def build_model(model: str | ModelSpec, size: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """Build a model to time; its weights are random unless `pretrained`.

    The demo model, modules by MODULE:FUNCTION and those with a file of weights have their own.

    Args:
        model: any name of `dave_fast.models.spec`, or a spec.
        size: side of the images in pixels, which timm's models are built for; others must support it.
        pretrained: whether to load the pretrained weights.

    Raises:
        UnknownModelError: there is no such model.
        InputError: the size or the weights do not fit.
    """
    spec = as_spec(model)
    source, _ = spec.source
    if source == "demo" and size is not None:
        raise InputError("the demo model takes images of 128 pixels; leave --size out")
    spec = spec if pretrained else _untrained(spec)
    if source == "timm":
        spec = replace(spec, image_size=size)
    return load_model(spec)[0].requires_grad_(False)
