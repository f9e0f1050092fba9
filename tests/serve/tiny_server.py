"""A small model behind a service, and behind a server on loopback, for the tests of dave_fast.serve."""

from __future__ import annotations

import io
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from dave_fast import DAVE
from dave_fast.images import preprocessing
from dave_fast.models.labels import labels_of
from dave_fast.serve.app import create_app
from dave_fast.serve.jobs import Ask, Ended, Failed
from dave_fast.serve.limits import Limits
from dave_fast.serve.models import ServedModel
from dave_fast.serve.server import running
from dave_fast.serve.service import Service
from tests.tiny import named_vit

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


@contextmanager
def started(limits: Limits | None = None, **settings: Any) -> Iterator[Service]:
    """Start a service, yield it, and stop it."""
    model = serve_model(**settings)
    service = Service({model.name: model}, limits)
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
