"""Class names: a model's own labels, ImageNet's descriptions, otherwise "class 17"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from dave_fast.errors import InputError
from dave_fast.given.wrappers import last_part
from dave_fast.models.meaning import has_own_head, head_width, kind_of
from dave_fast.numbers import check_integer, shown, whole_in

_LISTED = 8


@dataclass(frozen=True)
class Labels:
    """The names of a model's classes.

    Attributes:
        count: K; None if it is not known.
        names: K descriptions, each of one or more synonyms separated by commas; None for classes without names.
    """

    count: int | None
    names: tuple[str, ...] | None = None

    def name(self, index: int) -> str:
        """Return the first synonym of a class, or "class 17"."""
        return self.names[index].split(",")[0].strip() if self.names else f"class {index}"

    def resolve(self, target: str | int) -> int:
        """Return the index of a class given as an index or by name.

        A name is a whole synonym or, if no class has it, a part that occurs in only one description; case is ignored.

        Raises:
            InputError: the index is out of range, or the name fits no class, or several.
        """
        text = target.strip() if isinstance(target, str) else ""
        index = whole_in(text) if isinstance(target, str) else check_integer(target, "the target")
        if index is not None:
            return self._index(index)
        if not text:
            raise InputError("the target is empty: give a class index or a class name.")
        if not self.names:
            raise InputError(f"target {shown(text)}: the classes of this model have no names; give an index.")
        wanted = text.casefold()
        synonyms, descriptions, together = self._folded
        found = synonyms.get(wanted, [])
        if not found and wanted in together:
            found = [i for i, name in enumerate(descriptions) if wanted in name]
        if not found:
            raise InputError(f"target {shown(text)}: no class has it in its name; give an index or another name.")
        if len(found) > 1:
            raise InputError(
                f"target {shown(text)} fits {len(found)} classes: {self._listed(found)}. Give one, or its index."
            )
        return found[0]

    @cached_property
    def _folded(self) -> tuple[dict[str, list[int]], list[str], str]:
        """The classes of each synonym, the descriptions, and all of them in one text, without regard to case."""
        descriptions = [name.casefold() for name in self.names or ()]
        synonyms: dict[str, list[int]] = {}
        for i, name in enumerate(descriptions):
            for synonym in dict.fromkeys(map(str.strip, name.split(","))):
                synonyms.setdefault(synonym, []).append(i)
        return synonyms, descriptions, "\n".join(descriptions)

    def _index(self, index: int) -> int:
        if index < 0 or (self.count is not None and index >= self.count):
            known = "0 or more" if self.count is None else f"0 to {self.count - 1}"
            raise InputError(f"target {index} is out of range: the classes of this model are {known}.")
        return index

    def _listed(self, found: Sequence[int]) -> str:
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        return ", ".join(f"{self.name(i)} ({i})" for i in found[:_LISTED]) + more


def labels_of(model: Any, width: int | None = None) -> Labels:
    """Return the labels of an nn.Module: as many classes as its output has, and their names if there are as many.

    Names are those of the timm `pretrained_cfg`: its own labels, else ImageNet's descriptions, these only for a head
    that was not replaced (`meaning.has_own_head`).

    Args:
        model: the module.
        width: K of its output (B, K); None where it has not run: as its head says, else its `num_classes`, else as many
            as there are names.
    """
    model = last_part(model)
    if kind_of(model) == "embedding":
        return Labels(0)
    names = _pretrained_names(model, getattr(model, "pretrained_cfg", None)) or ()
    count = width or head_width(model) or getattr(model, "num_classes", None) or len(names) or None
    return Labels(count, names if names and len(names) == count else None)


def _pretrained_names(model: Any, config: Any) -> tuple[str, ...] | None:
    """Return names from a timm configuration: its own labels, or the ImageNet subset of its number of classes."""
    if not config:
        return None
    own = config.get("label_names")
    if own:
        described = config.get("label_descriptions") or {}
        return tuple(str(described.get(name, name)) for name in own)
    if not has_own_head(model):
        return None
    from timm.data.imagenet_info import infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    return _imagenet_names(subset) if subset else None


@cache
def _imagenet_names(subset: str) -> tuple[str, ...]:
    """Return the descriptions of a subset of ImageNet's classes, which take a tenth of a second to read."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo(subset).label_descriptions())
