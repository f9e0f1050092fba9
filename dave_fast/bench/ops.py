"""Timing of every backend of an op in turns, at a model's shapes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
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

YOURS = "yours"
CEILING, COPY = "ceiling", "copy"
# the op that a user's kernel needs besides, replaced by the default if it is not given
COMPANIONS = {**PACKS, "attention_vjp": "attention"}
# sets of operands together exceed a CPU's cache, or three times a GPU's L2
CPU_CACHE_BYTES = 64 << 20
MOST_SETS = 8
# share of the budget from which an op is so slow that its operands need not exceed a cache
SLOW = 0.05


def backends_of(op: str, device: str) -> dict[str, str | None]:
    """Return for each backend of an op None if it runs here, otherwise the reason."""
    return {name: _registry.why_not(op, name, device) for name in _registry.IMPLEMENTATIONS[op]}


@contextmanager
def registered(kernels: Mapping[str, str], device: str) -> Iterator[None]:
    """Register the user's kernels as the backend "yours" within this context.

    A linear without a pack_weight gets weights (out, in) unpacked; an attention_vjp without an attention gets the state
    that `attention_ref` saves.

    Args:
        kernels: op -> "module:function".
        device: that they run on.

    Raises:
        InputError: the op is unknown, or the function cannot be imported.
    """
    added = dict(kernels)
    for op, path in kernels.items():
        if op not in _registry.IMPLEMENTATIONS:
            raise InputError(f"there is no op {op!r}; there are {', '.join(_registry.IMPLEMENTATIONS)}")
        load_object(path)
        companion = COMPANIONS.get(op)
        if companion is not None:
            added.setdefault(companion, _registry.IMPLEMENTATIONS[companion]["torch"])
    _registry.BACKENDS[YOURS] = _registry.Backend(YOURS, (device,), lambda: None)
    for op, path in added.items():
        _registry.IMPLEMENTATIONS[op][YOURS] = path
    try:
        yield
    finally:
        del _registry.BACKENDS[YOURS]
        for op in added:
            del _registry.IMPLEMENTATIONS[op][YOURS]


def bench_op(
    op: str,
    shapes: Shapes,
    *,
    dtype: torch.dtype,
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
        dtype: of the operands.
        precision: name of the precision, for the ceiling.
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
            rows += _bench_case(case, shapes, dtype, precision, device, _wanted(op, backend, device), repeats, budget)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{case.name} does not fit {device}: {error}. Give fewer --rows or --samples."
            ) from error
    return rows


def _wanted(op: str, backend: str | None, device: str) -> dict[str, str | None]:
    """Return the backends to time, with None or the reason why they cannot run; raise BackendError for a bad name."""
    every = backends_of(op, device)
    if backend is None:
        return every
    if backend not in _registry.BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; there are {', '.join(_registry.BACKENDS)}")
    if backend not in every:
        raise BackendError(f"op {op!r} has no {backend!r} form; it has {', '.join(every)}")
    if every[backend] is not None:
        raise BackendError(f"backend {backend!r} was asked for and cannot run {op!r}: {every[backend]}")
    return {"torch": None, backend: None}


def _bench_case(
    case: Case,
    shapes: Shapes,
    dtype: torch.dtype,
    precision: str,
    device: str,
    backends: dict[str, str | None],
    repeats: int,
    budget: float,
) -> list[dict[str, Any]]:
    seed = secrets.randbits(32)
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
    limit = _limit(case, shapes, precision, device)
    seconds = in_turns(
        {**contestants, **{name: [run] for name, (_, run) in limit.items()}}, repeats, device, budget=budget
    )
    for name, refused in _checked_again(
        case, {name: calls[-1] for name, calls in contestants.items()}, sets[-1], dtype
    ):
        if refused["reason"] is not None:
            rows[name] |= refused
            continue
        rows[name] |= _rates(case, gigabytes, seconds, name, limit) | {"seed": seed, "sets": len(sets)}
    return list(rows.values())


def _checked_again(
    case: Case, calls: Mapping[str, Callable[[], Any]], operands: Operands, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield how each contestant agrees once it was timed, on the operands of its call."""
    expected = Expected.of(case, operands, dtype) if calls else None
    for name, call in calls.items():
        assert expected is not None
        with poisoned():
            found = results_of(call())
        agreement = expected.agreement(found)
        reason = None if agreement.reason is None else f"after it was timed: {agreement.reason}"
        yield name, asdict(replace(agreement, reason=reason))


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


def _limit(case: Case, shapes: Shapes, precision: str, device: str) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Return the call that gives the machine's highest rate, and its amount: products in GFLOP, or a copy in GB."""
    if not case.gigaflops:
        return {COPY: rates.copy(device=device)}
    made = rates.ceiling(
        rates.kind_of("fp8" if case.op == "linear_fp8" else precision, device),
        shapes.rows * shapes.tokens,
        shapes.width,
        shapes.hidden,
        at_least=0.0,
        device=device,
    )
    return {CEILING: (made.gigaflops, made.run)}


def _rates(
    case: Case, gigabytes: float, seconds: dict[str, list[float]], name: str, limit: dict[str, Any]
) -> dict[str, Any]:
    """Return seconds, GFLOP/s, GB/s, and the share of the ceiling, repeat by repeat."""
    ((against, (amount, _)),) = limit.items()
    work = case.gigaflops or gigabytes
    shares = [(work / own) / (amount / most) for own, most in zip(seconds[name], seconds[against], strict=True)]
    timed = spread(seconds[name])
    return {
        "seconds": timed,
        "GFLOP/s": case.gigaflops / timed["median"] if case.gigaflops else None,
        "GB/s": gigabytes / timed["median"],
        "gigaflops": case.gigaflops,
        "gigabytes": gigabytes,
        "share": spread(shares),
        "of": "matrix products" if case.gigaflops else "copying memory",
        "ceiling": amount / spread(seconds[against])["median"],
    }
