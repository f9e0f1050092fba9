"""A fingerprint of a model's code, modules, settings and weights, by which changes to the model are noticed.

The structure (methods of the classes, replaced modules, parameters, buffers and tensors that are plain attributes,
hooks, functions and settings such as `eps` on modules, what hooks, functions, containers and objects hold, and
in-place updates, by autograd's version counter) is compared on the host. Writes through `.data` do not advance the
version counter; checksums of the weights' bits, computed on the weights' own device, notice them, but not those to
tensors of hooks, functions, objects and hidden modules. Attributes that the model's own forward writes, such as kept
attention maps and counters, can be left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from dave_fast.given.isolation import GLOBAL_HOOKS, HOOKS, names_in
from dave_fast.transfers import moved

# types of attributes that are settings
SETTINGS = (bool, int, float, str, type(None), torch.dtype)
FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial, property, staticmethod, classmethod)
CONTAINERS = (list, tuple, dict)
OTHER = object
# attributes that every module has: its tables of modules, parameters, buffers and hooks, which are read as such, and
# `training`, since explanations are always in evaluation mode
_TABLES = frozenset(vars(nn.Module()))
# (path of the module, name of the attribute)
Attribute = tuple[str, str]
# A tensor's 64-bit words are laid out in rows of COLUMNS words, and summed along both axes. COLUMNS is a prime: the
# same power of two added to each word of a row (the sign of a float64 is its highest bit) does not cancel, as it would
# with an even number, and the columns do not coincide with the tensor's own. Columns are summed in GROUPs of rows
# first, which is faster.
WORD, GROUP, COLUMNS = 8, 7, 509
HOST = torch.device("cpu")
# where all that the methods of a class may call is: scopes, and names in them
Places = tuple[tuple[dict[str, Any], str], ...]
# those of each class, and functions that return what stood there when they were found, None if it is gone
_known_places: weakref.WeakKeyDictionary[type, tuple[Places, list[Callable[[], object]]]] = weakref.WeakKeyDictionary()
# containers of functions and objects that have more items are data, of which the number of items is compared
_LONGEST = 1000


class State:
    """The state of a model at one time.

    Args:
        model: is not changed.
        values: whether to compare the weights' values, too, besides the structure.
        ignored: attributes that may change, because the model's own forward writes them.
    """

    def __init__(self, model: nn.Module, *, values: bool, ignored: Collection[Attribute] = ()) -> None:
        self._model, self._values, self.ignored = model, values, frozenset(ignored)
        self._structure = structure(model, self.ignored)
        self._checksums = moved(self.checksums(), HOST)

    def holds(self, *, values: bool) -> bool:
        """Return whether the model is unchanged; with `values` the weights too, which waits for their devices."""
        if structure(self._model, self.ignored) != self._structure:
            return False
        return not values or self.has(moved(self.checksums(), HOST))

    def checksums(self) -> list[Tensor]:
        """Queue the computation of the model's present checksums on its devices; an empty list without values."""
        return checksums(self._model, self.ignored) if self._values else []

    def has(self, checksums: Sequence[Tensor]) -> bool:
        """Return whether these, read back to the host, are the checksums of the state."""
        return len(checksums) == len(self._checksums) and all(map(torch.equal, checksums, self._checksums))


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Return a value that differs between two calls if the model was changed in between.

    Waits for the devices of the weights. Only writes through `.data` can be missed, those that `checksums` misses.
    """
    return structure(model), tuple(read.numpy().tobytes() for read in moved(checksums(model), HOST))


def structure(model: nn.Module, ignored: Collection[Attribute] = ()) -> tuple[object, ...]:
    """Return the part of the fingerprint that does not read the weights' values.

    It refers to functions and objects on modules weakly, since they may hold the model: one that is gone is equal to no
    other, not even to one at the same address.
    """
    found, tensors, kinds = [], dict[int, Tensor](), set()
    modules = list(model.named_modules())
    held, seen = dict[Attribute, object](), {id(module) for _, module in modules}
    for path, module in modules:
        kinds.add(type(module))
        own = vars(module)
        _collect(own["_parameters"].values(), tensors)
        _collect(own["_buffers"].values(), tensors)
        found += [path, id(module), type(module)]
        # a new hook may have the address of a removed one, but not the number of its handle
        found += [(key, id(hook)) for table in HOOKS if own.get(table) for key, hook in own[table].items()]
        _look_at_hooks(held, seen, path, own)
        for name, value in own.items():
            if name in _TABLES or (ignored and (path, name) in ignored):
                continue
            kind = _kind(value.__class__)
            if kind is FUNCTIONS or kind is OTHER:
                _look(held, seen, path, name, value)
            if kind is SETTINGS:
                found += [name, value]
            elif kind is FUNCTIONS:
                found += [name, _Same(value)]
            elif kind is Tensor:
                tensors[id(value)] = value
            else:
                leaves = list(_leaves(value))
                _collect(leaves, tensors)
                found += [name, *[item for item in leaves if not isinstance(item, Tensor)]]
                if _holds_more(leaves):
                    _look(held, seen, path, f"{name}.items", value)
    classes = {owner: None for kind in kinds for owner in kind.__mro__}
    code = [(owner, *_members(owner), *_called(owner)) for owner in classes]
    hooks = [_Same(hook) for table in GLOBAL_HOOKS for hook in vars(nn.modules.module)[table].values()]
    inner = [entry for entry in held.items() if entry[0] not in ignored]
    return code, hooks, found, inner, list(map(_identity, tensors.values()))


def _collect(values: Iterable[Any], tensors: dict[int, Tensor]) -> None:
    """Add the tensors among values."""
    for value in values:
        if isinstance(value, Tensor):
            tensors[id(value)] = value


def written(model: nn.Module, before: dict[Attribute, object]) -> set[Attribute]:
    """Return the attributes of a model that differ from those that `attributes` returned before."""
    after = attributes(model)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def attributes(model: nn.Module) -> dict[Attribute, object]:
    """Return what identifies each attribute of a model's modules, and what functions and objects on them hold."""
    found = _held(model.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _TABLES:
                items = list(_leaves(value))
                found[path, name] = tuple(_identity(item) if isinstance(item, Tensor) else item for item in items)
    return found


def _held(modules: Iterable[tuple[str, nn.Module]]) -> dict[Attribute, object]:
    """Return the settings and tensors that hooks, functions and objects on modules hold: a hook may scale by them.

    Looked at are attributes of objects, closures, defaults, and the globals that functions name.
    """
    modules = list(modules)
    found: dict[Attribute, object] = {}
    seen = {id(module) for _, module in modules}
    for path, module in modules:
        _look_at_hooks(found, seen, path, vars(module))
        for name, value in list(vars(module).items()):
            kind = _TABLES if name in _TABLES else _kind(value.__class__)
            if kind is FUNCTIONS or kind is OTHER:
                _look(found, seen, path, name, value)
            elif kind is CONTAINERS and _holds_more(_leaves(value)):
                _look(found, seen, path, f"{name}.items", value)
    return found


def _holds_more(leaves: Iterable[Any]) -> bool:
    """Return whether what `_leaves` yields of a container are not settings and tensors alone."""
    return any(isinstance(each, _Same) for each in leaves)


def _look_at_hooks(found: dict[Attribute, object], seen: set[int], path: str, own: dict[str, Any]) -> None:
    for table in HOOKS:
        if own.get(table):
            for number, hook in enumerate(list(own[table].values())):
                _look(found, seen, path, f"{table}.{number}", hook)


def _look(found: dict[Attribute, object], seen: set[int], path: str, name: str, value: Any, depth: int = 6) -> None:
    kind = _kind(value.__class__)
    if kind is SETTINGS or kind is Tensor:
        found[path, name] = _identity(value) if kind is Tensor else value
    elif isinstance(value, nn.Module | type | ModuleType):
        found[path, name] = _Same(value)
        if isinstance(value, nn.Module) and id(value) not in seen:
            _look_at_hidden(found, seen, path, name, value, depth)
    elif isinstance(value, np.ndarray) and value.size <= _LONGEST:
        found[path, name] = value.dtype, value.shape, value.tobytes()
    elif isinstance(value, set | frozenset):
        # an object in a set may be large, or hold the model
        found[path, name] = len(value), frozenset(each for each in value if _kind(each.__class__) is SETTINGS)
    elif depth and id(value) not in seen:
        seen.add(id(value))
        if kind is CONTAINERS and len(value) > _LONGEST:
            found[path, name] = _Same(value), len(value)
            return
        if isinstance(value, list):
            # one entry for all: where outputs are collected, the number of items changes at every call
            items: dict[Attribute, object] = {}
            for number, each in enumerate(list(value)):
                _look(items, seen, path, str(number), each, depth - 1)
            found[path, name] = tuple(items.items())
            return
        for inner, each in _inside(value):
            _look(found, seen, path, f"{name}.{inner}", each, depth - 1)


def _look_at_hidden(
    found: dict[Attribute, object], seen: set[int], path: str, name: str, hidden: nn.Module, depth: int
) -> None:
    """Look at a module that is none of the model's own modules, since a list or an object holds it."""
    for inner, module in hidden.named_modules(prefix=name):
        if depth and id(module) not in seen:
            seen.add(id(module))
            own = vars(module)
            _look_at_hooks(found, seen, f"{path}.{inner}", own)
            settings = {key: each for key, each in own.items() if key not in _TABLES}
            for key, each in (own["_parameters"] | own["_buffers"] | settings).items():
                _look(found, seen, path, f"{inner}.{key}", each, depth - 1)


def _inside(value: Any) -> list[tuple[object, Any]]:
    """Return what a function, a container or an object holds, by name or number."""
    if isinstance(value, MethodType):
        return [("function", value.__func__), ("self", value.__self__)]
    if isinstance(value, BuiltinFunctionType):
        return [("self", value.__self__)]
    if isinstance(value, partial):
        return [("function", value.func), ("arguments", value.args), ("keywords", value.keywords)]
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        scope = value.__globals__
        inner = [(name, _content(cell)) for name, cell in cells]
        named = [(name, scope[name]) for name in sorted(names_in(value.__code__)) if name in scope]
        # functions of other modules do not know the model
        near = [(name, v) for name, v in named if getattr(v, "__globals__", scope) is scope]
        return [*inner, *near, ("defaults", value.__defaults__), ("keywords", value.__kwdefaults__)]
    if isinstance(value, dict):
        return [(key if _kind(key.__class__) is SETTINGS else n, v) for n, (key, v) in enumerate(list(value.items()))]
    if isinstance(value, tuple):
        return list(enumerate(value))
    attributes = getattr(value, "__dict__", None)
    return list(attributes.items()) if isinstance(attributes, dict) else []


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    # an empty cell
    except ValueError:
        return None


def _members(owner: type) -> list[object]:
    """Return the settings, functions and callable objects of a class."""
    found: list[object] = []
    for name, value in vars(owner).items():
        kind = _kind(value.__class__)
        if kind is SETTINGS or kind is FUNCTIONS:
            found += [name, value]
        elif kind is OTHER and callable(value):
            found += [name, _Same(value)]
    return found


class _Same:
    """An object that is compared by its identity, and not kept alive where its class allows weak references."""

    __slots__ = ("get",)

    def __init__(self, value: object) -> None:
        self.get: Callable[[], object]
        try:
            self.get = weakref.ref(value)
        except TypeError:
            # held, so that no other one gets its address
            self.get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (value := self.get()) is not None and other.get() is value


def _called(owner: type) -> list[object]:
    """Return the functions, classes and callable objects that the methods of a class call by global names."""
    places, found = _known_places.get(owner) or ((), None)
    values = [scope.get(name) for scope, name in places]
    # What stands at a place tells which other places there are: where it is another one, they are found anew.
    if found is None or any(get() is not value for get, value in zip(found, values, strict=True)):
        places = _places(owner)
        values = [scope.get(name) for scope, name in places]
        _known_places[owner] = places, [_Same(value).get for value in values]
    tables = [each for value in values if _is_table(value) for each in value.items()]
    return [value if isinstance(value, FUNCTIONS) else _Same(value) for value in (*values, *chain(*tables))]


def _is_table(value: object) -> TypeGuard[Mapping[str, object]]:
    """Return whether a global is a table of functions, as transformers' of attention; dictionaries hold other data."""
    return isinstance(value, Mapping) and not isinstance(value, dict)


def _places(owner: type) -> Places:
    """Return where all that the methods of a class may call is: scopes, and names in them.

    Those of torch.nn.functional are among them, which other projects replace. Functions of the same library are
    followed into those that they call, except within PyTorch.
    """
    library, places = owner.__module__.partition(".")[0], dict[tuple[int, str], tuple[dict[str, Any], str]]()
    pending = [] if owner is nn.Module or library in ("builtins", "abc") else _functions(vars(owner).values())
    while pending:
        function = pending.pop()
        for name in function.__code__.co_names:
            scope = function.__globals__ if name in function.__globals__ else vars(torch.nn.functional)
            value = scope.get(name)
            if (callable(value) or _is_table(value)) and (id(scope), name) not in places:
                places[id(scope), name] = scope, name
                if _is_table(value):
                    pending += _functions(value.values())
                own = str(getattr(value, "__module__", "")).partition(".")[0] == library
                pending += _functions([value]) if own and library != "torch" else []
    return tuple(places.values())


def _functions(members: Iterable[Any]) -> list[FunctionType]:
    """Return the Python functions among members of a class, and those that they decorate.

    These are methods, static and class methods, and properties.
    """
    pending = [each for m in members for each in (m, getattr(m, "__func__", None), getattr(m, "fget", None))]
    found = [each for each in pending if isinstance(each, FunctionType)]
    for function in found:
        wrapped = getattr(function, "__wrapped__", None)
        found += [wrapped] if isinstance(wrapped, FunctionType) else []
    return found


@lru_cache(maxsize=4096)
def _kind(cls: type) -> object:
    """Return which kind of attribute a class is; cached, since every call looks at every attribute."""
    return next((kind for kind in (SETTINGS, FUNCTIONS, CONTAINERS, Tensor) if issubclass(cls, kind)), OTHER)


def _leaves(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the settings, functions, tensors and objects of an attribute, those in containers one by one."""
    kind = _kind(value.__class__)
    if kind is CONTAINERS and depth:
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _leaves(item, depth - 1)
    else:
        yield value if kind is SETTINGS or kind is Tensor else _Same(value)


def _tensors(model: nn.Module, ignored: Collection[Attribute]) -> list[Tensor]:
    """Return parameters, buffers, and tensors among plain attributes, each once."""
    found: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        own = vars(module)
        _collect(own["_parameters"].values(), found)
        _collect(own["_buffers"].values(), found)
        for name, value in own.items():
            kind = _kind(value.__class__)
            if (kind is Tensor or kind is CONTAINERS) and name not in _TABLES and (path, name) not in ignored:
                _collect(_leaves(value), found)
    return list(found.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # inference tensors have no version counter
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape)


@torch.no_grad()
def checksums(model: nn.Module, ignored: Collection[Attribute] = ()) -> list[Tensor]:
    """Return checksums of the weights' bits, a tensor of bytes for each device, independent of the number of threads.

    Tensors of less than 28 KiB, and the remainders of larger ones, are copied. The rest are 64-bit words in rows of
    509, of which every row and every column is summed modulo 2⁶⁴; integer sums are exact, and treat NaN like any other
    value. A change of one to three words is always noticed, hence also two words that are swapped, and so is the sign
    of all values in float64. Missed are changes that cancel in every row and every column at once, of four words or
    more: in the simplest case the corners of a rectangle (+a, −a, −a, +a, or the signs of four float64 values). They
    can be constructed; for words replaced by random ones the probability is at most 2⁻⁶⁴, for signs of float64 flipped
    at random 2^-(rows + columns - 1).
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(model, ignored):
        # a meta tensor has no values
        if not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append(_bits(tensor))
    return [_checksum(tensors) for tensors in by_device.values()]


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, aligned for 64-bit words: (n,) uint8, the tensor's own memory if possible.

    Tensors whose memory is not the array of their values (sparse, quantised, subclasses) are replaced by their sum.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or type(tensor) is not Tensor:
        tensor = tensor.sum(dtype=torch.float64).reshape(1)
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
    aligned = flat.storage_offset() * flat.itemsize % WORD == 0
    return (flat if aligned else flat.clone()).view(torch.uint8)


def _checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums of tensors of bytes on one device, and the bytes that are not summed, (n,) uint8."""
    sums, exact = [], []
    for tensor in tensors:
        groups = tensor.nbytes // (WORD * GROUP * COLUMNS)
        summed = groups * (WORD * GROUP * COLUMNS)
        if groups:
            words = tensor[:summed].view(torch.int64).view(groups, GROUP, COLUMNS)
            sums += [words.sum(2), words.sum(1).sum(0)]
        exact.append(tensor[summed:])
    return torch.cat([part.view(-1).view(torch.uint8) for part in (*sums, *exact)])
