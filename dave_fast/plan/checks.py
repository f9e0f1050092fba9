"""Whether a model's modules are their classes' own code: what prevents a plan in any library.

A plan follows the forward that the library defines, as it is in evaluation mode: dropout and stochastic depth are then
the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import nn

from dave_fast.given.isolation import GLOBAL_HOOKS, HOOKS
from dave_fast.plan.installed import is_installed, is_library, replaced
from dave_fast.plan.reading import NoPlanError

# modules that are the identity in evaluation mode, and the table of an adapter's, which cannot be called
_INERT = (nn.Identity, nn.Dropout, nn.ModuleDict)
# of the classes of libraries, parts of the names of those that are
_INERT_NAMES = ("DropPath", "PatchDropout")
# hooks that only keep outputs, for callers who ask for hidden states
_KEEPS_OUTPUTS = "transformers.utils.output_capturing"


def check_modules(model: nn.Module) -> None:
    """Raise NoPlanError where code was patched, or where something else stands in the place of a dropout."""
    if any(vars(nn.modules.module).get(name) for name in GLOBAL_HOOKS):
        raise NoPlanError("hooks of all modules are registered (torch.nn.modules.module.register_module_...)")
    for name, module in model.named_modules():
        where = f"module '{name or type(model).__name__}'"
        if any(_acts(vars(module).get(hooks) or {}) for hooks in HOOKS):
            raise NoPlanError(f"{where} carries hooks")
        if hasattr(module, "parametrizations"):
            raise NoPlanError(f"{where} computes its weights (parametrizations)")
        shadowing = next((key for key in vars(module) if _is_code(getattr(type(module), key, None))), None)
        if shadowing is not None:
            raise NoPlanError(f"{where} has a {shadowing} of its own in place of that of its class")
        if "drop" in name.rpartition(".")[2] and not _is_inert(type(module)):
            raise NoPlanError(f"a {type(module).__name__} stands at '{name}'")
    for kind in {type(module): None for module in model.modules()}:
        found = replaced(kind)
        if found is not None:
            raise NoPlanError(f"{found} is not the one that was installed")


def _acts(hooks: Mapping[int, Any]) -> bool:
    """Return whether one of the hooks may change what a module returns."""
    return not all(
        isinstance(hook, FunctionType) and hook.__module__ == _KEEPS_OUTPUTS and is_installed(hook)
        for hook in hooks.values()
    )


def _is_code(member: object) -> bool:
    return callable(member) or isinstance(member, property)


def _is_inert(kind: type[nn.Module]) -> bool:
    return kind in _INERT or (is_library(kind) and any(name in kind.__name__ for name in _INERT_NAMES))
