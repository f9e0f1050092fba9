"""Class names: a model's own labels, ImageNet's descriptions, otherwise "class 17"."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any

from dave_fast.errors import InputError
from dave_fast.given.wrappers import last_part
from dave_fast.models.meaning import has_own_head, head_width, kind_of
from dave_fast.models.spec import ModelSpec, class_names
from dave_fast.numbers import check_integer, shown, whole_in

_LISTED = 8
# synonyms that a wrong name is compared with
_COMPARED = 50_000


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
        found = self._fitting(text.casefold())
        if not found:
            raise InputError(f"target {shown(text)}: no class has it in its name; {self._nearest(text.casefold())}")
        if len(found) > 1:
            raise InputError(
                f"target {shown(text)} fits {len(found)} classes: {self._listed(found)}. Give one, or its index."
            )
        return found[0]

    def find(self, text: str) -> int | None:
        """Return what `resolve` returns, and None where it raises: quick for many texts that are no classes."""
        index = whole_in(text.strip())
        if index is not None:
            return index if self._has(index) else None
        found = self._fitting(text.strip().casefold())
        return found[0] if len(found) == 1 else None

    def _fitting(self, wanted: str) -> list[int]:
        """Return the classes that a name in small letters fits."""
        synonyms, descriptions, together = self._folded
        found = synonyms.get(wanted, [])
        if not found and wanted and wanted in together:
            found = [i for i, name in enumerate(descriptions) if wanted in name]
        return found

    def _nearest(self, wanted: str) -> str:
        """Return a hint for a name that no class has: the synonyms nearest to it.

        Of names whose length is about the same, and of so many that 0.1 s is enough.
        """
        synonyms = islice(self._folded[0].items(), _COMPARED)
        about = {
            name: classes for name, classes in synonyms if abs(len(name) - len(wanted)) <= 2 + min(len(wanted), 40) // 4
        }
        near = difflib.get_close_matches(wanted, about)
        if not near:
            return "give an index or another name."
        return f"did you mean {' or '.join(f'{name} ({about[name][0]})' for name in near)}?"

    @cached_property
    def _folded(self) -> tuple[dict[str, list[int]], list[str], str]:
        """The classes of each synonym, the descriptions, and all of them in one text, without regard to case."""
        descriptions = [name.casefold() for name in self.names or ()]
        synonyms: dict[str, list[int]] = {}
        for i, name in enumerate(descriptions):
            for synonym in dict.fromkeys(map(str.strip, name.split(","))):
                synonyms.setdefault(synonym, []).append(i)
        return synonyms, descriptions, "\n".join(descriptions)

    def _has(self, index: int) -> bool:
        return index >= 0 and (self.count is None or index < self.count)

    def _index(self, index: int) -> int:
        if not self._has(index):
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


def known_labels(spec: ModelSpec) -> Labels | None:
    """Return the named classes that the model of a spec will have, where its library knows them without the weights.

    Nothing is fetched; None where the names are not known before the model is loaded.

    Raises:
        InputError: the file of class names cannot be read.
    """
    if spec.labels is not None:
        names = class_names(spec.labels)
        return Labels(len(names), names)
    found = _names_of_library(*spec.source) or ()
    return Labels(len(found), found) if found and spec.num_classes in (None, len(found)) else None


def _names_of_library(source: str, name: str) -> tuple[str, ...] | None:
    """Return the class names of a model's own weights as its library lists them; None where it does not."""
    if source == "demo":
        from dave_fast.models.demo.model import PREPROCESSING

        return _pretrained_names(None, PREPROCESSING)
    # a tag that does not exist, a library that is not installed: loading says it
    with suppress(RuntimeError, ModuleNotFoundError):
        if source == "timm":
            import timm

            config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
            return _pretrained_names(None, config.to_dict()) if config else None
        if source == "torchvision":
            from dave_fast.models.from_torchvision import weights_of

            return tuple(weights_of(name).meta["categories"])
    return None


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
