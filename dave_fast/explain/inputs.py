"""The images of a call: photographs that are prepared for the model, or tensors that are prepared already.

A tensor in the wrong scale is explained as it is, but told: its map would be one of noise. Preparing leaves values
between (0 − mean) / std and (1 − mean) / std of each channel. Values many times as far, as of pixels up to 255, and a
range of exactly [0, 1] where the model expects other values, are signs that the last step is missing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.engine.micro_batches import Progress
from dave_fast.errors import ImageError, InputError, InputWarning, ModelError, reason_of
from dave_fast.explain.view import View
from dave_fast.images import Preprocessing, preprocessing
from dave_fast.images.given import photographs

# How many times the width of the expected range values may lie outside of it; normal noise lies within.
_OUTSIDE = 8
# How near 0 and 1 the ends of a range are that is taken for [0, 1].
_NEAR = 0.02
# letters of a bar
_BAR = 30


class Inputs:
    """The preparation of a model's images.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # what the model says of its images, and what it was read as
        self._read: tuple[list[Any], Preprocessing | InputError | ModelError] | None = None

    @property
    def prepare(self) -> Preprocessing:
        """The model's preprocessing.

        Raises:
            InputError: the model takes no photographs.
            ModelError: its preprocessing has a step that is not supported, or cannot be read.
        """
        found = self._known()
        if isinstance(found, Preprocessing):
            return found
        raise type(found)(str(found)) from found

    def _known(self) -> Preprocessing | InputError | ModelError:
        """Return the model's preprocessing, or why it has none; it is read again where the model says another."""
        said = _said(self._model)
        if self._read is None or self._read[0] != said:
            self._read = said, _preprocessing(self._model)
        return self._read[1]

    def of_photographs(self, given: Any) -> tuple[Tensor, tuple[View, ...]]:
        """Return the model's input (B, C, H, W) for one or several photographs, and what it shows of each.

        Raises:
            InputError: they are no photographs, or the model takes none.
            ModelError: its preprocessing has a step that is not supported, or cannot be read.
            ImageError: one cannot be read; of several the message says which.
        """
        made = []
        found, prepare = photographs(given), self.prepare
        if prepare.note:
            advice = "If that is another, set model.pretrained_cfg (input_size, mean, std), or give prepared tensors."
            warnings.warn(f"{prepare.note} {advice}", InputWarning, stacklevel=3)
        for number, each in enumerate(found):
            try:
                made.append(View.of(each, prepare))
            except ImageError as error:
                if len(found) == 1 or each.name:
                    raise
                raise ImageError(f"image {number}: {error}") from error
        return torch.stack([inputs for _, inputs in made]), tuple(view for view, _ in made)

    def of_tensor(self, images: Tensor) -> tuple[tuple[View, ...], Tensor]:
        """Return what tensors (B, C, H, W) show, and their smallest and largest value (2,), all on their device."""
        prepare = self._known()
        if not isinstance(prepare, Preprocessing):
            return tuple(View(str(prepare)) for _ in images), images.new_empty(0)
        if images.shape[1] != prepare.channels:
            words = f"it has {images.shape[1]} channels, and the model's photographs have {prepare.channels}."
            return tuple(View(words) for _ in images), images.new_empty(0)
        return tuple(map(View, prepare.pixels(images))), torch.stack(images.aminmax())

    def tell(self, extremes: Tensor) -> None:
        """Warn where images do not look normalised.

        Args:
            extremes: of `of_tensor`, on the host.
        """
        prepare = self._read[1] if extremes.numel() and self._read is not None else None
        if not isinstance(prepare, Preprocessing):
            return
        low, high = extremes.tolist()
        ends = [(edge - m) / s for m, s in zip(prepare.mean, prepare.std, strict=True) for edge in (0, 1)]
        first, last = min(ends), max(ends)
        far = high - last > _OUTSIDE * (last - first) or first - low > _OUTSIDE * (last - first)
        plain = prepare.note is None and abs(low) < _NEAR and abs(high - 1) < _NEAR and first < -0.5
        if far or plain:
            expected = f"mean {_numbers(prepare.mean)}, std {_numbers(prepare.std)} of pixels in [0, 1]"
            warnings.warn(
                f"the images look as if they had not been normalised: their values are {low:.4g} to {high:.4g}, and "
                f"this model expects {first:.3g} to {last:.3g} ({expected}). Give the photographs themselves, or "
                "DAVE.prepare(photograph)[0].",
                InputWarning,
                stacklevel=5,
            )


def _said(model: nn.Module) -> list[Any]:
    """Return what a model and its parts say of their images."""
    told = ((vars(part).get("pretrained_cfg"), vars(part)) for part in model.modules())
    parts = [(dict(config), _size(own)) for config, own in told if isinstance(config, Mapping)]
    return [_size(vars(model)), *parts]


def _size(own: Mapping[str, Any]) -> Any:
    return own.get("image_size"), getattr(own["_modules"].get("patch_embed"), "img_size", None)


def _preprocessing(model: nn.Module) -> Preprocessing | InputError | ModelError:
    """Return a model's preprocessing, or why it has none."""
    try:
        return preprocessing(model)
    except (InputError, ModelError) as error:
        return error
    # the configuration of a module may hold anything
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        words = f"{type(error).__name__}, {reason_of(error)}"
        return ModelError(f"what the model says of its images, its pretrained_cfg, cannot be read: {words}")


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Show a bar in the block where progress is True, and yield the function that moves it.

    The bar is one line that is written again and again, on a terminal and in a notebook, and deleted at the end.
    """
    if callable(progress) or not progress:
        yield progress or None
        return
    try:
        yield _move_bar
    finally:
        print("\r" + " " * (_BAR + 40), end="\r", file=sys.stderr, flush=True)


def _move_bar(done: int, total: int) -> None:
    full = _BAR * done // max(total, 1)
    bar = "█" * full + "░" * (_BAR - full)
    print(f"\rexplaining {bar} {done} of {total}", end="", file=sys.stderr, flush=True)
