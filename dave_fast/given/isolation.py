"""Independent copies of modules, so that a caller's model is read and never run.

A model's forward may keep attention maps, count its calls or write into buffers. Whatever dave-fast runs is therefore a
copy that shares no tensor with the model: `isolated` is the one conversion by which the proof, the frozen route, the
engine's tail and the comparison with the model's own output get theirs.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from operator import is_not
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from dave_fast.errors import ModelError, is_out_of_memory, reason_of

_CONTAINERS = (list, set, dict, OrderedDict, defaultdict)
_COMPLEX = {torch.float64: torch.complex128}
# attributes that a copy is better without: compiled code, and torch.export's methods that refuse to leave training mode
_NOT_KEPT = {"_compiled_call_impl", "train", "eval"}
# the tables of a module's hooks, and those of the hooks of all modules in torch.nn.modules.module
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple("_global" + table for table in HOOKS)
# those of the forward pass, and which of these hooks take keywords or are always called
_FORWARD_HOOKS = (
    *HOOKS[:2],
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
# libraries whose objects on a model train it
_TRAINERS = ("lightning", "pytorch_lightning", "accelerate")
# attributes by which timm, transformers and others switch activation checkpointing on
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp")


def isolated(model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
    """Return a copy of a model in evaluation mode that shares no tensor with it.

    Tensors are copied wherever the model keeps them: parameters, buffers, plain attributes, those inside of lists and
    objects, and those that functions set on modules have in their closures; such functions call the copy's modules.
    Tables that know a module by its id or by a weak reference know the copy's.
    None of the copies requires a gradient or has a graph. Attributes that cannot be copied, such as locks and
    generators, are shared, and so are data sets, optimisers and trainers. Activation checkpointing, which only costs
    time without training, is switched off.

    Args:
        model: any module.
        dtype: of floating-point tensors; complex tensors get the complex dtype of at least its precision, and keep
            their imaginary part. None keeps each tensor's own.
        device: of all tensors; None keeps each tensor's own.

    Raises:
        ModelError: the model cannot be copied.
    """
    conversion = _Conversion(dtype, device, model)
    with torch.inference_mode(False), torch.no_grad():
        try:
            kept = {id(value): value for value in _training(model)}
            try:
                made = conversion.deepcopy(model, {**kept})
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                made = conversion.deepcopy(model, kept | {id(value): value for value in _uncopyable(model)})
            _complete(model, made, conversion)
            conversion.follow()
            made.eval().requires_grad_(False)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {reason_of(error)}"
            raise ModelError(
                f"{class_name(model)} cannot be copied, and it is explained by a copy so that it is not changed: "
                f"{why}. Give a model that copy.deepcopy can copy"
            ) from error
    return _uncompiled(made)


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return a model with the modules that torch.compile wraps in their wrappers' place: its graphs hide operators."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _is_compiled(child):
                module.register_module(name, child._orig_mod)
    return model._orig_mod if _is_compiled(model) else model


def is_untouched(module: nn.Module) -> bool:
    """Return whether a module has no hooks, and the forward of its class or the one that torch.compile gave it."""
    own = vars(module)
    forward = own.get("forward")
    replaced = forward is not None and not (_is_compiled(module) and hasattr(forward, "_torchdynamo_orig_callable"))
    return not replaced and not any(own.get(table) for table in HOOKS)


def _is_compiled(module: nn.Module) -> TypeGuard[Any]:
    """Return whether a module is a wrapper of torch.compile, whose library is not imported before it is used."""
    return type(module) is getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)


class _Conversion(TorchFunctionMode):
    """A mode in which `copy.deepcopy` detaches and converts every tensor.

    Attributes:
        memo: that of copy.deepcopy: id of what was copied -> copy.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None, model: nn.Module | None = None) -> None:
        super().__init__()
        self._dtype, self._device = dtype, device
        self.memo: dict[int, Any] = {}
        known = () if model is None else (*model.modules(), *model.parameters(), *model.buffers())
        self._ids = {id(each) for each in known}
        self._read_by_methods = set() if model is None else set(map(id, _globals_of_methods(model)))

    def deepcopy(self, value: Any, memo: dict[int, Any] | None = None) -> Any:
        """Return a copy of anything; what `memo` has is taken from there."""
        self.memo = {} if memo is None else memo
        with self:
            return copy.deepcopy(value, self.memo)

    def rebound(self, value: Any) -> Any:
        """Return a function or bound method that refers to copies where it referred to modules and tensors."""
        if id(value) in self.memo or isinstance(value, nn.Module):
            return self.memo.get(id(value), value)
        if type(value) in (int, weakref.ref, weakref.WeakMethod):
            return self._followed(value)
        if isinstance(value, Tensor):
            return self.memo.setdefault(id(value), self._converted(value))
        if isinstance(value, MethodType):
            return MethodType(self.rebound(value.__func__), self.rebound(value.__self__))
        if isinstance(value, BuiltinFunctionType) and type(value.__self__) in _CONTAINERS:
            return getattr(self.rebound(value.__self__), value.__name__)
        if isinstance(value, partial):
            return partial(self.rebound(value.func), *map(self.rebound, value.args), **self._values(value.keywords))
        if type(value) in (tuple, frozenset):
            return type(value)(map(self.rebound, value))
        if type(value) in _CONTAINERS:
            return self._container(value)
        return self._function(value) if isinstance(value, FunctionType) else value

    def _container(self, value: Any) -> Any:
        """Return a copy of a list, set or dictionary, one for all functions that have it."""
        # ahead of what it holds: a container may hold itself
        made = self.memo[id(value)] = copy.copy(value)
        made.clear()
        if isinstance(value, dict):
            made.update((self.rebound(key), self.rebound(each)) for key, each in value.items())
        elif isinstance(value, list):
            # a list may be as long as a data set
            made.extend([each if type(each) in (str, float) else self.rebound(each) for each in value])
        else:
            made.update(map(self.rebound, value))
        return made

    def _followed(self, value: Any) -> Any:
        """Return the id of a copy for that of a module or tensor, and a weak reference to a copy for one to either."""
        if type(value) is int and value in self._ids and value in self.memo:
            return id(self.memo[value])
        if type(value) is weakref.ref and id(value()) in self.memo:
            return weakref.ref(self.memo[id(value())])
        if type(value) is weakref.WeakMethod and (method := value()) and id(method.__self__) in self.memo:
            return weakref.WeakMethod(MethodType(method.__func__, self.memo[id(method.__self__)]))
        return value

    def _held(self, value: Any, function: FunctionType) -> Any:
        """Return what a function holds, bound again; an object of a class of the function's module is copied."""
        own = type(value).__module__ == function.__module__ and not isinstance(value, nn.Module | Tensor)
        if not own or id(value) in self.memo:
            return self.rebound(value)
        before = set(self.memo)
        try:
            return self.deepcopy(value, self.memo)
        # as for attributes, what cannot be copied is shared
        except Exception as error:
            if is_out_of_memory(error):
                raise
            for key in self.memo.keys() - before:
                del self.memo[key]
            return value

    def follow(self) -> None:
        """Give all that was copied the ids of copies and weak references to copies, which copy.deepcopy leaves."""
        for key, made in list(self.memo.items()):
            # what is shared is the caller's, and the memo keeps the originals alive in a list of its own
            if id(made) != key and key != id(self.memo):
                self._follow_in(made)

    def _follow_in(self, made: Any) -> None:
        if isinstance(made, weakref.WeakKeyDictionary | weakref.WeakValueDictionary | weakref.WeakSet):
            found = [
                (self.memo.get(id(key), key), self.memo.get(id(each), each))
                for key, each in (made.items() if isinstance(made, MutableMapping) else zip(made, made, strict=True))
            ]
            items = found if isinstance(made, MutableMapping) else [key for key, _ in found]
        else:
            made = made if type(made) in _CONTAINERS else getattr(made, "__dict__", None)
            if type(made) not in _CONTAINERS:
                return
            values = [*chain(*made.items())] if isinstance(made, dict) else [*made]
            items = [*map(self._followed, values)]
            if not any(map(is_not, items, values)):
                return
            items = [*zip(items[::2], items[1::2], strict=True)] if isinstance(made, dict) else items
        made.clear()
        made.extend(items) if isinstance(made, list) else made.update(items)

    def _values(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.rebound(value) for name, value in named.items()}

    def _function(self, function: FunctionType) -> FunctionType:
        """Return a function with the copies of what its closure, its defaults and the globals that it names hold."""
        cells = tuple(CellType() for _ in function.__closure__ or ())
        scope = dict(function.__globals__)
        made = FunctionType(function.__code__, scope, function.__name__, None, cells)
        # ahead of what it holds: a function may hold itself
        self.memo[id(function)] = made
        made.__dict__.update(function.__dict__)
        made.__defaults__ = self.rebound(function.__defaults__)
        made.__kwdefaults__ = self._values(function.__kwdefaults__ or {})
        for cell, own in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self._held(own.cell_contents, function)
            except ValueError:
                # an empty cell
                continue
        for name in names_in(function.__code__) & scope.keys():
            value = scope[name]
            # functions of other modules do not know the model; methods of classes keep their globals
            elsewhere = isinstance(value, FunctionType) and value.__globals__ is not function.__globals__
            if not elsewhere and id(value) not in self._read_by_methods:
                scope[name] = self._held(value, function)
        return made

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._converted(tensor)
            return memo[id(tensor)]
        # how a parameter copies its values
        return self._converted(args[0]) if func is Tensor.clone else func(*args, **(kwargs or {}))

    def _converted(self, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if self._dtype is not None and dtype.is_complex:
            dtype = _COMPLEX.get(self._dtype, torch.complex64)
        elif self._dtype is not None and dtype.is_floating_point:
            dtype = self._dtype
        return tensor.detach().to(self._device or tensor.device, dtype, copy=True)


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in a code object and those inside of it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _globals_of_methods(model: nn.Module) -> Iterator[Any]:
    """Yield the globals that the methods of a model's classes name, except PyTorch's."""
    for owner in {owner for kind in set(map(type, model.modules())) for owner in kind.__mro__}:
        methods = () if owner.__module__.startswith("torch.") else vars(owner).values()
        for method in methods:
            if isinstance(method, FunctionType):
                yield from (method.__globals__.get(name) for name in names_in(method.__code__))


def _training(model: nn.Module) -> Iterator[Any]:
    """Yield the data sets, loaders, optimisers and trainers on modules: they may be large, and refer to the model."""
    for module in model.modules():
        for value in vars(module).values():
            library = type(value).__module__.partition(".")[0]
            own = isinstance(value, Dataset | DataLoader | Optimizer) and not isinstance(value, nn.Module)
            if own or (library in _TRAINERS and not isinstance(value, nn.Module | Tensor)):
                yield value


def _uncopyable(model: nn.Module) -> Iterator[Any]:
    """Yield the attributes of all modules, also those in lists and dictionaries, that copy.deepcopy cannot copy."""
    modules = {id(module): module for module in model.modules()}
    pending = [value for module in modules.values() for value in vars(module).values()]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module | Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple | set | frozenset | dict):
            pending += [*value.values()] if isinstance(value, dict) else [*value]
            continue
        try:
            _Conversion(None, None).deepcopy(value, {**modules})
        # what __deepcopy__ and __reduce__ raise can be of any class
        except Exception as error:
            if is_out_of_memory(error):
                raise
            yield value


