"""Models of other libraries as functions of images.

An `Adapter` wraps a model whose forward takes or returns more than tensors. Its `kind` and `link` say what the output
means (`meaning`). It has its preprocessing and class names in the attributes of a timm model, `pretrained_cfg` and
`num_classes`, so that `images.preprocessing` and `labels.labels_of` read both alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.models.meaning import Kind
from dave_fast.models.spec import Link


class Adapter(nn.Module):
    """A module whose forward maps normalised images (B, 3, H, W) to logits (B, K) or embeddings (B, D).

    This class adds preprocessing and class names to a module whose forward has that form; subclasses override
    `forward` for other forms. The wrapped model is not changed.

    Attributes:
        kind: "classifier" if the output is logits; "embedding" if it is a feature vector, not normalised, and there is
            no predicted class.
        link: how a logit becomes a probability: "softmax" over exclusive classes, "sigmoid" for each class by itself
            (several labels, a single logit), None where there is none, as for a regression. A single logit is a sigmoid
            under "softmax", too; embeddings have none under either.
        num_classes: K; 0 for embeddings, and where it is not known.
        pretrained_cfg: preprocessing under timm's keys (input_size, mean, std, interpolation, crop_pct, crop_mode; see
            `images.describe_preprocessing`), and class names as label_names; empty where neither is known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: Kind,
        num_classes: int = 0,
        pretrained_cfg: Mapping[str, Any] | None = None,
        link: Link = "softmax",
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.kind: Kind = kind
        self.link: Link = link
        self.num_classes = num_classes
        self.pretrained_cfg: dict[str, Any] = dict(pretrained_cfg or {})

    def forward(self, images: Tensor) -> Tensor:
        """Return the wrapped model's output."""
        return self.model(images)


class SimilarityLogit:
    """A mixin for adapters of CLIP and SigLIP: the scale and the bias of `TextImageModel`."""

    model: Any

    @property
    def logit_scale(self) -> float:
        """Factor of the cosine."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float:
        """Summand of the scaled cosine; 0 for models without one."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())


@runtime_checkable
class TextImageModel(Protocol):
    """An embedding model with a text tower (CLIP, SigLIP).

    Its score of an image and a text is logit_scale · ⟨x/‖x‖, t⟩ + logit_bias, with x the model's output for the image
    and t = `text_embedding([text])[0]`, which has norm 1. CLIP takes a softmax of it over texts, SigLIP a sigmoid.

    Attributes:
        kind: "embedding".
        logit_scale: factor of the cosine.
        logit_bias: summand.
    """

    kind: Kind
    logit_scale: float
    logit_bias: float

    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """Embed texts by the model's own tokenizer, text tower and projection.

        Returns:
            (texts, D) float32 of norm 1, on the model's device, without gradient.

        Raises:
            InputError: no text is given, or one is empty.
            UnknownModelError: the tokenizer cannot be loaded.
        """
        ...


def check_texts(texts: Sequence[str]) -> None:
    """Raise InputError unless this is a list of one or more texts that are not empty."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"the texts are {texts!r}; expected a list of one or more texts that are not empty")
