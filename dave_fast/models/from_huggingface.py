"""Models of Hugging Face transformers: classifiers by their logits, others by their pooled embedding.

The configuration's `architectures` decide: ...ForImageClassification is a classifier; a model with a text tower
(CLIP, SigLIP) gives the projected image embedding and embeds prompts; any other gives its pooled output, or its class
token. Attention is PyTorch's own ("sdpa", else "eager"), whose operators the frozen route can intercept.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError, UnknownModelError
from dave_fast.images import describe_preprocessing
from dave_fast.models import from_open_clip, from_timm
from dave_fast.models.adapter import Adapter, SimilarityLogit, check_texts
from dave_fast.models.hub import loading
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import check_fit, read_weights

SEEN_ATTENTION = (None, "sdpa", "eager")
# BERT's pooler, which some vision models have; it is trained for another task, or not at all
_POOLERS = ("pooler.dense.weight", "pooler.dense.bias")


class Transformers(Adapter):
    """A transformers model as images (B, 3, H, W) -> (B, K) logits or (B, D) embeddings.

    Position encodings are interpolated for images of another size than the configuration's, if the model supports it.

    Args:
        model: of transformers.
        values: settings of its image processor; None without one.
        place: repository or folder of its tokenizer.
        revision: branch, tag or commit of the repository.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Any] | None, place: str, revision: str) -> None:
        config: Any = model.config
        classifier = "ForImageClassification" in type(model).__name__
        names = _names(config) if classifier else None
        super().__init__(
            model,
            kind="classifier" if classifier else "embedding",
            num_classes=config.num_labels if classifier else 0,
            pretrained_cfg=({} if values is None else preprocessing_of(values))
            | ({} if names is None else {"label_names": names}),
        )
        self.image_size = self.own_size = _size(config)
        self.place, self.revision = place, revision
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self._image_side(model.forward)).parameters

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or the pooled output, or the class token."""
        other = self.interpolates and tuple(images.shape[-2:]) != self.own_size
        call = self._image_side(self.model)
        output = call(pixel_values=images, **({"interpolate_pos_encoding": True} if other else {}))
        # transformers before version 5 returns the projected embedding itself
        if isinstance(output, Tensor):
            return output
        if self.kind == "classifier":
            return output.logits
        pooled = output.get("pooler_output")
        if pooled is None or hasattr(getattr(self.model, "pooler", None), "dense"):
            return output.last_hidden_state[:, 0]
        return pooled

    def prepare_for(self, size: tuple[int, int]) -> None:
        """Set the size (H, W) that images are prepared at; raise InputError if the model takes only its own."""
        # these take images of any size although their forward has no argument for it
        flexible = self.interpolates or self.model.config.model_type.startswith(("dino", "swin"))
        if not flexible and self.own_size not in (None, size):
            raise InputError(f"{type(self.model).__name__} takes images of {self.own_size}: leave image_size out.")
        self.image_size = size
        if "input_size" in self.pretrained_cfg:
            self.pretrained_cfg["input_size"] = (3, *size)

    def _image_side(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method for projected image embeddings of a model with a text tower, otherwise `whole`."""
        return getattr(self.model, "get_image_features", whole)


class TransformersTextImage(SimilarityLogit, Transformers):
    """A transformers model with a text tower (CLIP, SigLIP): see `dave_fast.models.adapter.TextImageModel`."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer; raises UnknownModelError if it cannot be loaded."""
        from transformers import AutoTokenizer

        if not self.place:
            raise UnknownModelError(
                "the place of the model's tokenizer is not known: load the model by name, as hf:ORG/NAME."
            )
        remote = not os.path.isdir(self.place)
        with loading(f"the tokenizer of {self.place}", remote=remote):
            return AutoTokenizer.from_pretrained(self.place, revision=self.revision)

    @torch.no_grad()
    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """See `TextImageModel`."""
        check_texts(texts)
        # SigLIP was trained with texts padded to its full length
        config = self.model.config
        padding = "max_length" if config.model_type.startswith("siglip") else True
        length = config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=padding, max_length=length, truncation=True, return_tensors="pt"
        ).to(next(self.model.parameters()).device)
        features = self.model.get_text_features(**tokens)
        features = features if isinstance(features, Tensor) else features.pooler_output
        return nn.functional.normalize(features.float(), dim=-1)


