"""The pictures of an explanation: overlays, figures, grids, files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.explain.depth import name_of
from dave_fast.explain.depth_account import Depths
from dave_fast.explain.view import View
from dave_fast.images.drawing import (
    Box,
    Size,
    Style,
    check_size,
    check_suffix,
    draw_over,
    percent,
    photograph_of,
    plain_map,
    save_as,
)
from dave_fast.images.figures import Panel, Row, figure, grid_of
from dave_fast.images.screen import VECTORS, Drawn
from dave_fast.numbers import check_integer, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A class, its name and its probability.
Scored = tuple[int, str, float]
# images of one picture, and bars beside the maps of one image
MOST_SHOWN, BARS = 64, 5


class Pictures(Drawn):
    """The pictures of B images, K targets and L depths.

    All take the keywords of `dave_fast.images.drawing.Style` (colormap, opacity, quantile) and `signed`: True draws
    what speaks for an answer in orange and what speaks against it in blue, False the first of the two alone, None, the
    default, both for contrasts.
    """

    maps: Tensor
    depths: Depths | None

    @property
    def signed_maps(self) -> Tensor:
        """Maps with two signs, shaped like `maps`."""
        raise NotImplementedError

    @property
    def levels(self) -> tuple[str | int, ...]:
        """Each depth."""
        raise NotImplementedError

    @property
    def views(self) -> tuple[View, ...]:
        """What the model was shown of each image."""
        raise NotImplementedError

    @property
    def contrasts(self) -> tuple[bool, ...]:
        """Whether each target is one, which has two signs."""
        raise NotImplementedError

    def answers(self) -> list[list[Scored]]:
        """Return of each image its K targets."""
        raise NotImplementedError

    def top(self, k: int = BARS) -> list[list[Scored]]:
        """Return of each image its k most probable classes."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.maps)

    def heat(self, image: int = 0, target: int = 0, level: int = 0, *, signed: bool | None = None) -> np.ndarray:
        """Return one map, float32 (H, W): in [0, 1], or in [-1, 1] where it is signed.

        Args:
            image: its number.
            target: the number of the target, of K.
            level: the number of the depth, of several.
            signed: see the class.
        """
        check_integer(image, "the number of the image", 0, len(self) - 1)
        check_integer(level, "the number of the depth", 0, len(self.levels) - 1)
        maps = self.signed_maps if self.is_signed(target, signed=signed) else self.maps
        maps = maps.reshape(len(self), -1, len(self.levels), *self.maps.shape[-2:])
        found: np.ndarray = maps[image, target, level].cpu().numpy()
        return found

    def is_signed(self, target: int = 0, *, signed: bool | None = None) -> bool:
        """Return whether the picture of a target has two signs; `signed` is as for pictures."""
        check_integer(target, "the number of the target", 0, len(self.contrasts) - 1)
        if signed not in (None, True, False):
            raise InputError(f"signed is {shown(signed)}; expected True, False or None")
        return self.contrasts[target] if signed is None else bool(signed)

    def overlay(
        self,
        image: int = 0,
        target: int = 0,
        level: int = 0,
        *,
        size: Size = "original",
        signed: bool | None = None,
        **style: Any,
    ) -> Image.Image:
        """Return a map over the photograph as a PIL image.

        Args:
            image: its number.
            target: the number of the target, of K.
            level: the number of the depth, of several.
            size: "original", the photograph in its own size, where the map lies on what the model was shown of it;
                "model", the model's input pixel by pixel; "enlarged", this by a whole number.
            signed: see the class.
            style: see the class.

        Raises:
            InputError: there is no picture of the input, the photograph cannot be read again, or a setting is wrong.
        """
        under, box = self._under(image, size)
        heat = self.heat(image, target, level, signed=signed)
        return draw_over(under, heat, box, Style(**style), signed=self.is_signed(target, signed=signed))

    def picture(
        self,
        image: int = 0,
        target: int = 0,
        level: int = 0,
        *,
        size: Size = "original",
        signed: bool | None = None,
        **style: Any,
    ) -> Image.Image:
        """Return a map without the photograph as a PIL image; the arguments are those of `overlay`."""
        under, box = self._under(image, size)
        heat, both = self.heat(image, target, level, signed=signed), self.is_signed(target, signed=signed)
        return plain_map(heat, Style(**style), signed=both, size=under.size, box=box)

    def _under(self, image: int, size: Size) -> tuple[Image.Image, Box | None]:
        """Return what a map is drawn over, and what of it the map is of; None for all of it."""
        size, view = check_size(size), self._view(image)
        if size == "original":
            return view.original()
        return Image.fromarray(photograph_of(view.crop) if size == "enlarged" else view.crop), None

    def _view(self, image: int) -> View:
        check_integer(image, "the number of the image", 0, len(self) - 1)
        if not self.views:
            raise InputError("there is no picture of the input: the explanation is not one of DAVE.explain")
        return self.views[image]

    def panels(self, image: int = 0, *, signed: bool | None = None) -> list[Panel]:
        """Return the maps of an image for figures, one for each target and different depth."""
        words = ["" if self.depths is None else name_of(depth) for depth in self.levels]
        levels = {depth: level for level, depth in reversed(list(enumerate(self.levels)))}
        return [
            Panel(
                self.heat(image, k, level, signed=signed),
                name,
                None if math.isnan(probability) else probability,
                words[level],
                signed=self.is_signed(k, signed=signed),
            )
            for k, (_, name, probability) in enumerate(self.answers()[image])
            for level in sorted(levels.values())
        ]

    def bars(self, image: int = 0) -> list[tuple[str, float]]:
        """Return the names and probabilities of the most probable classes of an image, for figures."""
        return [(name, p) for _, name, p in self.top()[image] if not math.isnan(p)]

    def figure(self, *, signed: bool | None = None, **style: Any) -> Figure:
        """Return a figure at print size: an input, its maps and the most probable classes; of several images a grid.

        Args:
            signed: see the class.
            style: see the class.

        Raises:
            InputError: as `overlay`, and where there are more images than fit.
        """
        look = Style(**style)
        if len(self) == 1:
            return figure(self._view(0).crop, self.panels(signed=signed), self.bars(), look)
        if not 0 < len(self) <= MOST_SHOWN:
            raise InputError(
                f"there are {len(self)} images; a picture has 1 to {MOST_SHOWN}: choose some, as in found[:8]"
            )
        named = [view.title or f"image {b}" for b, view in enumerate(self.views)]
        return grid_of(
            [Row(named[b], self._view(b).crop, self.panels(b, signed=signed)) for b in range(len(self))], look
        )

    def plot(
        self,
        ax: Axes | None = None,
        image: int = 0,
        target: int = 0,
        level: int = 0,
        *,
        size: Size = "model",
        signed: bool | None = None,
        **style: Any,
    ) -> Axes:
        """Draw a map over the photograph into matplotlib's axes and return them.

        Args:
            ax: the axes; None for those of a new figure of pyplot.
            image: as for `overlay`, as are the others.
            target: the number of the target.
            level: the number of the depth.
            size: as for `overlay`.
            signed: see the class.
            style: see the class.
        """
        pixels = np.asarray(self.overlay(image, target, level, size=size, signed=signed, **style))
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        _, name, probability = self.answers()[image][target]
        ax.imshow(pixels)
        ax.set_axis_off()
        ax.set_title(name if math.isnan(probability) else f"{name}, {percent(probability)}")
        return ax

    def save(
        self, path: str | os.PathLike[str], *, size: Size = "original", signed: bool | None = None, **style: Any
    ) -> Path:
        """Write a picture and return its path: of one map the overlay, of several, and as .pdf or .svg, the figure.

        Args:
            path: its suffix says the form: .png, .jpg, .webp ..., .pdf, .svg, or .npz for the arrays (`save_npz`).
            size: of an overlay, as for `overlay`.
            signed: see the class.
            style: see the class.

        Raises:
            InputError: as `figure`, and where the file cannot be written.
        """
        if Path(path).suffix.lower() == ".npz":
            return self.save_npz(path)
        one = len(self) * len(self.contrasts) * len(self.levels) == 1
        if Path(path).suffix.lower() in VECTORS or not one:
            return super().save(path, signed=signed, **style)
        check_suffix(path)
        return save_as(self.overlay(size=size, signed=signed, **style), path)

    def save_npz(self, path: str | os.PathLike[str]) -> Path:
        """Write the arrays."""
        raise NotImplementedError
