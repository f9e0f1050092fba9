"""The families of models that the engine makes plans for: one table, one reader each."""

from __future__ import annotations

from torch import nn

from dave_fast.plan import timm_beit, timm_eva, timm_relpos, timm_vit
from dave_fast.plan.reading import Family, NoPlanError, Reading

FAMILIES: tuple[Family, ...] = (timm_vit.FAMILY, timm_eva.FAMILY, timm_beit.FAMILY, timm_relpos.FAMILY)


def family_of(model: nn.Module) -> Family:
    """The family of a model; raises NoPlanError where it has none."""
    family = next((f for f in FAMILIES if type(model) in f.classes), None)
    if family is None:
        known = ", ".join(c.__name__ for f in FAMILIES for c in f.classes)
        raise NoPlanError(f"{type(model).__name__} is not timm's {known}")
    return family


def read(model: nn.Module, size: tuple[int, int] | None = None) -> Reading:
    """The neutral form of a model for images (H, W), by default those it was built for; raises NoPlanError."""
    return family_of(model).read(model, size)
