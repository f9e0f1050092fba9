"""dave-fast: fast, exact attribution maps for Vision Transformers (DAVE, arXiv 2602.06613)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dave_fast._version import __version__

if TYPE_CHECKING:
    from dave_fast import targets
    from dave_fast.evaluate.comparison import Explainer, compare
    from dave_fast.explain.explainer import DAVE, Explanation, effective_gradient
    from dave_fast.explain.pipeline import pipeline
    from dave_fast.models.spec import ModelSpec
    from dave_fast.run.reader import open_maps

__all__ = [
    "DAVE",
    "Explainer",
    "Explanation",
    "ModelSpec",
    "__version__",
    "compare",
    "effective_gradient",
    "open_maps",
    "pipeline",
    "targets",
]


# Torch and timm take seconds to import, which `dave-fast --help` does not need.
_MODULES = {
    "DAVE": "dave_fast.explain.explainer",
    "Explanation": "dave_fast.explain.explainer",
    "Explainer": "dave_fast.evaluate.comparison",
    "compare": "dave_fast.evaluate.comparison",
    "ModelSpec": "dave_fast.models.spec",
    "effective_gradient": "dave_fast.explain.explainer",
    "open_maps": "dave_fast.run.reader",
    "pipeline": "dave_fast.explain.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "targets":
        return importlib.import_module("dave_fast.targets")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'dave_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
