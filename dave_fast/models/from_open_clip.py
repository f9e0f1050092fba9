"""open_clip's models: the image tower as an embedding, the text tower for prompts."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError, UnknownModelError
from dave_fast.images import describe_preprocessing
from dave_fast.models.adapter import Adapter, LogitOfLikeness, check_texts
from dave_fast.models.hub import loading
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights


class OpenClip(LogitOfLikeness, Adapter):
    """images (B, 3, H, W) -> (B, D) embeddings of open_clip's image tower, behind its projection, not normalised.

    name: what `open_clip.get_tokenizer` takes.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model, kind="embedding", pretrained_cfg=preprocessing_of(model))
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        """`encode_image` without its normalisation."""
        return self.model.encode_image(images, normalize=False)

    @torch.no_grad()
    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """See `TextImageModel`."""
        import open_clip

        check_texts(texts)
        with loading(self.name, remote=True), _quiet():
            tokens = open_clip.get_tokenizer(self.name)(list(texts))
        device = next(self.model.parameters()).device
        return self.model.encode_text(tokens.to(device), normalize=True).float()


def load(name: str, spec: ModelSpec) -> OpenClip:
    """The model of NAME or NAME:TAG. Raises UnknownModelError, InputError."""
    import open_clip

    architecture, _, tag = name.partition(":")
    with _quiet():
        known = open_clip.get_model_config(architecture)
    if known is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()."
        raise UnknownModelError(f"open_clip has no model {architecture!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UnknownModelError(f"{architecture} has no weights {tag!r}; it has {', '.join(tags) or 'none'}.")
    fetched = spec.weights is None and not spec.random_weights
    if fetched and not tag:
        raise UnknownModelError(
            f"{spec.name!r} does not say which weights; there are {', '.join(tags) or 'none'}: write "
            f"open_clip:{architecture}:{(tags or ['TAG'])[0]}."
        )
    preprocess = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    return create(architecture, spec, preprocess, pretrained=tag if fetched else None, remote=fetched)


def create(name: str, spec: ModelSpec, preprocess: dict[str, Any], *, pretrained: str | None, remote: bool) -> OpenClip:
    """The model of any name that `open_clip.create_model` takes. remote: it needs the hub."""
    import open_clip

    if spec.num_classes is not None:
        raise InputError(f"{spec.name} gives embeddings and has no classes: leave num_classes out.")
    if spec.image_size is not None:
        raise InputError(f"{spec.name} takes images of its own size: leave image_size out.")
    fetched = spec.weights is None and not spec.random_weights
    with loading(spec.name, remote=remote), _quiet():
        model = open_clip.create_model(
            name,
            pretrained,
            load_weights=fetched,
            pretrained_text=False,
            require_pretrained=fetched,
            force_preprocess_cfg=preprocess,
        )
    if spec.weights is not None:
        load_weights(model, spec.weights, spec.name)
    return OpenClip(model, name)


def adapt(model: nn.Module) -> OpenClip:
    """A model of open_clip that is already there. Its prompts are for the default tokenizer, which the module says."""
    return OpenClip(model, "")


def preprocessing_of(model: Any) -> dict[str, Any]:
    """The preprocessing that open_clip noted at the image tower, in timm's words; empty where there is none."""
    noted = getattr(model.visual, "preprocess_cfg", None)
    if not noted:
        return {}
    size = noted["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    mode = noted["resize_mode"]
    if mode == "longest":
        raise ModelError("the model's images are resized by their longer side and padded, which is not supported.")
    resize = (height, width) if mode == "squash" else min(height, width)
    if mode == "shortest" and height != width:
        raise ModelError(f"the model takes images of {height}×{width} cut from a square, which is not supported.")
    interpolation = "bilinear" if noted["interpolation"] == "bilinear" else "bicubic"
    return describe_preprocessing(
        (height, width), noted["mean"], noted["std"], resize=resize, interpolation=interpolation
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs to the root logger, which would then write to the terminal whatever anyone logs."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
