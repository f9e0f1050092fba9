"""Models whose output holds what questions about places need: tokens, or detections."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError
from dave_fast.models.adapter import Adapter
from dave_fast.models.catalog import load_model

# names of the logits and boxes in what a detector returns
_LOGITS, _BOXES = ("logits", "pred_logits"), ("pred_boxes",)


def tokens_of(model: nn.Module) -> nn.Module:
    """Return a copy of a timm model without pooling and head, whose output is its tokens, as `Patch` needs it.

    Raises:
        InputError: the model has no `reset_classifier` like timm's.
    """
    made: Any = copy.deepcopy(model)
    try:
        made.reset_classifier(0, global_pool="")
    except (AttributeError, TypeError, AssertionError) as error:
        raise InputError(
            f"{type(model).__name__} has no reset_classifier() as timm's models have, so its tokens are not known; "
            "give a module whose output is (B, N, D) or (B, D, h, w)"
        ) from error
    return made


def detections_of(model: nn.Module) -> nn.Module:
    """Return a detector as a module whose output is its logits and boxes side by side, as `Box` needs it.

    Args:
        model: a detector of transformers (YOLOS, DETR and those like it), or any module that returns logits (B, Q, K)
            and boxes (B, Q, 4), centre x, y, width and height as shares of the image, as fields `logits` or
            `pred_logits` and `pred_boxes`, or as the first two of a tuple.
    """
    adapted, _ = load_model(model)
    # an adapter's own forward chooses the logits alone
    return Detections(adapted.model, adapted.pretrained_cfg) if isinstance(adapted, Adapter) else Detections(model, {})


class Detections(Adapter):
    """A detector as images (B, 3, H, W) -> (B, Q, K + 4): logits, and behind them the boxes."""

    def __init__(self, model: nn.Module, pretrained_cfg: Mapping[str, Any]) -> None:
        super().__init__(model, kind="embedding", pretrained_cfg=pretrained_cfg)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits and boxes.

        Raises:
            ModelError: the model returns none.
        """
        found = self.model(images)
        fields = found if isinstance(found, Mapping) else vars(found) if hasattr(found, "__dict__") else {}
        pair = [next((fields[name] for name in names if name in fields), None) for names in (_LOGITS, _BOXES)]
        if isinstance(found, tuple | list):
            pair = list(found[:2])
        if not _fit(pair):
            raise ModelError(
                f"{type(self.model).__name__} returns a {type(found).__name__} without logits (B, Q, K) and boxes "
                "(B, Q, 4); give a module that returns both"
            )
        logits, boxes = pair
        # boxes choose the logit that is explained and have no gradient: the frozen route holds divisors constant, and
        # its proof sees that they depend on the input, which detach() would hide
        constant = (logits[..., :1] * 0 + 1) / boxes.reciprocal()
        return torch.cat([logits, constant.to(logits.dtype)], dim=-1)


def _fit(pair: list[Any]) -> TypeGuard[list[Tensor]]:
    if len(pair) != 2 or not all(isinstance(each, Tensor) and each.dim() == 3 for each in pair):
        return False
    logits, boxes = pair
    return bool(logits.shape[:2] == boxes.shape[:2] and boxes.shape[2] == 4)
