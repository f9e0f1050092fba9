"""Images to evaluate on, with what is known of them: labels, and where the object is.

A source is a sequence of examples that is read part by part, so that it need not fit in memory. What is unknown is said
by the example itself: label −1, an empty mask. Keys tell the draws of one image from another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dave_fast.errors import ImageError, InputError
from dave_fast.evaluate.annotations import Annotations
from dave_fast.images import Preprocessing, read_image


@dataclass(frozen=True)
class Examples:
    """n images as a model sees them.

    images: (n, 3, H, W) float32, normalised. labels: (n,) int64, −1 where unknown.
    masks: (n, H, W) bool, the pixels of the labelled object, all False where unknown. names: n texts. keys: n integers.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    names: tuple[str, ...]
    keys: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Examples:
        return Examples(*(getattr(self, each.name)[rows] for each in fields(self)))

    def to(self, device: torch.device) -> Examples:
        """The same on another device."""
        moved = (self.images.to(device), self.labels.to(device), self.masks.to(device))
        return Examples(*moved, self.names, self.keys)


class ExampleSource(Protocol):
    """What can be evaluated on.

    title: what it is, for reports. skipped: files that could not be used, and why; filled while reading.
    """

    title: str
    skipped: dict[str, str]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Examples | None:
        """Examples start .. stop, fewer where some cannot be read; None where none can."""

    def read_pairs(self, start: int, stop: int) -> tuple[Examples, Examples] | None:
        """Images with two objects of different classes, as examples of either; None where there are none."""

    def pool(self, count: int) -> ExampleSource:
        """Examples for mosaics, about `count` of them."""


@dataclass
class DemoScenes:
    """The embedded scenes, whose masks say which pixels carry the label: held-out glyphs, scene i by seed and i.

    Scenes of two digits have the seed + 1; scenes for mosaics the seed + 2.
    """

    count: int
    seed: int
    title: str = "the embedded scenes (held-out glyphs)"
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Examples:
        """Scenes of one digit."""
        return self._draw(start, min(stop, self.count), self.seed, 1)[0]

    def read_pairs(self, start: int, stop: int) -> tuple[Examples, Examples]:
        """Scenes of two digits."""
        return self._draw(start, stop, self.seed + 1, 2)

    def pool(self, count: int) -> DemoScenes:
        """Other scenes of one digit."""
        return DemoScenes(count, self.seed + 2)

    def _draw(self, start: int, stop: int, seed: int, digits: int) -> tuple[Examples, Examples]:
        from dave_fast.models.demo import draw_scenes

        scenes = draw_scenes(stop - start, seed, n_digits=digits, split="test", start=start)
        images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
        numbers = tuple(range(start, stop))
        names = tuple(f"scene {number}" for number in numbers)
        known = ((scenes.labels, scenes.masks), (scenes.other_labels, scenes.other_masks))
        made = [Examples(images, torch.from_numpy(a), torch.from_numpy(b), names, numbers) for a, b in known]
        return made[0], made[1]


@dataclass
class ImageFiles:
    """Image files, preprocessed as the model wants them, with labels and objects from annotations.

    A file that cannot be read, or whose annotation does not fit it, is left out and named in `skipped`.
    """

    files: Sequence[Path]
    prepare: Preprocessing
    annotations: Annotations
    title: str = "image files"
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Examples | None:
        """Files start .. stop."""
        made = []
        for number in range(start, min(stop, len(self.files))):
            try:
                made.append(self._example(number))
            except (ImageError, InputError) as error:
                self.skipped[str(self.files[number])] = str(error)
        if not made:
            return None
        images, labels, masks, names, keys = zip(*made, strict=True)
        return Examples(torch.stack(images), torch.stack(labels), torch.stack(masks), names, keys)

    def read_pairs(self, start: int, stop: int) -> None:
        """Not known of files."""
        return

    def pool(self, count: int) -> ImageFiles:
        """The same files: as many as there are."""
        return self

    def _example(self, number: int) -> tuple[Tensor, Tensor, Tensor, str, int]:
        path = self.files[number]
        image = read_image(path)
        inputs = self.prepare.transform(image)
        label = self.annotations.label(path)
        drawn = self.annotations.mask(path, image.size)
        mask = torch.zeros(inputs.shape[1:], dtype=torch.bool) if drawn is None else self._seen(drawn)
        return inputs, torch.tensor(-1 if label is None else label), mask, path.name, number

    def _seen(self, mask: np.ndarray) -> Tensor:
        """What the model's crop leaves of a photograph's mask (H, W): the pixels that it covers by at least half."""
        white = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
        return torch.from_numpy(self.prepare.crop(white)[..., 0] >= 128)
