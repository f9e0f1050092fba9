"""The names of models, the same for the command line, configuration files, workers, servers and Python.

    demo                                  the embedded model
    NAME[.TAG]                            timm, as deit3_base_patch16_224.fb_in1k
    hf:ORG/NAME[@REVISION]                the Hugging Face hub: models of transformers, timm and open_clip
    hf:FOLDER                             the same in a local folder, as `save_pretrained` writes it
    torchvision:NAME[:WEIGHTS]            torchvision, as torchvision:vit_b_16:IMAGENET1K_V1; without WEIGHTS the best
    open_clip:NAME[:TAG|:FILE]            open_clip, as open_clip:ViT-B-16:laion2b_s34b_b88k
    MODULE:FUNCTION                       your own: an importable function that returns an nn.Module

A `ModelSpec` adds the file of weights, the number of classes and the class names of a fine-tuned model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dave_fast.errors import InputError, UnknownModelError, reason_of
from dave_fast.files import read_plain
from dave_fast.numbers import check_integer, parse_whole

Link = Literal["softmax", "sigmoid"] | None
# by the words of `ModelSpec.link`
LINK_WORDS: dict[str, Link] = {"softmax": "softmax", "sigmoid": "sigmoid", "none": None}
# timm's own schemes for the hub and for folders are synonyms of hf:
_SCHEMES = {**{name: name for name in ("timm", "hf", "torchvision", "open_clip")}, "hf-hub": "hf", "local-dir": "hf"}
# more would take the memory before any file shows that they are wrong
MOST_CLASSES, MOST_PIXELS = 2**20, 2**13
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class ModelSpec:
    """A model's name and weights. It can be pickled, and loads nothing.

    Attributes:
        name: see above.
        weights: a file, safetensors or one of tensors that `torch.save` wrote; None for those of the name.
        num_classes: of the head; None for that of the name. It needs weights.
        labels: the class names, or a file of them: a name a line, a JSON list, or a JSON object from index to name.
        image_size: side of the images in pixels; None for the model's own. timm's models are built for it,
            transformers' interpolate their position encodings.
        random_weights: whether to use random weights, the same each time, for trials.
        link: how the logits of a classifier become probabilities, where the model does not say it: "softmax" (one of
            several classes), "sigmoid" (each class for itself: several labels) or "none" (a regression). None is the
            model's own.
    """

    name: str
    weights: str | None = None
    num_classes: int | None = None
    labels: str | Sequence[str] | None = None
    image_size: int | None = None
    random_weights: bool = False
    link: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError for values out of range, and for arguments that exclude each other."""
        if self.weights is not None and self.random_weights:
            raise InputError("a file of weights and random weights exclude each other: give one of them.")
        if self.weights is not None and not os.path.isfile(self.weights):
            raise InputError(
                f"the weights {self.weights}: there is no such file; give a .safetensors file or one of torch.save."
            )
        if self.num_classes is not None:
            check_integer(self.num_classes, "num_classes", 1, MOST_CLASSES)
        if self.image_size is not None:
            check_integer(self.image_size, "image_size, in pixels,", 1, MOST_PIXELS)
        if self.link not in (None, *LINK_WORDS):
            raise InputError(f"link is {self.link!r}; expected one of {', '.join(LINK_WORDS)}.")
        if self.num_classes is not None and self.weights is None and not self.random_weights:
            raise InputError(
                f"num_classes={self.num_classes} without weights would explain a head of random numbers: give the file "
                "of your fine-tuned weights (--weights FILE)."
            )

    @property
    def source(self) -> tuple[str, str]:
        """The source ("demo", "timm", "hf", "torchvision", "open_clip" or "python"), and the rest of the name.

        Raises:
            UnknownModelError: the name is empty, or that of a file or a folder.
        """
        name = self.name
        if not name.strip():
            raise UnknownModelError("the model's name is empty; expected a timm name, 'demo', hf:ORG/NAME ...")
        if name == "demo":
            return "demo", ""
        scheme, colon, rest = name.partition(":")
        if colon and scheme in _SCHEMES:
            if not rest:
                raise UnknownModelError(f"the model {name!r} names nothing after the colon; expected {name}NAME.")
            return _SCHEMES[scheme], rest
        if os.path.isdir(name):
            raise UnknownModelError(f"{name} is a folder: write hf:{name} for one that `save_pretrained` wrote.")
        if name.lower().endswith(_WEIGHT_FILES) or os.path.isfile(name):
            raise UnknownModelError(
                f"{name} is a file, and a file of weights does not have its architecture: give the architecture "
                f"as the model, and the file as its weights (--model vit_base_patch16_224 --weights {name})."
            )
        return ("python" if colon else "timm"), name

    @property
    def pretrained(self) -> bool:
        """Whether the weights are those of the name, not from a file and not random."""
        return self.weights is None and not self.random_weights


def as_spec(model: str | ModelSpec) -> ModelSpec:
    """Return a name as a spec."""
    return model if isinstance(model, ModelSpec) else ModelSpec(model)


def class_names(labels: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """Return class names, given or read from a file.

    Raises:
        InputError: the file cannot be read, or has no or empty names.
    """
    if not isinstance(labels, str | os.PathLike):
        return tuple(str(name) for name in labels)
    try:
        text = read_plain(labels).decode("utf-8-sig")
        names = _from_json(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"cannot read the class names in {labels}: {reason_of(error)}.") from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise InputError(f"{labels} has an empty class name; expected a name a line, in the order of the classes.")
    return tuple(names)


def _from_json(values: Any) -> list[str]:
    """Return names from a list, an object from index to name, or a transformers configuration with `id2label`."""
    if isinstance(values, dict):
        values = values.get("id2label", values)
        named = values.items() if isinstance(values, dict) else enumerate(values)
        indexed = {parse_whole(index, "an index"): name for index, name in named}
        if sorted(indexed) != list(range(len(indexed))):
            raise ValueError("its indices are not 0, 1, 2 ...")
        values = [indexed[index] for index in range(len(indexed))]
    if not all(isinstance(name, str) for name in values):
        raise ValueError("expected a JSON list of names, or an object from index to name")
    return list(values)
