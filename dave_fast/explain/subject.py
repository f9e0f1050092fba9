"""The subject of an explanation: a model under DAVE, its preprocessing and the names of its classes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from dave_fast.explain.explainer import DAVE
from dave_fast.images import Preprocessing, preprocessing
from dave_fast.models.labels import Labels, labels_of
from dave_fast.models.meaning import require_classifier
from dave_fast.models.spec import ModelSpec


class Subject(NamedTuple):
    """A model with all that stands between a photograph and a named class.

    Attributes:
        explainer: the model under DAVE.
        prepare: the preprocessing, from a photograph to the model's input.
        labels: the names of the model's classes.
    """

    explainer: DAVE
    prepare: Preprocessing
    labels: Labels

    @classmethod
    def of(cls, explainer: DAVE) -> Subject:
        """Return an explainer with its model's preprocessing and class names.

        Raises:
            InputError: the model takes other channels than those of a photograph.
        """
        return cls(explainer, preprocessing(explainer.model), labels_of(explainer.model))

    @classmethod
    def load(cls, model: str | ModelSpec | nn.Module, **settings: Any) -> Subject:
        """Load a classifier and return it as a subject.

        Args:
            model: anything that `DAVE` takes.
            settings: keywords of `DAVE`.

        Raises:
            InputError: the model has no classes, or takes other channels than those of a photograph; and all that
                `DAVE` raises.
        """
        explainer = DAVE(model, **settings)
        require_classifier(explainer.model, explainer.model_name)
        return cls.of(explainer)
