"""dave-fast: fast, exact attribution maps for Vision Transformers (DAVE, arXiv 2602.06613)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dave_fast._version import __version__

if TYPE_CHECKING:
    from dave_fast import targets
    from dave_fast.explain.explainer import DAVE, Explanation, effective_gradient
    from dave_fast.explain.pipeline import pipeline
    from dave_fast.models.spec import ModelSpec
    from dave_fast.run.reader import open_maps

__all__ = ["DAVE", "Explanation", "ModelSpec", "__version__", "effective_gradient", "open_maps", "pipeline", "targets"]


def __getattr__(name: str) -> Any:
    # Torch and timm take seconds to import, which `dave-fast --help` does not need.
    if name in ("DAVE", "Explanation", "effective_gradient"):
        from dave_fast.explain import explainer

        return getattr(explainer, name)
    if name == "ModelSpec":
        from dave_fast.models.spec import ModelSpec

        return ModelSpec
    if name == "open_maps":
        from dave_fast.run.reader import open_maps

        return open_maps
    if name == "pipeline":
        from dave_fast.explain.pipeline import pipeline

        return pipeline
    if name == "targets":
        return importlib.import_module("dave_fast.targets")
    raise AttributeError(f"module 'dave_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
