"""The models that a server has, and what each engine holds of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.memory import contribution_bytes
from dave_fast.errors import InputError
from dave_fast.explain.explainer import DAVE
from dave_fast.explain.subject import Subject
from dave_fast.images import Preprocessing
from dave_fast.models.labels import Labels
from dave_fast.models.spec import ModelSpec


@dataclass(frozen=True)
class ServedModel:
    """One model. explainers: one an engine, in the engines' order; prepare, labels: as for files."""

    name: str
    explainers: tuple[DAVE, ...]
    prepare: Preprocessing = field(repr=False)
    labels: Labels = field(repr=False)

    @property
    def classes(self) -> int:
        """K, the length of the output."""
        return self.labels.count or 0

    def request_bytes(self, classes: int, samples: int) -> int:
        """What a request holds: contributions of every class, as long again for their halves, and the image.

        `dave_fast.engine.memory.contribution_bytes` is the formula of one class.
        """
        shape = (3, *self.prepare.size)
        item = self.explainers[0].statistics_dtype
        return 2 * classes * contribution_bytes(samples, shape, item) + contribution_bytes(1, shape, item)

    def example(self) -> Tensor:
        """A picture of nothing, normalised (3, H, W): what an engine is warmed with."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(3, *self.prepare.size, generator=generator) - 0.5


def served_name(text: str) -> tuple[str, str]:
    """NAME=MODEL, or a model that goes by its own name, of which a URL takes what is behind the last slash."""
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
    **settings: Any,
) -> dict[str, ServedModel]:
    """Every model on every device; equal names once. settings: keywords of `DAVE`.

    names: as `served_name`. weights, num_classes, labels, image_size: see `ModelSpec`, for a single model.

    Raises UnknownModelError, ModelError, InputError as `DAVE` does, and for a model that is no classifier of images.
    """
    own = (weights, num_classes, labels, image_size)
    if len(set(names)) > 1 and any(one is not None for one in own):
        raise InputError(
            f"weights, num_classes, labels and image_size belong to one model, and {len(set(names))} are named: "
            "start a server for each."
        )
    served: dict[str, ServedModel] = {}
    for text in dict.fromkeys(names):
        name, model = served_name(text)
        if name in served:
            raise InputError(f"two models would be served as {name!r}: write NAME=MODEL to tell them apart.")
        first, prepare, found = Subject.load(ModelSpec(model, *own), device=devices[0], **settings)
        given = {**settings, "noise_alpha": first.sampling.noise_alpha}
        explainers = (first, *(DAVE(first.model, device=device or first.device, **given) for device in devices[1:]))
        if found.count is None:
            raise InputError(f"the model {name!r} does not say how many classes it has; only classifiers are served.")
        served[name] = ServedModel(name, explainers, prepare, found)
    return served
