"""What a model from another library looks like to the rest of dave-fast: a function of images alone.

An `Adapter` wraps a model whose forward takes or gives more than tensors. It says what its output means (`kind`), and
carries its preprocessing and class names where a timm model has them, in `pretrained_cfg` and `num_classes`, so that
`images.preprocessing` and `labels.labels_of` need no second way. A bare module or a timm model is no adapter;
`kind_of` knows it all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from dave_fast.errors import InputError

Kind = Literal["classifier", "embedding"]


class Adapter(nn.Module):
    """A model as images (B, 3, H, W), normalised, -> (B, K) logits or (B, D) embedding.

    As it is, for a bare module of that form to which preprocessing and class names are added; subclasses write
    `forward` for other forms. The wrapped model is only read.

    Attributes:
        kind: "classifier": the output is logits; "embedding": it is a feature vector, not normalised, and there is no
            predicted class.
        num_classes: K, 0 for embeddings.
        pretrained_cfg: preprocessing in timm's words (input_size, mean, std, interpolation, crop_pct, crop_mode), and
            the names of the classes as label_names; empty where neither is known. `images.describe_preprocessing`
            writes the first.
    """

    def __init__(
        self, model: nn.Module, *, kind: Kind, num_classes: int = 0, pretrained_cfg: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.kind: Kind = kind
        self.num_classes = num_classes
        self.pretrained_cfg: dict[str, Any] = dict(pretrained_cfg or {})

    def forward(self, images: Tensor) -> Tensor:
        """The wrapped model's output."""
        return self.model(images)


class LogitOfLikeness:
    """The scale and the bias of `TextImageModel` as CLIP and SigLIP keep them, for an Adapter of such a model."""

    model: Any

    @property
    def logit_scale(self) -> float:
        """What a cosine is multiplied by."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float:
        """What is added to it; 0 for models without one."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())


@runtime_checkable
class TextImageModel(Protocol):
    """An embedding model that was trained with texts (CLIP, SigLIP): what text prompts are answered with.

    The model's own score of image x and text t is logit_scale · ⟨x/‖x‖, t⟩ + logit_bias, x the model's output for the
    image, t = `text_embedding([text])[0]`, which has norm 1; CLIP takes a softmax of it over texts, SigLIP a sigmoid.
    """

    kind: Kind
    logit_scale: float
    logit_bias: float

    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """K texts -> (K, D) float32 of norm 1, on the model's device, without gradient.

        Through the model's own tokenizer, text tower and projection. Raises InputError for no text at all, and where
        the tokenizer cannot be had.
        """
        ...


def kind_of(model: nn.Module) -> Kind:
    """What the output of any module means: its own `kind`; "embedding" for timm models without a head."""
    kind = getattr(model, "kind", None)
    if kind in ("classifier", "embedding"):
        return kind
    return "embedding" if getattr(model, "num_classes", None) == 0 else "classifier"


def require_classifier(model: nn.Module, name: str) -> None:
    """Raise InputError for a model of embeddings where classes are explained."""
    if kind_of(model) == "embedding":
        raise InputError(
            f"{name} gives embeddings and has no classes. Explain a similarity (DAVE.explain with a callable as the "
            "target), or give a model with a head."
        )


def check_texts(texts: Sequence[str]) -> None:
    """Raise InputError for what is no list of texts."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"the texts are {texts!r}; expected a list of one or more texts that are not empty")
