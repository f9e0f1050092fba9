"""Timing of whole explanations, from images to maps: the engine and other implementations.

A contestant explains images with S samples. Its row has images a second at the fastest micro-batch, the time of one
image (median, and the 99th percentile of at least 100 runs), memory, the share of the machine's matrix-product rate,
taken repeat by repeat, and the error of its contributions against float64 at equal draws. If a contestant fails, its
row has the reason, and the others are measured.

The truth is the frozen route in float64. As in the tests, an error may be at most twice that of plain PyTorch in the
same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.bench import agreement, rates
from dave_fast.bench.agreement import EXACT, RATIO, distance
from dave_fast.bench.shapes import Shapes
from dave_fast.bench.timing import host_seconds, in_turns, peak_memory, spread
from dave_fast.errors import InputError
from dave_fast.evaluate.metrics import correlation
from dave_fast.explain.explainer import DAVE
from dave_fast.sampling import Draws, draw

NOISE_ALPHA = 0.5
# the route of plain PyTorch in a precision: autograd, or for eight bits the engine with every op in PyTorch
PLAIN = {"fp32": "frozen", "bf16": "frozen", "fp8": "engine", "int8": "engine"}
# number of different images whose contributions are compared, a sample of each
CHECKED = 4
MAPS_MUST_AGREE = {"bf16": 0.999, "fp8": 0.99, "int8": 0.999}
# the most GFLOP of matrix products for the measurement of a rate
LONG_ENOUGH = 60.0
Explain = Callable[[Tensor, int | None], Any]


@dataclass
class Contestant:
    """An implementation that explains images.

    Attributes:
        name: for the tables.
        precision: its name.
        samples: S.
        explain: images (B, C, H, W), rows of a micro-batch (None for its own choice) -> maps.
        contributions: images, draws of one row an image -> (R, C, H, W); None for methods other than DAVE.
        gigaflops: arithmetic of one sample, or None.
        rows: micro-batches to choose the fastest of.
        ceiling: (kind, samples at a time) of the rate to compare with; None for the best of the precision's own, at a
            micro-batch of the model.
        not_measured: why it cannot run here, or None.
        notes: further entries of its row.
    """

    name: str
    precision: str
    samples: int
    explain: Explain = lambda images, rows: None
    contributions: Callable[[Tensor, Draws], Tensor] | None = None
    gigaflops: float | None = None
    rows: tuple[int | None, ...] = (None,)
    ceiling: tuple[str, int] | None = None
    not_measured: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """Contributions in float64, and of plain PyTorch.

    Attributes:
        images: (CHECKED, C, H, W).
        draws: one row of each image.
        contributions: (CHECKED, C, H, W) float64.
        plain: precision -> error of plain PyTorch.
        plain_contributions: precision -> contributions of plain PyTorch.
    """

    images: Tensor
    draws: Draws
    contributions: Tensor
    plain: dict[str, float]
    plain_contributions: dict[str, Tensor] = field(default_factory=dict)


def dave(model: nn.Module, precision: str, samples: int, shapes: Shapes | None, **settings: Any) -> Contestant:
    """Return dave-fast as a contestant; `settings` are those of `DAVE`."""
    explainer = DAVE(model, precision=precision, noise_alpha=NOISE_ALPHA, **settings)

    def explain(images: Tensor, rows: int | None) -> Tensor:
        return explainer.explain(images, 0, samples, internal_batch_size=rows).maps

    return Contestant(
        f"dave-fast {precision}",
        precision,
        samples,
        explain,
        partial(_contributions, explainer),
        None if shapes is None else shapes.gigaflops(),
    )


def _contributions(explainer: DAVE, images: Tensor, draws: Draws) -> Tensor:
    """Return the contributions to class 0 of one row for each image."""
    return explainer.contributions(images, draws, torch.zeros(len(images), 1, dtype=torch.int64))[0]


def find_truth(model: nn.Module, images: Tensor, precisions: Sequence[str], device: str) -> Truth:
    """Return float64 contributions at one draw of each image, by autograd, and those of plain PyTorch.

    Args:
        model: the model.
        images: (CHECKED, C, H, W), no two equal, so that a row with another row's image shows.
        precisions: of the contestants; float64 is not compared with plain PyTorch.
        device: to run on.

    Raises:
        InputError: there are not CHECKED different images.
    """
    if len(images.flatten(1).unique(dim=0)) != CHECKED:
        raise InputError(f"images are {tuple(images.shape)}; expected {CHECKED} different ones, (C, H, W) each")
    explain = partial(DAVE, model, noise_alpha=NOISE_ALPHA, backend="torch", device=device)
    exact = explain(precision="fp64", route="frozen")
    draws = draw(1, height=images.shape[2], width=images.shape[3], image_keys=range(CHECKED), sampling=exact.sampling)
    contributions = _contributions(exact, images, draws)
    found = {
        precision: _contributions(explain(precision=precision, route=PLAIN[precision]), images, draws)
        for precision in precisions
        if precision != "fp64"
    }
    plain = {precision: distance((each,), (contributions,)) for precision, each in found.items()}
    return Truth(images, draws, contributions, plain, found)


def refusal(precision: str, error: float, truth: Truth) -> str | None:
    """Return why contributions with this error are refused, or None."""
    if not error < 1:
        return f"its contributions are {error:.1e} away from float64's (relative, Euclidean)"
    if precision not in {"fp64", *truth.plain}:
        return f"nothing was computed plainly in {precision} to compare its contributions with"
    plain = truth.plain.get(precision, 0.0)
    limit = EXACT if precision == "fp64" else RATIO * max(plain, torch.finfo(torch.float32).eps)
    if error <= limit:
        return None
    return f"its error against float64 is {error:.1e}; at most {limit:.1e} is allowed (plain PyTorch: {plain:.1e})"


def map_agreement(low: DAVE, exact: DAVE, images: Tensor, samples: int) -> float:
    """Return the lowest Pearson correlation of the final maps over the images, at equal draws."""
    maps = [explainer.explain(images, 0, samples).maps.cpu() for explainer in (low, exact)]
    return float(correlation(*maps).min())


def measure(
    contestants: Sequence[Contestant],
    truth: Truth,
    *,
    shapes: Shapes | None,
    images: int,
    device: str,
    repeats: int,
    latencies: int,
    budget: float,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure contestants in turns.

    Args:
        contestants: to compare.
        truth: that they must agree with.
        shapes: of the model, for the ceilings; None leaves them out.
        images: explained at once for throughput.
        device: to run on.
        repeats: turns for throughput.
        latencies: turns for the time of one image.
        budget: seconds for each of the two, over all contestants.
        progress: called with a description of each step.

    Returns:
        A row for each contestant.
    """
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Contestant] = {}
    batch = truth.images[:1].expand(images, -1, -1, -1).contiguous()
    for each in contestants:
        rows[each.name] = _admission(each, truth, batch, device, progress)
        if not {"reason", "not measured"} & rows[each.name].keys():
            running[each.name] = each
    best = {name: rows[name]["rows"] for name in running}
    labels, ceilings = _ceilings(running.values(), shapes, device)

    def timed(some: Tensor, repeats: int, others: Mapping[str, rates.Ceiling]) -> dict[str, list[float]]:
        calls = {name: [partial(each.explain, some, best[name])] for name, each in running.items()}
        others_calls = {label: [made.run] for label, made in others.items()}
        return in_turns({**calls, **others_calls}, repeats, device, budget=budget, host=True)

    progress("throughput")
    seconds = timed(batch, repeats, ceilings)
    progress("one image")
    # with one image at a time, the turns for throughput measure the time of one image, too
    waits = timed(batch[:1], latencies, {}) if images > 1 or latencies > repeats else seconds
    for name, each in running.items():
        row = rows[name]
        row["images a second"] = spread([images / s for s in seconds[name]])
        row["seconds an image"] = spread(waits[name])
        row["peak bytes"] = peak_memory(partial(each.explain, batch, best[name]), device)
        if name in labels:
            most = {label: [ceilings[label].gigaflops / s for s in seconds[label]] for label in labels[name]}
            row |= _share(each, images, seconds[name], most)
    return list(rows.values())


