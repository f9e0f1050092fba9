"""How images arrive at the part of a model that says how they are to be prepared.

People put models into modules of their own, with a normalisation or a head around them. Such a module says nothing
about its images, but the model inside does: what arrives there is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dave_fast.given.isolation import form_of, isolated
from dave_fast.given.wrappers import measured_map


class Arrival(NamedTuple):
    """The part of a model that says how its images are to be prepared.

    Attributes:
        path: of the part.
        part: with a `pretrained_cfg`.
        scale: (C,) float64, of the map of each channel on the way to the part, scale · x + shift.
        shift: (C,) float64.
    """

    path: str
    part: Any
    scale: Tensor
    shift: Tensor


def arrival(model: nn.Module) -> Arrival | None:
    """Return the part of a model that images arrive at, changed by a map of single channels at most; None without one.

    A copy of the model is called, up to the part.
    """
    found = {path: part for path, part in model.named_modules() if path and _describes(part)}
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        return None
    path = outermost[0]
    part: Any = found[path]
    channels, *size = part.pretrained_cfg["input_size"]
    size = getattr(getattr(part, "patch_embed", None), "img_size", None) or size
    like = torch.zeros(0, dtype=torch.float32, device=form_of(model)[0])
    way = measured_map(lambda: _Way(isolated(model, torch.float32), path), [(1, channels, *size)], like)
    return None if way is None else Arrival(path, part, *way)


def _describes(part: nn.Module) -> bool:
    config = vars(part).get("pretrained_cfg")
    return isinstance(config, Mapping) and not {"mean", "input_size"} - config.keys()


class _ArrivedError(Exception):
    """Ends a call of a model where its images have arrived."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images


class _Way:
    """A function from a model's images to what its part is called with.

    Args:
        model: is given hooks.
        path: of the part.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self._model = model
        part = model.get_submodule(path)
        # a module may call a method of the part instead of the part
        for module in (part, getattr(part, "patch_embed", None)):
            if isinstance(module, nn.Module):
                module.register_forward_pre_hook(self._end, with_kwargs=True)

    @staticmethod
    def _end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ArrivedError(next(iter((*args, *kwargs.values()))))

    def __call__(self, images: Tensor) -> Tensor:
        try:
            self._model(images)
        except _ArrivedError as arrived:
            return arrived.images
        raise LookupError("the part is not called")
