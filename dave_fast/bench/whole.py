"""The engine as its users meet it, and whatever stands beside it: from images to maps.

A contestant explains images with S samples. Every row says: images a second at the best micro-batch that was tried;
the time that one image takes (median, and the 99th percentile of at least 100 runs); memory; the share of the
machine's own matrix-product rate, taken repeat by repeat; and how far its contributions are from float64 at equal
draws. What fails has its reason in its row, and the others keep theirs.

The truth is the frozen route in float64, and the rule is the tests': at most twice the error of plain PyTorch
in the same precision.
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
# the plain form of a precision: autograd, which has no e4m3; there the engine with every op in PyTorch's form
PLAIN = {"fp32": "frozen", "bf16": "frozen", "fp8": "engine"}
# different images of which contributions are compared, a sample of each
CHECKED = 4
MAPS_MUST_AGREE = {"bf16": 0.999, "fp8": 0.99}
# GFLOP of matrix products that a rate is measured by, at most
LONG_ENOUGH = 60.0
Explain = Callable[[Tensor, int | None], Any]


@dataclass
class Contestant:
    """Something that explains images.

    explain: images (B, C, H, W), rows of a micro-batch (None: its own choice) -> maps · contributions: images and
    draws, one row an image -> (R, C, H, W); None where the method has other contributions than DAVE ·
    gigaflops: arithmetic of one sample · rows: micro-batches to choose the best of · ceiling: (kind, rows of one
    sample) that it is held against; None: the precision's best, at a micro-batch of the model · not_measured: why it
    cannot run here.
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
    """Contributions (R, C, H, W) of `draws` in float64; by precision those of plain PyTorch, and their errors."""

    images: Tensor
    draws: Draws
    contributions: Tensor
    plain: dict[str, float]
    plain_contributions: dict[str, Tensor] = field(default_factory=dict)


def dave(model: nn.Module, precision: str, samples: int, shapes: Shapes | None, **settings: Any) -> Contestant:
    """dave-fast itself. settings: of DAVE. Raises what DAVE raises."""
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
    """One row an image, of class 0."""
    return explainer.contributions(images, draws, torch.zeros(len(images), 1, dtype=torch.int64))[0]


def find_truth(model: nn.Module, images: Tensor, precisions: Sequence[str], device: str) -> Truth:
    """Return float64 contributions at one draw of each image, by autograd, and those of plain PyTorch.

    Args:
        images: (CHECKED, C, H, W), no two alike: a row that is given another row's image must show.
        precisions: that contestants have; float64 has no plain form, since its error must be next to nothing.
    """
    if len(images.flatten(1).unique(dim=0)) != CHECKED:
        raise InputError(f"images must be {CHECKED} different ones, (C, H, W) each; got {tuple(images.shape)}")
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


def refusal(precision: str, error: float, truth: Truth, ratio: float = RATIO) -> str | None:
    """Why contributions with this error are none to report; None where they are."""
    if not error < 1:
        return f"its contributions are {error:.1e} away from float64's (relative, Euclidean)"
    if precision == "fp64":
        limit, plain = EXACT, 0.0
    elif precision in truth.plain:
        plain = truth.plain[precision]
        limit = ratio * max(plain, torch.finfo(torch.float32).eps)
    else:
        return f"nothing was computed plainly in {precision} to hold its contributions against"
    if error > limit:
        return f"its error against float64 is {error:.1e}; at most {limit:.1e} is allowed (plain PyTorch: {plain:.1e})"
    return None


def map_agreement(low: DAVE, exact: DAVE, images: Tensor, samples: int) -> float:
    """The lowest Pearson correlation of the final maps over the images, at equal draws."""
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
    """A row for each contestant.

    images: explained at once for throughput. repeats, latencies: runs of either. budget: seconds for each of the two,
    over all contestants. shapes: of the model, for its ceiling; None leaves that out.
    """
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Contestant] = {}
    batch = truth.images[:1].expand(images, -1, -1, -1).contiguous()
    for each in contestants:
        progress(f"{each.name}: agreement")
        rows[each.name] = row = {"name": each.name, "precision": each.precision, "samples": each.samples, **each.notes}
        reason = each.not_measured or _try(each, truth, row)
        if reason is None and "reason" not in row:
            progress(f"{each.name}: micro-batch")
            row["rows"], reason = _best_rows(each, batch, device)
        if reason is not None:
            row["not measured"] = reason
        elif "reason" not in row:
            running[each.name] = each
    best = {name: rows[name]["rows"] for name in running}
    ceilings = _ceilings(running.values(), shapes, device)

    def timed(some: Tensor, repeats: int, others: Mapping[str, rates.Ceiling]) -> dict[str, list[float]]:
        calls: dict[str, list[Callable[[], Any]]]
        calls = {name: [partial(each.explain, some, best[name])] for name, each in running.items()}
        calls |= {label: [made.run] for label, made in others.items()}
        return in_turns(calls, repeats, device, budget=budget, host=True)

    progress("throughput")
    seconds = timed(batch, repeats, ceilings)
    progress("one image")
    # where one image is all there is, its runs are those that were just timed
    waits = timed(batch[:1], latencies, {}) if images > 1 or latencies > repeats else seconds
    for name, each in running.items():
        row = rows[name]
        row["images a second"] = spread([images / s for s in seconds[name]])
        row["seconds an image"] = spread(waits[name])
        row["peak bytes"] = peak_memory(partial(each.explain, batch, best[name]), device)
        row |= _share(each, seconds, ceilings, shapes, images, device)
    return list(rows.values())


