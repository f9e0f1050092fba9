"""A small transformer as users write it, whose steps a test replaces one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.variants import CLASSES, randomise

WIDTH, HEADS = 32, 2


class Own(nn.Module):
    """One block of attention and MLP, the mean of the tokens, and a head; steps are attributes that a test may set.

    Attributes:
        before: function of the images.
        turned: function of queries or keys (B, heads, N, D / heads).
        seen: called with what a user may want to keep: attention weights, the tokens, the output.
        scaled: function of the hidden units (B, N, 2 D).
        head: module or function of the pooled tokens (B, D).
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def before(self, x: Tensor) -> Tensor:
        return x

    def turned(self, x: Tensor) -> Tensor:
        return x

    def scaled(self, u: Tensor) -> Tensor:
        return u

    def seen(self, **found: Tensor) -> None:
        pass

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (self.turned(q) @ self.turned(k).mT * q.shape[-1] ** -0.5).softmax(-1)
        self.seen(attention=weights)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(self.before(images)).flatten(2).transpose(1, 2)
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(self.scaled(F.gelu(self.fc1(self.norm2(x)))))
        self.seen(tokens=x)
        output = self.head(self.norm(x).mean(1))
        self.seen(output=output)
        return output


def own_model(kind: type[Own] = Own, **steps: Callable[..., Any] | nn.Module) -> Own:
    """Return a model with random weights, equal at every call, whose steps are replaced.

    Args:
        kind: class of the model; a subclass overrides methods.
        steps: functions by the name of an attribute of `Own`, bound to no model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind()
        randomise(model)
    for name, step in steps.items():
        setattr(model, name, step)
    return model.eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
