"""Fixtures: photographs, model inputs, and a server on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dave_fast.serve.service import Service
from tests.serve.tiny_server import SIZE, file_of, serve_model, serving


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.fixture(scope="session")
def photo(pixels: np.ndarray) -> bytes:
    return file_of(pixels)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Return six normalised images, (6, 3, SIZE, SIZE)."""
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    """Serve two models by one server; yield its address and its service."""
    with serving(models=[serve_model(), serve_model("other", seed=1)]) as served:
        yield served