def _try(each: Contestant, truth: Truth, row: dict[str, Any]) -> str | None:
    """The contestant's error against float64 into its row, with a "reason" where it is too large; why it cannot run."""
    if each.contributions is None:
        return None
    try:
        found = each.contributions(truth.images, truth.draws)
    except RuntimeError as error:
        return _said(error)
    row["error"] = distance((found.to(truth.contributions.device),), (truth.contributions,))
    row["plain error"] = truth.plain.get(each.precision)
    refused = refusal(each.precision, row["error"], truth) or _refused_in_a_part(each.precision, found, truth)
    if refused is not None:
        row["reason"] = refused
    return None


def _refused_in_a_part(precision: str, found: Tensor, truth: Truth) -> str | None:
    """Why contributions are refused that are near float64's as a whole: those of a sample or tile are not.

    Single pixels are not looked at: after twelve blocks of a narrow arithmetic a few of them are far off by chance.
    """
    if precision not in truth.plain_contributions:
        return None
    plain, exact = truth.plain_contributions[precision], truth.contributions
    return agreement.refusal(
        found.to(exact), plain.to(exact), exact, scales=("an image", "a row", "a column", "a tile")
    )


def _said(error: RuntimeError) -> str:
    """An error in one line: why a contestant, or one of its micro-batches, has no figures."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"out of memory: {error}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _best_rows(each: Contestant, batch: Tensor, device: str) -> tuple[int | None, str | None]:
    """The fastest micro-batch of those that fit; why there is none."""
    seconds: dict[int | None, float] = {}
    reason = "none of its micro-batches was tried"
    for rows in each.rows:
        try:
            for some in (batch, batch[:1]) if len(batch) > 1 else (batch,):
                each.explain(some, rows)
            alone = len(each.rows) == 1
            seconds[rows] = 0.0 if alone else host_seconds(partial(each.explain, batch, rows), device)
        except RuntimeError as error:
            reason = f"with {rows or 'its own choice of'} rows: {_said(error)}"
    return (min(seconds, key=seconds.__getitem__), None) if seconds else (None, reason)


def _ceiling_of(each: Contestant, shapes: Shapes | None, device: str) -> tuple[str, int] | None:
    """(kind, samples at a time) of the rate that a contestant is held against; None for none."""
    if shapes is None or each.gigaflops is None:
        return None
    return each.ceiling or (rates.kind_of(each.precision, device), shapes.rows)


def _ceilings(contestants: Iterable[Contestant], shapes: Shapes | None, device: str) -> dict[str, rates.Ceiling]:
    """The machine's rates that the contestants are held against, at the model's shapes."""
    made = {}
    for each in contestants:
        against = _ceiling_of(each, shapes, device)
        if against is None or shapes is None or each.gigaflops is None:
            continue
        size = (against[1] * shapes.tokens, shapes.width, shapes.hidden)
        # as long as a contestant's own work, so that it sees the same weather, but no longer
        at_least = min(LONG_ENOUGH, each.gigaflops * each.samples)
        made[_label(*against)] = rates.ceiling(against[0], *size, at_least=at_least, device=device)
    return made


def _label(kind: str, samples: int) -> str:
    return f"{kind}, {samples} at a time"


def _share(
    each: Contestant,
    seconds: dict[str, list[float]],
    ceilings: dict[str, rates.Ceiling],
    shapes: Shapes | None,
    images: int,
    device: str,
) -> dict[str, Any]:
    """Achieved GFLOP/s over the ceiling's, repeat by repeat."""
    against = _ceiling_of(each, shapes, device)
    if against is None or each.gigaflops is None:
        return {}
    label = _label(*against)
    work = each.gigaflops * each.samples * images
    most = [ceilings[label].gigaflops / s for s in seconds[label]]
    shares = [work / own / rate for own, rate in zip(seconds[each.name], most, strict=True)]
    return {
        "gigaflops a sample": each.gigaflops,
        "share of ceiling": spread(shares),
        "ceiling": label,
        "ceiling GFLOP/s": spread(most),
    }
