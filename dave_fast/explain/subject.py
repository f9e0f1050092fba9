"""The subject of an explanation: a model under DAVE, its preprocessing and the names of its classes."""

from __future__ import annotations

from typing import Any, NamedTuple

from PIL import Image
from torch import nn

from dave_fast.errors import InputError
from dave_fast.explain.explainer import DAVE
from dave_fast.images import Preprocessing
from dave_fast.models.labels import Labels, labels_of
from dave_fast.models.meaning import kind_of, require_classifier
from dave_fast.models.spec import ModelSpec


class Subject(NamedTuple):
    """A model with all that stands between a photograph and a named class.

    Attributes:
        explainer: the model under DAVE.
        prepare: the preprocessing, from a photograph to the model's input.
        labels: the names of the model's classes, as many as the model's output for a black image has scores; none where
            it is no scores (B, K).
    """

    explainer: DAVE
    prepare: Preprocessing
    labels: Labels

    @classmethod
    def of(cls, explainer: DAVE, *, classifier: bool = False) -> Subject:
        """Return an explainer with its model's preprocessing and class names.

        Args:
            explainer: of the model.
            classifier: whether to refuse a model without classes.

        Raises:
            InputError: the model takes other channels than those of a photograph, or has no classes.
            ModelError: the model cannot be run by the explainer.
        """
        model = explainer.model
        if classifier:
            require_classifier(model, explainer.model_name)
        prepare = explainer.prepare
        if kind_of(model) == "embedding":
            return cls(explainer, prepare, Labels(0))
        shape = explainer.output_shape(prepare.transform(Image.new("RGB", prepare.size[::-1]))[None])
        if len(shape) == 2:
            return cls(explainer, prepare, labels_of(model, shape[1]))
        if classifier:
            raise InputError(
                f"the output of {explainer.model_name} is {shape}; expected the scores of classes, (B, K)."
            )
        return cls(explainer, prepare, Labels(0))

    @classmethod
    def load(cls, model: str | ModelSpec | nn.Module, **settings: Any) -> Subject:
        """Load a classifier and return it as a subject.

        Args:
            model: anything that `DAVE` takes.
            settings: keywords of `DAVE`.

        Raises:
            DaveFastError: as `DAVE` and `of` do.
        """
        return cls.of(DAVE(model, **settings), classifier=True)
