"""The class names of a model, at a short address: `from dave_fast.labels import labels_of`."""

from dave_fast.models.labels import Labels, labels_of

__all__ = ["Labels", "labels_of"]
