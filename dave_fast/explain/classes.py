"""The classes of a classifier's output: the most probable ones and their probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.models.adapter import kind_of


def has_classes(model: nn.Module, output: Tensor) -> bool:
    """Return whether a model's output (B, ...) holds the scores (B, K) of classes."""
    return output.dim() == 2 and kind_of(model) != "embedding"


def most_probable(model: nn.Module, output: Tensor, k: int) -> Tensor:
    """Return the k most probable classes of each image, (k, B) int64, the most probable first.

    Raises InputError where the output (B, ...) has no classes, or fewer than k.
    """
    if not has_classes(model, output):
        raise InputError(f"the model's output is {tuple(output.shape)}; top_k needs a classifier's: (B, K).")
    if k > output.shape[1]:
        raise InputError(f"top_k is {k}, and the model has {output.shape[1]} classes.")
    return output.float().topk(k).indices.T.contiguous()


def probabilities(model: nn.Module, output: Tensor, classes: Tensor) -> Tensor:
    """Return the probabilities (B, K) float32 of classes (B, K); NaN for −1, and where the output has no classes."""
    if not has_classes(model, output):
        return torch.full(classes.shape, float("nan"), device=classes.device)
    chosen = output.softmax(1).gather(1, classes.clamp(min=0)).float()
    return chosen.masked_fill(classes < 0, float("nan"))
