"""A micro-batch step by step: perturb, forward walk, VJP walk, pull back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dave_fast.engine.route import Route
from dave_fast.sampling import Draws


class Walk(Protocol):
    """The forward walk of one micro-batch and any number of VJPs of it."""

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the output (R, ...) for images (B, C, H, W) and R rows of draws."""
        ...

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Pull a cotangent of the last output (R, ...) back.

        Returns contributions (R, C, H, W) in `dtype`, or for None the cotangent of the tokens (R, n, C·p_h·p_w).
        """
        ...


class Eager:
    """A micro-batch of any number of rows, run op by op.

    Args:
        route: the walks.
        perturb: the bound op.
        pull_back: the bound op.
    """

    def __init__(self, route: Route, perturb: Callable[..., Tensor], pull_back: Callable[..., Tensor]) -> None:
        self._route, self._perturb, self._pull_back = route, perturb, pull_back
        self._seen: tuple[Tensor, Draws] | None = None
        self._saved: Any = None

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the output, as `Walk.forward`."""
        self._seen = images, draws
        return self.walk(self.perturbed(images, draws))

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Pull a cotangent back, as `Walk.vjp`."""
        tokens = self._route.vjp(self._saved, cotangent)
        if dtype is None:
            return tokens
        assert self._seen is not None
        return self.pulled_back(tokens, *self._seen, dtype)

    def perturbed(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the tokens (R, n, C·p_h·p_w) of R rows of draws."""
        return self._perturb(images, draws, self._route.patch_size, dtype=self._route.dtype)

    def walk(self, tokens: Tensor) -> Tensor:
        """Run the forward walk alone and keep its operators for `vjp`."""
        output, self._saved = self._route.forward(tokens)
        return output

    def pulled_back(self, tokens: Tensor, images: Tensor, draws: Draws, dtype: torch.dtype) -> Tensor:
        """Return the contributions (R, C, H, W) of token cotangents."""
        return self._pull_back(tokens, images, draws, self._route.patch_size, dtype=dtype)
