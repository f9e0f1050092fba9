"""Modules of Hugging Face transformers as functions of images, whatever their classes are called.

A module is called by its own forward, with the images as `pixel_values` or as the first argument. What that returns
decides the rest. A tensor is the output. Of an object, a dictionary or a tuple the output is the first of `_OUTPUTS`,
otherwise the pooled features, the class token, or all tokens. A model with a text tower (CLIP, SigLIP) gives its
projected image embedding. Where several tensors could be the output, the model is refused.

The output is logits of classes where the class is one of transformers for image classification, and, for a class of
the user's, where it has `config.num_labels` numbers an image.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError, UnknownModelError, is_out_of_memory
from dave_fast.given.isolation import isolated
from dave_fast.images.preprocess import NOT_SUPPORTED
from dave_fast.models.adapter import Adapter, SimilarityLogit, check_texts
from dave_fast.models.hub import loading
from dave_fast.models.huggingface_files import NO_CODE, Place
from dave_fast.models.huggingface_images import preprocessing_of
from dave_fast.models.meaning import kind_of, link_of_problem

# names of the output, the first that is there is taken
_OUTPUTS = ("logits", "image_embeds", "predicted_depth", "reconstruction")
# arguments of models that take more than images, or other things
_NO_IMAGES = ("input_ids", "decoder_input_ids", "input_values", "input_features", "pixel_values_videos")
# last names of the parameters that are class tokens; tokens of models without one have no place for the whole image
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token", "cls_embedding")
# sides of the images on which a forward is tried where the configuration has none
_USUAL_SIZES = (224, 256, 384, 512, 336, 448, 128, 96, 64, 32)


class Transformers(Adapter):
    """A transformers model as images (B, 3, H, W) -> (B, K) logits, (B, D) embeddings, or an output (B, ...) of places.

    Position encodings are interpolated for images of another size than the configuration's, if the model supports it.

    Args:
        model: of transformers, or a subclass of its PreTrainedModel.
        values: settings of its image processor; None without one.
        place: repository or folder of its tokenizer.
        revision: branch, tag or commit of the repository.
        own_head: whether the head is surely that of the configuration. Otherwise one forward of a copy is tried, to
            see whether its output is logits of classes.

    Raises:
        ModelError: the model takes more than images.
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, Any] | None,
        place: str,
        revision: str,
        *,
        own_head: bool = False,
    ) -> None:
        config: Any = model.config
        super().__init__(model, kind="embedding", pretrained_cfg={} if values is None else _preprocessing(values))
        self.image_size = self.own_size = _size(config)
        self.place, self.revision = place, revision
        forward = self._image_side(self.model.forward)
        self.argument = _image_argument(forward, type(model).__name__)
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(forward).parameters
        last_names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        self.class_token = not last_names.isdisjoint(_CLASS_TOKENS)
        self.num_classes = self._count_classes(own_head)
        if self.num_classes:
            self.kind = "classifier"
            self.link = link_of_problem(config.problem_type)
        names = _names(config)
        # the names are not those of a head that was replaced
        if names is not None and (len(names) == self.num_classes if self.num_classes else _of_places(model)):
            self.pretrained_cfg["label_names"] = names

    def forward(self, images: Tensor) -> Tensor:
        """Return the module's output."""
        other = self.interpolates and tuple(images.shape[-2:]) != self.own_size
        call = self._image_side(self.model)
        settings: dict[str, Any] = {"interpolate_pos_encoding": True} if other else {}
        if _is_theirs(call.forward if isinstance(call, nn.Module) else call) and not self.model.config.return_dict:
            settings["return_dict"] = True
        if self.argument is None:
            return self._chosen(call(images, **settings))
        return self._chosen(call(**{self.argument: images}, **settings))

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
        """Return the method for projected image embeddings of a model with two towers, otherwise `whole`."""
        return self.model.get_image_features if has_two_towers(self.model) else whole

    def _count_classes(self, own_head: bool) -> int:
        """Return the number of classes that the output has logits of; 0 for other outputs."""
        # without its head a classifier's logits are features
        if kind_of(self.model) == "embedding":
            return 0
        forward = self.model.forward
        named = "ForImageClassification" in getattr(forward, "__qualname__", "")
        labels = int(self.model.config.num_labels)
        if _is_theirs(forward):
            if not named or has_two_towers(self.model):
                return 0
            if own_head:
                return labels
        output = self.tried()
        if output is None:
            return labels if named else 0
        return output.shape[1] if output.dim() == 2 and (named or output.shape[1] == labels) else 0

    def tried(self) -> Tensor | None:
        """Return the output (1, ...) of a copy for one random image; None if it cannot be tried."""
        known = self.own_size or self.pretrained_cfg.get("input_size", (None,))[1:]
        sizes = [tuple(known)] if known else [(side, side) for side in _USUAL_SIZES]
        convolutions = (each.in_channels for each in self.model.modules() if isinstance(each, nn.Conv2d))
        channels = getattr(self.model.config, "num_channels", None) or next(convolutions, 3)
        return next((output for size in sizes if (output := self._output_for(channels, *size)) is not None), None)

    @torch.no_grad()
    def _output_for(self, channels: int, height: int, width: int) -> Tensor | None:
        """Return the output (1, ...) of a copy for one random image of a size; None if it raises an error."""
        image = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        try:
            twin = isolated(self)
            with torch.random.fork_rng(devices=[]):
                return twin(image.to(next(self.model.parameters(), image)))
        # a model that does not take these images may take the user's; where it does not, the explanation says why
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None

    def _chosen(self, output: Any) -> Tensor:
        """Return the tensor that is explained of what the forward returned."""
        if isinstance(output, Tensor):
            return output
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            return self._of_tuple(output)
        fields = output if isinstance(output, Mapping) else _attributes(output)
        for name in _OUTPUTS:
            if isinstance(fields.get(name), Tensor):
                return fields[name]
        if isinstance(fields.get("last_hidden_state"), Tensor):
            return self._features(fields)
        maps = fields.get("feature_maps")
        found = maps if isinstance(maps, tuple | list) else [*fields.values()]
        return self._only(found, f"a {type(output).__name__} of {', '.join(map(str, fields)) or 'nothing'}")

    def _features(self, fields: Mapping[str, Any]) -> Tensor:
        """Return the pooled features, the class token, or all tokens."""
        pooled, tokens = fields.get("pooler_output"), fields["last_hidden_state"]
        # BERT's pooler, which some vision models have, is trained for another task, or not at all
        if pooled is not None and not hasattr(getattr(self.model, "pooler", None), "dense"):
            return pooled
        return tokens[:, 0] if tokens.dim() == 3 and self.class_token else tokens

    def _of_tuple(self, output: tuple[Any, ...]) -> Tensor:
        """Return the first tensor of a tuple of transformers, whose order is fixed; of others, the only candidate."""
        found = [each for each in output if _is_output(each)]
        if found and _is_theirs(self.model.forward):
            return found[0]
        logits = [each for each in found if each.dim() == 2 and each.shape[1] == self.model.config.num_labels]
        return self._only(logits if len(found) > 1 and logits else found, f"a tuple of {len(output)}")

    def _only(self, found: Sequence[Any], what: str) -> Tensor:
        """Return the only tensor that can be the output; raise ModelError if there is none, or if there are several."""
        tensors = [each for each in found if _is_output(each)]
        if len(tensors) == 1:
            return tensors[0]
        shapes = ", ".join(str(tuple(each.shape)) for each in tensors) or "none"
        raise ModelError(
            f"{type(self.model).__name__} returns {what}, in which the output to explain is not known (tensors: "
            f"{shapes}): give a module whose forward returns the one that you mean."
        )


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
        place = Place(self.place, self.revision, local=os.path.isdir(self.place))
        with loading(f"the tokenizer of {self.place}", remote=not place.local):
            # a tokenizer with code of its own is refused here
            place.read("tokenizer_config.json")
            return AutoTokenizer.from_pretrained(place.name, revision=place.at, **NO_CODE)

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


