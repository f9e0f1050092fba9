"""Whether the classes of a model are still the code that was installed.

A plan follows the forward that a library defines. A method that somebody has replaced in the class (a patch for another
attention, a fix copied from a forum) is another model of the same name. Each method of a class, and each function of
its module that the method calls, is compared with the code object that its source file compiles to, which Python's
import system has in its cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional

# by which a module of PyTorch's is called; other libraries replace others, for loading and printing
_CALLS = frozenset({"__call__", "_wrapped_call_impl", "_call_impl", "forward", "_conv_forward", "__getattr__"})
# the libraries whose models have plans: their functions are followed into those that they call
LIBRARIES = frozenset({"timm", "transformers", "torchvision", "open_clip"})
# packages whose functions are called by theirs; the standard library's as well
PACKAGES = LIBRARIES | {"torch", "numpy", "einops", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
# modules of transformers whose classes are models and their parts; others are base classes that load and print, too
_PARTS = ("transformers.models.", "transformers.activations")


def replaced(cls: type) -> str | None:
    """Return the name of a method of a class, or of a function that it calls, that is not the installed one, or None.

    Classes outside of the libraries and torch are other models to begin with, and are not compared.
    """
    for owner in cls.__mro__:
        package = owner.__module__.partition(".")[0]
        known = _methods(owner) if package in LIBRARIES or package == "torch" else None
        if known is None:
            continue
        whole = package in LIBRARIES and (package != "transformers" or owner.__module__.startswith(_PARTS))
        for name, member in vars(owner).items():
            if name == "__init__" or (not whole and name not in _CALLS):
                continue
            functions = _functions(member)
            if not all(_is_of(function, name, owner, known) for function in functions):
                return f"{owner.__name__}.{name}"
            if name in known and not functions and not isinstance(member, type):
                return f"{owner.__name__}.{name}"
            found = next(filter(None, map(replaced_by_name, functions)), None)
            if found is not None:
                return f"{found}, which {owner.__name__}.{name} calls,"
    return None


def is_library(kind: type) -> bool:
    """Return whether a class was defined in one of the libraries."""
    return kind.__module__.partition(".")[0] in LIBRARIES


def _functions(member: Any) -> list[FunctionType]:
    """Return the Python functions of a member of a class: of a method, a static or class method, or a property."""
    inner = [getattr(member, name, None) for name in ("__func__", "fget", "fset", "fdel")]
    return [function for function in (member, *inner) if isinstance(function, FunctionType)]


def _is_of(function: FunctionType, name: str, owner: type, known: dict[str, list[CodeType]]) -> bool:
    """Return whether a function is what the body of a class has under a name.

    A body may also give a function of its module another name, and decorate methods: a forward by the library's own
    decorators alone.
    """
    if function.__code__ in known.get(name, ()):
        return True
    if name not in known:
        return function.__globals__.get("__name__") == owner.__module__ and is_installed(function)
    inner = getattr(function, "__wrapped__", None)
    own = _package(function) == owner.__module__.partition(".")[0]
    if not isinstance(inner, FunctionType) or not (own or "forward" not in name) or not is_installed(function):
        return False
    return _is_of(inner, name, owner, known)


def replaced_by_name(function: FunctionType, seen: set[int] | None = None) -> str | None:
    """Return the name of a function that this one calls by a global name, and that is not the installed one, or None.

    Functions of the libraries are followed into those that they call, decorators into what they decorate.
    """
    seen = set() if seen is None else seen
    for name, value in _called(function):
        if isinstance(value, FunctionType):
            package = _package(value)
            if package not in PACKAGES or not is_installed(value):
                return name
            if package in LIBRARIES and id(value) not in seen:
                seen.add(id(value))
                found = replaced_by_name(value, seen)
                if found is not None:
                    return found
        elif isinstance(value, BuiltinFunctionType) and name.startswith("torch.nn.functional."):
            # its own name differs in underscores, as log_sigmoid's does
            same = value.__name__.replace("_", "") == name.rpartition(".")[2].replace("_", "")
            homes = (torch, torch._C._nn, torch._C)
            if not same or all(getattr(home, value.__name__, None) is not value for home in homes):
                return name
    inner = getattr(function, "__wrapped__", None)
    return replaced_by_name(inner, seen) if isinstance(inner, FunctionType) else None


def _called(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the functions that a function's code names: globals, and those of torch.nn.functional."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        inner = vars(torch.nn.functional).get(name)
        if value is not None:
            yield name, value
        elif inner is not None:
            yield f"torch.nn.functional.{name}", inner


def _package(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__")).partition(".")[0]


def is_installed(function: FunctionType) -> bool:
    """Return whether a function's code is that of the module that it was defined in."""
    known = _codes(str(function.__globals__.get("__name__")))
    return known is None or function.__code__ in known.get(function.__code__.co_name, ())


def _methods(owner: type) -> dict[str, list[CodeType]] | None:
    """Return the code objects in the body of a class by name, or None where its source is not known."""
    module = _module_code(owner.__module__)
    if module is None:
        return None
    bodies = [module]
    for part in owner.__qualname__.split("."):
        bodies = [code for body in bodies for code in _inner(body) if code.co_name == part]
    found: dict[str, list[CodeType]] = {}
    for body in bodies:
        for code in _inner(body):
            found.setdefault(code.co_name, []).append(code)
    return found


@lru_cache(maxsize=256)
def _codes(module: str) -> dict[str, list[CodeType]] | None:
    """Return all code objects of a module by name, or None where its source is not known."""
    top = _module_code(module)
    if top is None:
        return None
    found: dict[str, list[CodeType]] = {}
    pending = [top]
    while pending:
        code = pending.pop()
        found.setdefault(code.co_name, []).append(code)
        pending += _inner(code)
    return found


@lru_cache(maxsize=256)
def _module_code(name: str) -> CodeType | None:
    """Return the code object that a module's file compiles to, or None for a module without a file."""
    loader: Any = getattr(getattr(sys.modules.get(name), "__spec__", None), "loader", None)
    return loader.get_code(name) if hasattr(loader, "get_code") else None


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
