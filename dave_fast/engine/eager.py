"""A micro-batch, step by step: perturb, forward walk, VJP walk, pull back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dave_fast.engine.route import Route
from dave_fast.sampling import Draws


class Walk(Protocol):
    """One micro-batch."""

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """images (B, C, H, W), draws of R rows -> output (R, ...)."""
        ...

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Cotangent of the last output -> contributions (R, C, H, W) in `dtype`; for None, of the tokens (R, n, ·)."""
        ...


class Eager:
    """A micro-batch as it comes."""

    def __init__(self, route: Route, perturb: Callable[..., Tensor], pull_back: Callable[..., Tensor]) -> None:
        self._route, self._perturb, self._pull_back = route, perturb, pull_back
        self._seen: tuple[Tensor, Draws] | None = None
        self._saved: Any = None

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """See `Walk`."""
        self._seen = images, draws
        return self.walk(self.perturbed(images, draws))

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Tensor:
        """See `Walk`."""
        tokens = self._route.vjp(self._saved, cotangent)
        if dtype is None:
            return tokens
        assert self._seen is not None
        return self.pulled_back(tokens, *self._seen, dtype)

    def perturbed(self, images: Tensor, draws: Draws) -> Tensor:
        """The rows' tokens."""
        return self._perturb(images, draws, self._route.patch_size, dtype=self._route.dtype)

    def walk(self, tokens: Tensor) -> Tensor:
        """The forward walk alone; what its VJP needs is kept."""
        output, self._saved = self._route.forward(tokens)
        return output

    def pulled_back(self, tokens: Tensor, images: Tensor, draws: Draws, dtype: torch.dtype) -> Tensor:
        """Contributions of token cotangents."""
        return self._pull_back(tokens, images, draws, self._route.patch_size, dtype=dtype)