def _preprocessing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of an image processor, or why it is not supported, for whoever asks for it."""
    try:
        return preprocessing_of(values)
    except ModelError as error:
        return {NOT_SUPPORTED: str(error)}


def has_two_towers(model: nn.Module) -> bool:
    """Return whether a model embeds images and texts, and its forward needs both."""
    both = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    return both and "input_ids" in inspect.signature(model.forward).parameters


def _image_argument(forward: Callable[..., Any], name: str) -> str | None:
    """Return the keyword of the images, or None where they are the first argument; raise ModelError if neither."""
    kinds = inspect.Parameter
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.kind != kinds.VAR_KEYWORD]
    names = [p.name for p in parameters]
    images = "pixel_values" if "pixel_values" in names or not names else names[0]
    texts = [each for each in names if each in _NO_IMAGES and (_is_theirs(forward) or each == images)]
    needed = [p.name for p in parameters if p.name != images and p.default is p.empty and p.kind != p.VAR_POSITIONAL]
    if texts or needed:
        raise ModelError(
            f"{name} takes more than images, or none ({', '.join(texts or needed)}), and DAVE explains functions of "
            "images: give a module whose forward takes images alone and fills in the rest."
        )
    return images if images == "pixel_values" else None


def _of_places(model: nn.Module) -> bool:
    """Return whether a model of transformers gives classes at places: of pixels, or of detections."""
    named = getattr(model.forward, "__qualname__", "")
    return any(task in named for task in ("ForSemanticSegmentation", "ForObjectDetection"))


def _is_theirs(forward: Callable[..., Any]) -> bool:
    """Return whether a forward was written in transformers, not by the user."""
    return (getattr(forward, "__module__", None) or "").startswith("transformers.")


def _is_output(value: Any) -> bool:
    """Return whether a value may be an output: numbers of a batch, not the scalar of a loss."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _attributes(output: Any) -> dict[str, Any]:
    """Return the attributes of an object with results: of a named tuple, a data class, or any class."""
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    names = (*_OUTPUTS, *getattr(output, "__dict__", ()))
    return {name: getattr(output, name) for name in names if hasattr(output, name)}


def _names(config: Any) -> tuple[str, ...] | None:
    """Return the class names of a configuration; None for placeholders."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    if sorted(names) != list(range(config.num_labels)) or all(n == f"LABEL_{i}" for i, n in names.items()):
        return None
    return tuple(names[index] for index in range(config.num_labels))


def _size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else None