def load(name: str, spec: ModelSpec) -> nn.Module:
    """Load a model of transformers, timm or open_clip from the hub or from a folder.

    Raises:
        UnknownModelError: there is no such model, or it cannot be fetched.
        InputError: weights, classes or size of the spec do not fit.
        ModelError: the model is not supported.
    """
    local = name.startswith((".", "~", os.sep)) or os.path.isdir(name)
    place, _, revision = (os.path.expanduser(name), "", "") if local else name.partition("@")
    if local and not os.path.isdir(place):
        raise UnknownModelError(
            f"{spec.name!r}: there is no folder {place}; give one that save_pretrained wrote, or hf:ORG/NAME."
        )
    with loading(spec.name, remote=not local):
        config = _read_config(place, revision or "main", local)
    if config is None:
        raise UnknownModelError(
            f"{spec.name!r} has neither config.json nor open_clip_config.json, so its architecture is not known. "
            "For a file of weights alone name the architecture, and give the file as its weights (--weights FILE)."
        )
    suffix = f"@{revision}" if revision else ""
    scheme = f"local-dir:{place}" if local else f"hf-hub:{place}{suffix}"
    if "model_cfg" in config:
        return from_open_clip.create(scheme, spec, {}, pretrained=None, remote=not local)
    if "architecture" in config:
        return from_timm.create(scheme, spec, remote=not local)
    return _load(place, revision or "main", spec, local)


def _read_config(place: str, revision: str, local: bool) -> dict[str, Any] | None:
    """Read the model's configuration; None without one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in ("config.json", "open_clip_config.json"):
        try:
            path = Path(place, file) if local else hf_hub_download(place, file, revision=revision)
            return dict(json.loads(Path(path).read_bytes()))
        except LocalEntryNotFoundError:
            raise
        except (FileNotFoundError, EntryNotFoundError):
            continue
    return None


def _load(place: str, revision: str, spec: ModelSpec, local: bool) -> nn.Module:
    """Load a model of transformers."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    with loading(spec.name, remote=not local), _without_bars():
        heads = {} if spec.num_classes is None else {"num_labels": spec.num_classes}
        config = AutoConfig.from_pretrained(place, revision=revision, **heads)
        if config.model_type == "siglip2":
            raise ModelError(f"{spec.name} takes patches of images of any shape (NaFlex), which is not supported.")
        architecture = (config.architectures or [""])[0]
        classifier = "ForImageClassification" in architecture or spec.num_classes is not None
        auto: Any = AutoModelForImageClassification if classifier else AutoModel
        model = _with_weights(auto, config, place, revision, spec)
        values = _processor(place, revision, local_files_only=False)
    adapter = _adapter(model, values, place, revision)
    if spec.image_size is not None:
        adapter.prepare_for((spec.image_size, spec.image_size))
    return adapter


def _with_weights(auto: Any, config: Any, place: str, revision: str, spec: ModelSpec) -> nn.Module:
    """Build the module of a configuration with the weights of the spec; raise InputError if any does not fit."""
    if spec.random_weights:
        return _with_known_attention(partial(auto.from_config, config, dtype=torch.float32))
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    where = spec.weights or place
    if spec.weights is None:
        build = partial(auto.from_pretrained, place, revision=revision)
    else:
        # from_pretrained renames parameters of earlier versions, as it does for a folder
        build = partial(type(auto.from_config(config)).from_pretrained, None, state_dict=read_weights(where))
    try:
        model, info = _with_known_attention(partial(build, **settings))
    except RuntimeError as error:
        if spec.weights is None:
            raise
        raise InputError(
            f"the weights in {where} do not fit {spec.name}: {' '.join(str(error).split())[:400]}"
        ) from error
    missing = [key for key in info["missing_keys"] if not key.endswith(_POOLERS)]
    other = [str(key) for key in info.get("mismatched_keys", ())]
    check_fit(where, spec.name, missing, info["unexpected_keys"] if spec.weights else (), other)
    return model