def _complete(model: nn.Module, made: nn.Module, conversion: _Conversion) -> None:
    """Give a copy what copy.deepcopy leaves out: functions of the copy's modules, and what a class drops.

    torch.fx's GraphModule drops hooks and attributes, for one.

    Raises:
        ModelError: the copy has other modules.
    """
    own, copied = dict(model.named_modules()), dict(made.named_modules())
    if own.keys() != copied.keys():
        raise ModelError(f"copy.deepcopy gives other modules ({', '.join(sorted(own.keys() ^ copied.keys()))})")
    for path, twin in copied.items():
        attributes: dict[str, Any] = twin.__dict__
        # the wrapper of torch.compile is left out of the copy
        if _is_compiled(twin) and not is_untouched(own[path]):
            where = f"module {path!r}" if path else "model"
            raise ModelError(f"the compiled {where} has hooks or a forward of its own: give them to what it wraps")
        for name in vars(own[path]).keys() - attributes.keys() - _NOT_KEPT:
            attributes[name] = conversion.deepcopy(vars(own[path])[name], conversion.memo)
        for hooks in _FORWARD_HOOKS:
            kept = vars(own[path])[hooks]
            attributes[hooks] = type(kept)((key, conversion.rebound(hook)) for key, hook in kept.items())
        for name, value in attributes.items():
            if isinstance(value, FunctionType | partial):
                attributes[name] = conversion.rebound(value)
            elif name in _CHECKPOINTING and value is True:
                attributes[name] = False


def form_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a model's first floating-point parameter or buffer; float32 on the CPU without one."""
    tensors = (*model.parameters(), *model.buffers())
    first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class, for messages; that of the model inside of one of our adapters."""
    inner = getattr(model, "model", None) if type(model).__module__.startswith("dave_fast.") else None
    return type(inner if isinstance(inner, nn.Module) else model).__name__
