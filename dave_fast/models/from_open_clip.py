"""Models of open_clip: the image tower as an embedding, the text tower for prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError, UnknownModelError, suggestion
from dave_fast.images import describe_preprocessing
from dave_fast.models.adapter import Adapter, SimilarityLogit, check_texts
from dave_fast.models.hub import loading
from dave_fast.models.huggingface_files import Place, no_code
from dave_fast.models.limits import limited_memory
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights


class OpenClip(SimilarityLogit, Adapter):
    """An open_clip model as images (B, 3, H, W) -> (B, D) projected embeddings, not normalised.

    Args:
        model: of open_clip.
        name: for `open_clip.get_tokenizer`.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model, kind="embedding", pretrained_cfg=preprocessing_of(model))
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        """Return `encode_image` without its normalisation."""
        return self.model.encode_image(images, normalize=False)

    @torch.no_grad()
    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """See `TextImageModel`."""
        import open_clip

        check_texts(texts)
        with loading(self.name, remote=True), no_code(self.name), _quiet():
            tokens = open_clip.get_tokenizer(self.name)(list(texts))
        device = next(self.model.parameters()).device
        return self.model.encode_text(tokens.to(device), normalize=True).float()


def load(name: str, spec: ModelSpec) -> OpenClip:
    """Load the model of NAME or NAME:TAG.

    Raises:
        UnknownModelError: there is no such model or tag, or it cannot be fetched.
        InputError: the spec has classes or an image size, or weights that do not fit.
    """
    import open_clip

    architecture, _, tag = name.partition(":")
    with _quiet():
        known = open_clip.get_model_config(architecture)
    if known is None:
        hint = suggestion(architecture, open_clip.list_models(), "open_clip.list_models()")
        raise UnknownModelError(f"open_clip has no model {architecture!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UnknownModelError(f"{architecture} has no weights {tag!r}; it has {', '.join(tags) or 'none'}.")
    if spec.pretrained and not tag:
        raise UnknownModelError(
            f"{spec.name!r} does not say which weights; there are {', '.join(tags) or 'none'}: write "
            f"open_clip:{architecture}:{(tags or ['TAG'])[0]}."
        )
    preprocess = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    return create(architecture, spec, preprocess, pretrained=tag if spec.pretrained else None, remote=spec.pretrained)


def create(name: str, spec: ModelSpec, preprocess: dict[str, Any], *, pretrained: str | None, remote: bool) -> OpenClip:
    """Create the model of any name that `open_clip.create_model` takes.

    Args:
        name: for `open_clip.create_model`.
        spec: of the model.
        preprocess: settings of its preprocessing, empty for the default.
        pretrained: tag of its weights, or None.
        remote: whether the hub is needed.

    Raises:
        UnknownModelError: the model cannot be loaded.
        InputError: the spec has classes or an image size, or weights that do not fit.
    """
    import open_clip

    if spec.num_classes is not None:
        raise InputError(f"{spec.name} gives embeddings and has no classes: leave num_classes out.")
    if spec.image_size is not None:
        raise InputError(f"{spec.name} takes images of its own size: leave image_size out.")
    with (
        loading(spec.name, remote=remote),
        no_code(spec.name),
        limited_memory(Place.folder_of(name), spec.weights),
        _quiet(),
    ):
        model = open_clip.create_model(
            name,
            pretrained,
            load_weights=spec.pretrained,
            pretrained_text=False,
            require_pretrained=spec.pretrained,
            weights_only=True,
            force_preprocess_cfg=preprocess,
        )
    if spec.weights is not None:
        load_weights(model, spec.weights, spec.name)
    return OpenClip(model, name)


def adapt(model: nn.Module) -> OpenClip:
    """Wrap a module of open_clip; its prompts go through open_clip's default tokenizer."""
    return OpenClip(model, "")


def preprocessing_of(model: Any) -> dict[str, Any]:
    """Return the preprocessing noted at open_clip's image tower under timm's keys; empty without one."""
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
        raise ModelError(f"the model's images of {height}×{width} are cut from a square, which is not supported.")
    interpolation = "bilinear" if noted["interpolation"] == "bilinear" else "bicubic"
    return describe_preprocessing(
        (height, width), noted["mean"], noted["std"], resize=resize, interpolation=interpolation
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's use of the root logger from installing a handler that prints all later log messages."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
