"""The models of a server, loaded once for each worker."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dave_fast.engine.levels import Place, TokenGrid, levels_of
from dave_fast.engine.memory import contribution_bytes
from dave_fast.errors import InputError, ModelError
from dave_fast.explain.depth import Depth, places_of
from dave_fast.explain.explainer import DAVE
from dave_fast.explain.subject import Subject
from dave_fast.images import Preprocessing
from dave_fast.models.adapter import TextImageModel
from dave_fast.models.labels import Labels
from dave_fast.models.spec import ModelSpec
from dave_fast.targets import detections_of, tokens_of
from dave_fast.targets.forms import ModelView
from dave_fast.targets.grids import Grid

# What a model's output may be replaced by, by a word before its name.
OUTPUTS: dict[str, Callable[[nn.Module], nn.Module]] = {"tokens": tokens_of, "detections": detections_of}
Asking = Literal["classes", "texts", "patches"]
# Bytes of a pixel in an answer: text of a number has up to 24, and is joined once.
_ANSWER = 48


@dataclass(frozen=True)
class ServedModel:
    """A model that is served.

    Attributes:
        name: its name in requests.
        explainers: one for each worker, in the workers' order.
        prepare: the preprocessing, from a photograph to the model's input.
        labels: the names of the model's classes.
        binding: held while a text is embedded.
    """

    name: str
    explainers: tuple[DAVE, ...]
    prepare: Preprocessing = field(repr=False)
    labels: Labels = field(repr=False)
    binding: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.labels.count or 0

    @cached_property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches of a dense output; None for an output that has no patches."""
        explainer, example = self.explainers[0], self.example()
        if self.classes or len(explainer.output_shape(example)) == 2:
            return None
        try:
            output = explainer.predict(example)
            return Grid.of(output, self.prepare.size, ModelView(explainer.model, explainer.predict)).shape
        except InputError:
            return None

    @cached_property
    def questions(self) -> tuple[Asking, ...]:
        """What may be asked of the model: classes, texts, patches.

        Raises:
            UnknownModelError: it takes texts, and its tokenizer cannot be loaded.
        """
        model: Any = self.explainers[0].model
        if texts := isinstance(model, TextImageModel):
            # Tried now, and not at the first request.
            model.text_embedding(["a photo"])
        found: dict[Asking, bool] = {"classes": self.classes > 0, "texts": texts, "patches": self.grid is not None}
        return tuple(name for name, has in found.items() if has)

    @property
    def blocks(self) -> tuple[TokenGrid, ...]:
        """The tokens that enter each block; none for a model without a sequence of blocks, which has pixels alone."""
        return self._blocks[0]

    @cached_property
    def _blocks(self) -> tuple[tuple[TokenGrid, ...], str]:
        """The tokens that enter each block, and where they are not known the reason."""
        try:
            return self.explainers[0].blocks(self.example()), ""
        except ModelError as error:
            return (), str(error)

    def places(self, depths: Sequence[Depth]) -> tuple[Place, ...]:
        """Return the block or the blocks at each depth, None for the pixels.

        Raises:
            InputError: the model has no such block, or no blocks at all.
        """

        def found() -> tuple[TokenGrid, ...]:
            blocks, reason = self._blocks
            if not blocks:
                raise InputError(f"the model {self.name!r} is explained at its pixels alone: {reason}")
            return blocks

        return tuple(places_of(depths, found))

    def request_bytes(self, classes: int, samples: int, places: Sequence[Place] = (None,)) -> int:
        """Return the bytes that a request needs: twice the samples and maps of its classes, and the image.

        The second time is for error estimates, which aggregate the samples in halves. A sample is a contribution where
        pixels are asked for, and a value a token of each block. A map comes with raw, of C channels, and its signed
        form. The formula of one class is `dave_fast.engine.memory.contribution_bytes`.

        Args:
            classes: number of classes that are explained.
            samples: number of samples.
            places: of the maps of a class, blocks and pixels.
        """
        size, item, levels = self.prepare.size, self.explainers[0].statistics_dtype, levels_of(places)
        tokens = sum(self.blocks[block].prefix + self.blocks[block].patches for block in levels.blocks)
        kept = contribution_bytes(samples, (tokens,), item)
        kept += contribution_bytes(samples, (3, *size), item) if levels.pixels else 0
        maps = contribution_bytes(len(places), (5, *size), item)
        return 2 * classes * (kept + maps) + contribution_bytes(1, (3, *size), item)

    def answer_bytes(self, classes: int, places: int, *, signed: bool = False) -> int:
        """Return the bytes of an answer at most: maps as text of KServe's JSON, or maps and raw in float32.

        Args:
            classes: number of classes that are explained.
            places: number of depths.
            signed: whether it has signed maps, too.
        """
        height, width = self.prepare.size
        return _ANSWER * classes * places * (1 + signed) * height * width + (1 << 16)

    def example(self) -> Tensor:
        """Return a random input (3, H, W) float32, to warm a worker and to test it."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(3, *self.prepare.size, generator=generator) - 0.5


def served_name(text: str) -> tuple[str, str]:
    """Return the name and the model in NAME=MODEL; without NAME, it is the model's part after the last slash.

    MODEL may begin with the word of another output, "tokens:" or "detections:".
    """
    name, equals, model = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name):
        return name, model
    return text.rstrip("/").rpartition("/")[2] or text, text


def load_models(
    names: Sequence[str],
    devices: Sequence[str | None],
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    labels: str | None = None,
    image_size: int | None = None,
    link: str | None = None,
    **settings: Any,
) -> dict[str, ServedModel]:
    """Load every model on every device.

    Args:
        names: models, or NAME=MODEL; equal ones are loaded once. MODEL may be tokens:MODEL or detections:MODEL, whose
            output is the model's tokens (of timm's) or detections, which patches and boxes are asked of.
        devices: names of torch devices, one for each worker; None is the best there is.
        weights: see `ModelSpec`; this and the following four only for a single model.
        num_classes: see `ModelSpec`.
        labels: see `ModelSpec`.
        image_size: see `ModelSpec`.
        link: see `ModelSpec`.
        settings: keywords of `DAVE`.

    Returns:
        The served models by name.

    Raises:
        InputError: two models have one name, or a model takes other inputs than photographs.
        ModelError: a model cannot be loaded or explained.
    """
    own: dict[str, Any] = {"weights": weights, "num_classes": num_classes, "labels": labels}
    own |= {"image_size": image_size, "link": link}
    if len(set(names)) > 1 and any(one is not None for one in own.values()):
        raise InputError(
            f"{', '.join(own)} belong to one model, and {len(set(names))} are named: start a server for each."
        )
    served: dict[str, ServedModel] = {}
    for text in dict.fromkeys(names):
        name, model = served_name(text)
        if name in served:
            raise InputError(f"two models would be served as {name!r}: write NAME=MODEL to tell them apart.")
        word, _, rest = model.partition(":")
        first = DAVE(ModelSpec(rest if word in OUTPUTS else model, **own), device=devices[0], **settings)
        given = {**settings, "noise_alpha": first.sampling.noise_alpha}
        if word in OUTPUTS:
            first = DAVE(OUTPUTS[word](first.model), device=first.device, **given)
        _, prepare, found = Subject.of(first)
        explainers = (first, *(DAVE(first.model, device=device or first.device, **given) for device in devices[1:]))
        served[name] = ServedModel(name, explainers, prepare, found)
    return served