def _with_known_attention(build: Callable[..., Any]) -> Any:
    """Build with an attention whose operators the frozen route can intercept."""
    try:
        return build(attn_implementation="sdpa")
    except ValueError as error:
        if "attention" not in str(error):
            raise
        return build(attn_implementation="eager")


def adapt(model: nn.Module) -> Transformers:
    """Wrap a module of transformers, with the image processor from the place that it was loaded from.

    Raises:
        ModelError: the frozen route cannot intercept the operators of the module's attention.
    """
    config: Any = model.config
    used = {getattr(c, "_attn_implementation", None) for c in (config, getattr(config, "vision_config", config))}
    if not used.issubset(SEEN_ATTENTION):
        raise ModelError(
            f"the model's attention is {', '.join(sorted(map(str, used)))}, whose operators cannot be held constant: "
            'load it with attn_implementation="sdpa".'
        )
    place = getattr(config, "name_or_path", "") or ""
    return _adapter(model, _processor(place, "main", local_files_only=True) if place else None, place, "main")


def _adapter(model: nn.Module, values: Mapping[str, Any] | None, place: str, revision: str) -> Transformers:
    two_towers = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    return (TransformersTextImage if two_towers else Transformers)(model, values, place, revision)


def _processor(place: str, revision: str, *, local_files_only: bool) -> dict[str, Any] | None:
    """Return the settings of the image processor; None without one."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(place, revision=revision, local_files_only=local_files_only)
    except OSError:
        return None
    return dict(processor.to_dict())


def preprocessing_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an image processor under timm's keys.

    Raises:
        ModelError: it has a step that timm has no key for.
    """
    for step, value in (("do_rescale", False), ("do_resize", False), ("do_pad", True)):
        if values.get(step) is value:
            raise _unsupported(f"{step}={value}")
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise _unsupported(f"rescale_factor={values['rescale_factor']}")
    normalised = values.get("do_normalize", True)
    mean = values["image_mean"] if normalised else (0.0, 0.0, 0.0)
    std = values["image_std"] if normalised else (1.0, 1.0, 1.0)
    resize, crop = _resize(values["size"], values.get("crop_pct"))
    if crop is None and values.get("do_center_crop"):
        size = values["crop_size"]
        crop = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    if crop is None:
        if isinstance(resize, int):
            raise _unsupported(f"images that keep their shape (size={values['size']} without a crop)")
        crop = resize
    interpolation = Resampling(values.get("resample", 3)).name.lower()
    return describe_preprocessing(crop, mean, std, resize=resize, interpolation=interpolation, crop_floor=True)


def _resize(size: Any, crop_pct: float | None) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
    """Return the size to resize to (the shorter side, or both), and the crop that it implies, or None."""
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if "height" in size:
        return (int(size["height"]), int(size["width"])), None
    if "shortest_edge" not in size or size.get("longest_edge"):
        raise _unsupported(f"size={dict(size)}")
    edge = int(size["shortest_edge"])
    if crop_pct is None:
        return edge, None
    # as ConvNeXt does: below 384 pixels a crop of a larger image, otherwise resized without keeping the aspect ratio
    return (int(edge / crop_pct), (edge, edge)) if edge < 384 else ((edge, edge), (edge, edge))


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"the model's image processor has {what}, which is not supported: prepare the images by it, and give them to "
        "DAVE.explain in Python."
    )


def _names(config: Any) -> tuple[str, ...] | None:
    """Return the class names of a configuration; None for placeholders."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    if sorted(names) != list(range(config.num_labels)) or all(n == f"LABEL_{i}" for i, n in names.items()):
        return None
    return tuple(names[index] for index in range(config.num_labels))


def _size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switch off the progress bar for reading weights; those of downloads stay."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
