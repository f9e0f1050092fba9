"""A small model behind a service, and behind a server on loopback, for the tests of dave_fast.serve."""

from __future__ import annotations

import io
import queue
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dave_fast import DAVE
from dave_fast.images import preprocessing
from dave_fast.models.labels import Labels, labels_of
from dave_fast.serve.app import create_app
from dave_fast.serve.jobs import Ask, Ended, Failed
from dave_fast.serve.limits import Limits
from dave_fast.serve.models import ServedModel
from dave_fast.serve.server import running
from dave_fast.serve.service import Service
from dave_fast.targets import tokens_of
from tests.tiny import named_vit, random_head_vit

# Seconds to wait for events that take milliseconds on an idle machine.
PATIENCE = 120
SIZE = 32
NAMES = ["cat", "dog", *(f"thing {number}" for number in range(2, 10))]


def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; fail after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {PATIENCE} s"
        time.sleep(0.01)


def serve_model(
    name: str = "tiny", workers: int = 1, seed: int = 0, rows: int = 8, *, shrink: bool = True
) -> ServedModel:
    """Return a served tiny ViT with the given number of CPU workers; a row takes about a millisecond."""
    model = named_vit(NAMES, seed)
    settings: dict[str, Any] = {"precision": "fp32", "noise_alpha": 0.5, "internal_batch_size": rows, "shrink": shrink}
    made = [DAVE(model, **settings) for _ in range(workers)]
    return ServedModel(name, tuple(made), preprocessing(model), labels_of(model))


class TinyClip(nn.Module):
    """An embedding model with a text tower, whose texts are random vectors, as the adapters of CLIP are."""

    kind = "embedding"
    logit_scale, logit_bias = 20.0, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.vision = random_head_vit(num_classes=6)
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision(images)

    def text_embedding(self, texts: Sequence[str]) -> torch.Tensor:
        seeds = [sum(map(ord, text)) for text in texts]
        found = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return nn.functional.normalize(found, dim=1)


def serve_embedding(model: nn.Module, name: str, workers: int = 1) -> ServedModel:
    """Return a served model without classes, with CPU workers."""
    settings: dict[str, Any] = {"precision": "fp32", "noise_alpha": 0.5, "internal_batch_size": 8, "route": "auto"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [DAVE(model.eval(), **settings) for _ in range(workers)]
        made[0].output_shape(torch.zeros(1, 3, SIZE, SIZE))
    return ServedModel(name, tuple(made), preprocessing(model), Labels(0))


def serve_clip(name: str = "clip", workers: int = 1) -> ServedModel:
    """Return a served model of images and texts."""
    return serve_embedding(TinyClip(), name, workers)


def serve_tokens(name: str = "tokens") -> ServedModel:
    """Return a served model whose output is the tokens of 4×4 patches behind a class token."""
    return serve_embedding(tokens_of(named_vit(NAMES)), name)


@contextmanager
def started(limits: Limits | None = None, models: Sequence[ServedModel] = (), **settings: Any) -> Iterator[Service]:
    """Start a service, of a tiny ViT with these settings where no models are given, yield it, and stop it."""
    service = Service({model.name: model for model in models or [serve_model(**settings)]}, limits)
    service.start()
    try:
        yield service
    finally:
        service.stop()


class DirectClient:
    """A client of a service without HTTP."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.events: dict[Any, queue.Queue[Any]] = {}

    def ask(self, image: torch.Tensor, name: str = "tiny", **options: Any) -> Any:
        """Submit a request and return its job."""
        events: queue.Queue[Any] = queue.Queue()
        job = self.service.submit(name, Ask(image, **options), events.put)
        self.events[job] = events
        return job

    def all(self, job: Any) -> list[Any]:
        """Return all events of a job; wait for the last one."""
        seen = []
        while not seen or not isinstance(seen[-1], Ended | Failed):
            seen.append(self.events[job].get(timeout=PATIENCE))
        return seen

    def end(self, job: Any) -> Any:
        """Return the last event of a job."""
        return self.all(job)[-1]


def file_of(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Return pixels as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


@contextmanager
def serving(
    limits: Limits | None = None, models: list[ServedModel] | None = None, **app: Any
) -> Iterator[tuple[str, Service]]:
    """Run a server on loopback in a thread of this process; yield its address and its service."""
    limits = limits or Limits()
    served = models or [serve_model()]
    service = Service({model.name: model for model in served}, limits)
    with running(create_app(service, limits, **app), limits) as address:
        yield address, service
