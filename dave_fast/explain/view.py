"""What a model was shown of an image, for the pictures of its explanation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.images import Preprocessing
from dave_fast.images.drawing import Box
from dave_fast.images.given import Photograph


@dataclass(frozen=True, eq=False)
class View:
    """What a model was shown of an image.

    Attributes:
        shown: the model's view, uint8 (H, W, 3), anywhere; or why there is none, in words.
        photograph: what was given; None for a tensor.
        box: what of the photograph the view is, in its pixels; None for a tensor.
    """

    shown: Tensor | np.ndarray | str
    photograph: Photograph | None = None
    box: Box | None = None

    @classmethod
    def of(cls, photograph: Photograph, prepare: Preprocessing) -> tuple[View, Tensor]:
        """Return the view of a photograph, and the model's input (C, H, W).

        Raises:
            ImageError: the photograph cannot be read.
        """
        image = photograph.read()
        inputs, crop = prepare(image)
        return cls(crop, photograph, prepare.geometry.seen(*image.size)), inputs

    @property
    def name(self) -> str:
        """The photograph's path or URL; "" where it has none."""
        return "" if self.photograph is None else self.photograph.name

    @property
    def title(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @cached_property
    def crop(self) -> np.ndarray:
        """The model's view, uint8 (H, W, 3).

        Raises:
            InputError: the input is no picture.
        """
        if isinstance(self.shown, str):
            raise InputError(f"there is no picture of the input: {self.shown}")
        return self.shown.cpu().numpy() if isinstance(self.shown, Tensor) else self.shown

    def original(self) -> tuple[Image.Image, Box | None]:
        """Return the photograph, and what of it the view is; for a tensor the view itself.

        Raises:
            InputError: the input is no picture, or the photograph cannot be read again.
        """
        if self.photograph is None:
            return Image.fromarray(self.crop), None
        return self.photograph.read(note=lambda text: None), self.box
