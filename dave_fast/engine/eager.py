"""A micro-batch step by step: perturb, forward walk, VJP walk, pull back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.bound_ops import PixelOps
from dave_fast.engine.levels import PIXELS, Levels, Pulled
from dave_fast.engine.route import Route
from dave_fast.sampling import Draws


class Eager:
    """A micro-batch of any number of rows, run op by op: a forward walk and any number of VJPs of it.

    Args:
        route: the walks.
        ops: the bound ops.
        levels: at which evidence is told.
    """

    def __init__(self, route: Route, ops: PixelOps, levels: Levels = PIXELS) -> None:
        self._route, self.ops, self._levels = route, ops, levels
        self._seen: tuple[Tensor, Draws] | None = None
        self._saved: Any = None

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the output (R, ...) for images (B, C, H, W) and R rows of draws."""
        self._seen = images, draws
        return self.walk(self.perturbed(images, draws))

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Pulled:
        """Pull a cotangent of the last output (R, ...) back.

        Returns contributions (R, C, H, W) in `dtype`, or for None the cotangent of the tokens (R, n, C·p_h·p_w), and
        the evidence of the blocks.
        """
        pulled = self._route.vjp(self._saved, cotangent, self._levels)
        if dtype is None or pulled.pixels is None:
            return pulled
        assert self._seen is not None
        return pulled._replace(pixels=self.pulled_back(pulled.pixels, *self._seen, dtype))

    def perturbed(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the tokens (R, n, C·p_h·p_w) of R rows of draws."""
        return self.ops.perturb(images, draws, self._route.patch_size, dtype=self._route.dtype)

    def walk(self, tokens: Tensor) -> Tensor:
        """Run the forward walk alone and keep its operators for `vjp`."""
        output, self._saved = self._route.forward(tokens, self._levels)
        return output

    def pulled_back(self, tokens: Tensor, images: Tensor, draws: Draws, dtype: torch.dtype) -> Tensor:
        """Return the contributions (R, C, H, W) of token cotangents."""
        return self.ops.pull_back(tokens, images, draws, self._route.patch_size, dtype=dtype)
