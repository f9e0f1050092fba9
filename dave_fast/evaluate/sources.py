"""Images to evaluate on, with their labels and the masks of their objects, as far as they are known.

A source is a sequence of examples that is read part by part, so that it need not fit in memory. An unknown label is −1,
an unknown object an empty mask. An image's key selects its random draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dave_fast.errors import InputError, reason_of
from dave_fast.evaluate.annotations import Annotations
from dave_fast.images import Preprocessing, read_image


@dataclass(frozen=True)
class Examples:
    """A batch of n images.

    Attributes:
        images: (n, 3, H, W) float32, normalised.
        labels: (n,) int64, −1 where unknown.
        masks: (n, H, W) bool, the pixels of the labelled object, all False where unknown.
        names: n texts.
        keys: n integers.
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

    def to(self, device: torch.device | str) -> Examples:
        """Return the examples on another device."""
        moved = (self.images.to(device), self.labels.to(device), self.masks.to(device))
        return Examples(*moved, self.names, self.keys)


class ExampleSource(Protocol):
    """A sequence of examples.

    Attributes:
        title: description for reports.
        skipped: files that could not be used -> the reason; filled while reading.
    """

    title: str
    skipped: dict[str, str]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Examples | None:
        """Return examples start .. stop, without those that cannot be read; None if none can."""

    def read_pairs(self, start: int, stop: int) -> tuple[Examples, Examples] | None:
        """Return images with two objects, as examples of the one and of the other class; None without such images."""
        return None

    def pool(self, count: int) -> ExampleSource:
        """Return a source of about `count` examples for mosaics; the source itself, whatever its length, by default."""
        return self


@dataclass
class DemoScenes(ExampleSource):
    """The embedded scenes with held-out glyphs, whose masks are the pixels of the labelled digit.

    Scene i depends on the seed and i only. Scenes of two digits use seed + 1, scenes for mosaics seed + 2.

    Attributes:
        count: number of scenes.
        seed: of the scenes.
        title: see `ExampleSource`.
        skipped: see `ExampleSource`.
    """

    count: int
    seed: int
    title: str = "the embedded scenes (held-out glyphs)"
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Examples:
        """Return scenes of one digit."""
        return self._draw(start, min(stop, self.count), self.seed, 1)[0]

    def read_pairs(self, start: int, stop: int) -> tuple[Examples, Examples]:
        """Return scenes of two digits."""
        return self._draw(start, stop, self.seed + 1, 2)

    def pool(self, count: int) -> DemoScenes:
        """Return other scenes of one digit."""
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
class ImageFiles(ExampleSource):
    """Image files in the model's preprocessing, with labels and objects from annotations.

    A file that cannot be read, or whose annotation does not fit it, is left out and listed in `skipped`.

    Attributes:
        files: of the images.
        prepare: the model's preprocessing.
        annotations: labels and objects.
        title: see `ExampleSource`.
        skipped: see `ExampleSource`.

    Raises:
        InputError: two files of one name have boxes or a mask by that name.
    """

    files: Sequence[Path]
    prepare: Preprocessing
    annotations: Annotations
    title: str = "image files"
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: dict[str, Path] = {}
        for path in filter(self.annotations.has_object, self.files):
            other = seen.setdefault(path.stem, path)
            if other is not path:
                raise InputError(
                    f"{other} and {path} have one name, and there are boxes or a mask of that name, which are of one "
                    "of them at most; rename one, or evaluate one folder at a time."
                )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Examples | None:
        """Return the examples of files start .. stop."""
        made = []
        for number in range(start, min(stop, len(self.files))):
            try:
                made.append(self._example(number))
            # Beside our own refusals: memory for a large photograph, and the system's for its mask.
            except (InputError, MemoryError, OSError) as error:
                self.skipped[str(self.files[number])] = str(error) or reason_of(error)
        if not made:
            return None
        images, labels, masks, names, keys = zip(*made, strict=True)
        return Examples(torch.stack(images), torch.stack(labels), torch.stack(masks), names, keys)

    def _example(self, number: int) -> tuple[Tensor, Tensor, Tensor, str, int]:
        path = self.files[number]
        image = read_image(path)
        inputs, _ = self.prepare(image)
        label = self.annotations.label(path)
        drawn = self.annotations.mask(path, image.size)
        mask = torch.zeros(inputs.shape[1:], dtype=torch.bool) if drawn is None else self._seen(drawn)
        return inputs, torch.tensor(-1 if label is None else label), mask, path.name, number

    def _seen(self, mask: np.ndarray) -> Tensor:
        """Return the model's crop of a photograph's mask (H, W): the pixels that it covers by at least half."""
        white = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
        # A border of the mean's colour would be an object where the mean is half or more.
        geometry = replace(self.prepare.geometry, fill=(0, 0, 0))
        return torch.from_numpy(np.asarray(geometry.crop(white))[..., 0] >= 128)
