"""Timing of every backend of an op in turns, at a model's shapes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from inspect import signature
from typing import Any

import torch

from dave_fast.bench import rates
from dave_fast.bench.agreement import Expected, check, loader, poisoned, reference
from dave_fast.bench.case import Case, Operands, results_of, size_of
from dave_fast.bench.cases import PACKS, cases_of
from dave_fast.bench.shapes import Shapes
from dave_fast.bench.timing import host_seconds, in_turns, spread
from dave_fast.errors import BackendError, InputError
from dave_fast.models.catalog import load_object
from dave_fast.ops import _registry
from dave_fast.ops.precision import NARROW

YOURS = "yours"
# what the contestants that measure the highest rates of the machine are called ahead of their kinds
LIMIT = "limit: "
# the op that a user's kernel needs besides, replaced by the default if it is not given
COMPANIONS = {**PACKS, "attention_vjp": "attention"}
# sets of operands together exceed a CPU's cache, or three times a GPU's L2
CPU_CACHE_BYTES = 64 << 20
MOST_SETS = 8
# share of the budget from which an op is so slow that its operands need not exceed a cache
SLOW = 0.05


@contextmanager
def registered(kernels: Mapping[str, str], device: str) -> Iterator[None]:
    """Register the user's kernels as the backend "yours" within this context.

    A linear without a pack_weight gets weights (out, in) unpacked; an attention_vjp without an attention gets the state
    that `attention_ref` saves.

    Args:
        kernels: op -> "module:function".
        device: that they run on.

    Raises:
        InputError: the op is unknown, or the function cannot be imported, or does not take the op's arguments: at once
            where it lacks one that every call has, else where it is first called with one that it lacks.
    """
    added = dict(kernels)
    for op, path in kernels.items():
        if op not in _registry.IMPLEMENTATIONS:
            raise InputError(f"there is no op {op!r}; there are {', '.join(_registry.IMPLEMENTATIONS)}")
        _check_signature(op, path)
        companion = COMPANIONS.get(op)
        if companion is not None:
            added.setdefault(companion, _registry.IMPLEMENTATIONS[companion]["torch"])
    _registry.BACKENDS[YOURS] = _registry.Backend(YOURS, (device,), lambda: None)
    for op, path in added.items():
        _registry.IMPLEMENTATIONS[op][YOURS] = path
    try:
        yield
    except TypeError as error:
        for op, path in kernels.items():
            # Python names the function whose arguments do not fit
            if str(error).startswith(f"{getattr(load_object(path), '__qualname__', path)}() "):
                raise _misfit(op, path, error) from error
        raise
    finally:
        del _registry.BACKENDS[YOURS]
        for op in added:
            del _registry.IMPLEMENTATIONS[op][YOURS]


def _check_signature(op: str, path: str) -> None:
    """Raise InputError where a function cannot be called with the arguments that every call of an op has."""
    own = load_object(path)
    if not callable(own):
        raise InputError(f"--kernel {op}={path} is a {type(own).__name__}; expected a function")
    needed = [each for each in signature(_registry.load(op, "torch")).parameters.values() if each.default is each.empty]
    by_name = {each.name: None for each in needed if each.kind is each.KEYWORD_ONLY}
    by_place = [each for each in needed if each.kind is each.POSITIONAL_OR_KEYWORD]
    try:
        signature(own).bind(*by_place, **by_name)
    except TypeError as error:
        raise _misfit(op, path, error) from error
    # functions in C may have no signature
    except ValueError:
        return


def _misfit(op: str, path: str, error: TypeError) -> InputError:
    return InputError(
        f"--kernel {op}={path} does not take the op's arguments: {error}; expected "
        f"{op}{signature(_registry.load(op, 'torch'))}"
    )


def bench_op(
    op: str,
    shapes: Shapes,
    *,
    precision: str,
    device: str = "cpu",
    backend: str | None = None,
    repeats: int = 20,
    budget: float = 10.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time the backends of an op.

    Args:
        op: its name.
        shapes: of the model.
        precision: of the operands and of the ceiling.
        device: to run on.
        backend: to time beside plain PyTorch; None for all.
        repeats: turns.
        budget: seconds of timing for each case.
        progress: called with the name of each case.

    Returns:
        A row for each case and backend: seconds, rate, share of the machine's ceiling and errors; or the reason why it
        was refused or not measured.

    Raises:
        BackendError: the backend is unavailable, or operands do not fit the device.
    """
    rows = []
    for case in cases_of(op, shapes):
        progress(case.name)
        try:
            rows += _bench_case(case, shapes, precision, device, _wanted(op, backend, device), repeats, budget)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{case.name} does not fit {device}: {error}. Give fewer --rows or --samples."
            ) from error
    return rows