def _admission(
    each: Contestant, truth: Truth, batch: Tensor, device: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Start a contestant's row: its error and its fastest micro-batch, or why it is refused or cannot be measured."""
    progress(f"{each.name}: agreement")
    row = {"name": each.name, "precision": each.precision, "samples": each.samples, **each.notes}
    reason = each.not_measured or _try(each, truth, row)
    if reason is None and "reason" not in row:
        progress(f"{each.name}: micro-batch")
        row["rows"], reason = _best_rows(each, batch, device)
    return row if reason is None else row | {"not measured": reason}


def _try(each: Contestant, truth: Truth, row: dict[str, Any]) -> str | None:
    """Store the error against float64 in the row, with a "reason" if it is too large; return why it cannot run."""
    if each.contributions is None:
        return None
    try:
        found = each.contributions(truth.images, truth.draws)
    except RuntimeError as error:
        return _in_one_line(error)
    row["error"] = distance((found.to(truth.contributions.device),), (truth.contributions,))
    row["plain error"] = truth.plain.get(each.precision)
    refused = refusal(each.precision, row["error"], truth) or _refused_in_a_part(each.precision, found, truth)
    if refused is not None:
        row["reason"] = refused
    return None


def _refused_in_a_part(precision: str, found: Tensor, truth: Truth) -> str | None:
    """Return why contributions are refused whose error is large in a sample, row, column or tile, or None.

    Single pixels are not compared: after twelve blocks in low precision the errors of a few are large by chance.
    """
    if precision not in truth.plain_contributions:
        return None
    plain, exact = truth.plain_contributions[precision], truth.contributions
    return agreement.refusal(
        found.to(exact), plain.to(exact), exact, scales=("an image", "a row", "a column", "a tile")
    )


def _in_one_line(error: RuntimeError) -> str:
    """Return an error in one line, and free the cache if memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"out of memory: {error}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _best_rows(each: Contestant, batch: Tensor, device: str) -> tuple[int | None, str | None]:
    """Return the fastest micro-batch of those that fit, or the reason why none does."""
    seconds: dict[int | None, float] = {}
    reason = "none of its micro-batches was tried"
    for rows in each.rows:
        try:
            for some in (batch, batch[:1]) if len(batch) > 1 else (batch,):
                each.explain(some, rows)
            alone = len(each.rows) == 1
            seconds[rows] = 0.0 if alone else host_seconds(partial(each.explain, batch, rows), device)
        except RuntimeError as error:
            reason = f"with {rows or 'its own choice of'} rows: {_in_one_line(error)}"
    return (min(seconds, key=seconds.__getitem__), None) if seconds else (None, reason)


def _ceilings(
    contestants: Iterable[Contestant], shapes: Shapes | None, device: str
) -> tuple[dict[str, list[str]], dict[str, rates.Ceiling]]:
    """Return the machine's rates to compare with, at the model's shapes: contestant -> labels, label -> products."""
    labels: dict[str, list[str]] = {}
    made = {}
    for each in contestants:
        if shapes is None or each.gigaflops is None:
            continue
        own, samples = each.ceiling or (None, shapes.rows)
        size = (samples * shapes.tokens, shapes.width, shapes.hidden)
        # about as long as the contestant's own work, so that other load on the machine affects both
        at_least = min(LONG_ENOUGH, each.gigaflops * each.samples)
        for kind in rates.kinds_of(each.precision, device) if own is None else (own,):
            label = f"{kind}, {samples} at a time"
            labels.setdefault(each.name, []).append(label)
            made[label] = rates.ceiling(kind, *size, at_least=at_least, device=device)
    return labels, made


def _share(each: Contestant, images: int, seconds: list[float], most: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return the achieved GFLOP/s as a share of the ceiling's, the fastest of the rates `most`, repeat by repeat."""
    label = rates.fastest(most)
    work = (each.gigaflops or 0.0) * each.samples * images
    return {
        "gigaflops a sample": each.gigaflops,
        "share of ceiling": spread([work / own / rate for own, rate in zip(seconds, most[label], strict=True)]),
        "ceiling": label,
        "ceiling GFLOP/s": spread(most[label]),
        "ceilings GFLOP/s": {each: spread(values)["median"] for each, values in most.items()},
    }