def _wanted(op: str, backend: str | None, device: str) -> dict[str, str | None]:
    """Return the backends to time, with None or the reason why they cannot run; raise BackendError for a bad name."""
    every = {name: _registry.why_not(op, name, device) for name in _registry.IMPLEMENTATIONS[op]}
    if backend is None:
        return every
    if backend not in _registry.BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; there are {', '.join(_registry.BACKENDS)}")
    if backend not in every:
        raise BackendError(f"op {op!r} has no {backend!r} form; it has {', '.join(every)}")
    if every[backend] is not None:
        raise BackendError(f"backend {backend!r} cannot run {op!r} here: {every[backend]}")
    return {"torch": None, backend: None}


def _bench_case(
    case: Case,
    shapes: Shapes,
    precision: str,
    device: str,
    backends: dict[str, str | None],
    repeats: int,
    budget: float,
) -> list[dict[str, Any]]:
    seed, dtype = secrets.randbits(32), rates.DTYPES[precision]
    sets = operand_sets(case, dtype, device, seed, budget)
    rows, contestants, gigabytes = {}, {}, 0.0
    for name, reason in backends.items():
        row: dict[str, Any] = {"op": case.op, "case": case.name, "backend": name, "precision": precision}
        rows[name] = row
        if reason is not None:
            row["not measured"] = reason
            continue
        load = loader(name, device)
        agreement, results = check(case, load, sets[0], dtype)
        row |= asdict(agreement)
        gigabytes = case.gigabytes(sets[0], results)
        if agreement.reason is None:
            contestants[name] = [case.bind(load, operands, dtype) for operands in sets]
    if not contestants:
        return list(rows.values())
    limits = _limits(case, shapes, precision, device)
    calls_of_limits = {LIMIT + kind: [run] for kind, (_, run) in limits.items()}
    seconds = in_turns({**contestants, **calls_of_limits}, repeats, device, budget=budget)
    most = {kind: [amount / each for each in seconds[LIMIT + kind]] for kind, (amount, _) in limits.items()}
    expected = Expected.of(case, sets[-1], dtype)
    for name, calls in contestants.items():
        with poisoned():
            found = results_of(calls[-1]())
        agreement = expected.agreement(found)
        if agreement.reason is None:
            rows[name] |= _rates(case, gigabytes, seconds[name], most) | {"seed": seed, "sets": len(sets)}
        else:
            rows[name] |= asdict(replace(agreement, reason=f"after it was timed: {agreement.reason}"))
    return list(rows.values())


def operand_sets(case: Case, dtype: torch.dtype, device: str, seed: int, budget: float) -> list[Operands]:
    """Make sets of operands from consecutive seeds that together exceed the cache; one set if the op is slow."""

    def make(at: int) -> Operands:
        return case.operands(torch.Generator(device).manual_seed(seed + at), dtype)

    first = make(0)
    if host_seconds(case.bind(reference, first, dtype), device) > SLOW * budget:
        return [first]
    cache = CPU_CACHE_BYTES if device == "cpu" else 3 * torch.cuda.get_device_properties(device).L2_cache_size
    size = size_of(case.reads(first))
    return [first, *(make(at) for at in range(1, min(MOST_SETS, -(-cache // size))))]


def _limits(case: Case, shapes: Shapes, precision: str, device: str) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Return by kind what gives the machine's highest rate: its amount, GFLOP or GB of a copy, and the call.

    A product is compared with plain products of its own shape, other arithmetic with those of a block.
    """
    if not case.gigaflops:
        return {"copying memory": rates.copy(device=device)}
    kinds = rates.kinds_of(next((each for each in NARROW if case.op == f"linear_{each}"), precision), device)
    if case.product is not None:
        return {kind: (case.gigaflops, rates.product(kind, *case.product, device)) for kind in kinds}
    size = (shapes.rows * shapes.tokens, shapes.width, shapes.hidden)
    blocks = {kind: rates.ceiling(kind, *size, at_least=0.0, device=device) for kind in kinds}
    return {kind: (made.gigaflops, made.run) for kind, made in blocks.items()}


def _rates(case: Case, gigabytes: float, seconds: list[float], most: dict[str, list[float]]) -> dict[str, Any]:
    """Return seconds, GFLOP/s, GB/s, and the share of the machine's highest rate, repeat by repeat.

    Args:
        case: the op at one shape.
        gigabytes: of its operands and results.
        seconds: of each repeat.
        most: by kind the rate in each repeat, of which the highest is the ceiling.
    """
    work = case.gigaflops or gigabytes
    timed = spread(seconds)
    kind = rates.fastest(most)
    return {
        "seconds": timed,
        "GFLOP/s": case.gigaflops / timed["median"] if case.gigaflops else None,
        "GB/s": gigabytes / timed["median"],
        "gigaflops": case.gigaflops,
        "gigabytes": gigabytes,
        "share": spread([work / own / rate for own, rate in zip(seconds, most[kind], strict=True)]),
        "of": "matrix products" if case.gigaflops else "copying memory",
        "ceiling": spread(most[kind])["median"],
        "ceiling of": kind,
        "ceilings": {each: spread(values)["median"] for each, values in most.items()},
    }
