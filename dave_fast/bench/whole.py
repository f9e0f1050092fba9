"""The engine as its users meet it, and whatever stands beside it: from images to maps.

A contestant explains images with S samples. Every row says: images a second at the best micro-batch that was tried;
the time that one image takes (median, and the 99th percentile of at least 100 runs); memory; the share of the
machine's own matrix-product rate, taken repeat by repeat; and how far its contributions are from float64 at equal
draws. The truth is the frozen route in float64, and the rule is the tests': at most twice the error of plain PyTorch
in the same precision. fp8 has no plain form to be held against: its final maps must correlate with fp32's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.bench import rates
from dave_fast.bench.agreement import RATIO, distance
from dave_fast.bench.shapes import Shapes
from dave_fast.bench.timing import host_seconds, in_turns, peak_memory, spread
from dave_fast.explainer import DAVE
from dave_fast.metrics import correlation
from dave_fast.sampling import Draws, draw

NOISE_ALPHA = 0.5
# rows (image, sample) of which contributions are compared
CHECKED = 4
MAPS_MUST_AGREE = {"bf16": 0.999, "fp8": 0.99}
Explain = Callable[[Tensor, int | None], Any]


@dataclass
class Contestant:
    """Something that explains images.

    explain: images (B, C, H, W), rows of a micro-batch (None: its own choice) -> maps · contributions: images and
    draws, one row an image -> (R, C, H, W); None where the method has other contributions than DAVE ·
    gigaflops: arithmetic of one sample · samples: S · rows: micro-batches to choose the best of · not_measured: why
    it cannot run here.
    """

    name: str
    precision: str
    samples: int
    explain: Explain = lambda images, rows: None
    contributions: Callable[[Tensor, Draws], Tensor] | None = None
    gigaflops: float | None = None
    rows: tuple[int | None, ...] = (None,)
    not_measured: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """Contributions (R, C, H, W) of `draws` in float64, and the errors of plain PyTorch by precision."""

    images: Tensor
    draws: Draws
    target: int
    contributions: Tensor
    plain: dict[str, float]


def dave(model: nn.Module, precision: str, samples: int, **settings: Any) -> Contestant:
    """dave-fast itself. settings: of DAVE. Raises what DAVE raises."""
    explainer = DAVE(model, precision=precision, noise_alpha=NOISE_ALPHA, **settings)

    def explain(images: Tensor, rows: int | None) -> Tensor:
        return explainer.explain(images, 0, samples, internal_batch_size=rows).maps

    def contributions(images: Tensor, draws: Draws) -> Tensor:
        return single_samples(explainer, images)

    return Contestant(f"dave-fast {precision}", precision, samples, explain, contributions)


def single_samples(explainer: DAVE, images: Tensor) -> Tensor:
    """Contributions of sample 0 of every image, drawn under keys 0, 1 ...: the mean of one sample is that sample."""
    return explainer.explain(images, 0, 1, image_keys=range(len(images))).raw


def find_truth(model: nn.Module, image: Tensor, precisions: Sequence[str], device: str) -> Truth:
    """float64 contributions of one image at CHECKED draws, by the frozen route, which is plain PyTorch's autograd."""
    images = image.expand(CHECKED, *image.shape).contiguous()
    explain = partial(DAVE, model, noise_alpha=NOISE_ALPHA, route="frozen", backend="torch", device=device)
    exact = explain(precision="fp64")
    draws = draw(
        1, height=image.shape[1], width=image.shape[2], image_keys=range(CHECKED), sampling=exact.sampling
    )
    # `raw` is handed out in float32: its rounding is far below any precision's error but float64's
    contributions = single_samples(exact, images).double()
    plain = {
        precision: distance((single_samples(explain(precision=precision), images),), (contributions,))
        for precision in precisions
        if precision in ("fp32", "bf16")
    }
    return Truth(images, draws, 0, contributions, plain)


def refusal(precision: str, error: float, truth: Truth, ratio: float = RATIO) -> str | None:
    """Why contributions with this error are none to report; None where they are."""
    if not error < 1:
        return f"its contributions are {error:.1e} away from float64's (relative, Euclidean)"
    plain = truth.plain.get("fp32" if precision in ("fp64", "tf32") else precision)
    limit = None if plain is None or precision == "tf32" else ratio * max(plain, torch.finfo(torch.float32).eps)
    if limit is not None and error > limit:
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
        if reason is None:
            progress(f"{each.name}: micro-batch")
            row["rows"], reason = _best_rows(each, batch, device)
        if reason is None:
            running[each.name] = each
        else:
            row["not measured"] = reason
    progress("throughput")
    best = {name: rows[name]["rows"] for name in running}
    ceilings = _ceilings(running.values(), shapes, device)
    calls = {name: [partial(each.explain, batch, best[name])] for name, each in running.items()}
    calls |= {kind: [made.run] for kind, made in ceilings.items()}
    seconds = in_turns(calls, repeats, device, warmup=1, budget=budget, host=True)
    progress("one image")
    single = {name: [partial(each.explain, batch[:1], best[name])] for name, each in running.items()}
    waits = in_turns(single, latencies, device, warmup=1, budget=budget, host=True)
    for name, each in running.items():
        row = rows[name]
        row["images a second"] = spread([images / s for s in seconds[name]])
        row["seconds an image"] = spread(waits[name])
        row["peak bytes"] = peak_memory(partial(each.explain, batch, best[name]), device)
        row |= _share(each, seconds, ceilings, images, device)
    return list(rows.values())


def _try(each: Contestant, truth: Truth, row: dict[str, Any]) -> str | None:
    """The contestant's error against float64 into its row; why it is not timed."""
    if each.contributions is None:
        return None
    try:
        found = each.contributions(truth.images, truth.draws)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {error}"
    row["error"] = distance((found.to(truth.contributions.device),), (truth.contributions,))
    row["plain error"] = truth.plain.get(each.precision)
    return refusal(each.precision, row["error"], truth)


def _best_rows(each: Contestant, batch: Tensor, device: str) -> tuple[int | None, str | None]:
    """The fastest micro-batch of those that fit; why there is none."""
    if len(each.rows) == 1:
        return each.rows[0], None
    seconds: dict[int | None, float] = {}
    reason = "none of its micro-batches was tried"
    for rows in each.rows:
        try:
            each.explain(batch, rows)
            seconds[rows] = host_seconds(partial(each.explain, batch, rows), device)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory with {rows} rows: {error}"
            torch.cuda.empty_cache()
    return (min(seconds, key=seconds.__getitem__), None) if seconds else (None, reason)


def _ceilings(contestants: Any, shapes: Shapes | None, device: str) -> dict[str, rates.Ceiling]:
    """The machine's rates in the precisions that run, at the model's shapes."""
    if shapes is None:
        return {}
    kinds = {rates.kind_of(each.precision, device) for each in contestants if each.gigaflops is not None}
    tokens = shapes.rows * shapes.tokens
    return {kind: rates.ceiling(kind, tokens, shapes.width, shapes.hidden, device=device) for kind in sorted(kinds)}


def _share(
    each: Contestant, seconds: dict[str, list[float]], ceilings: dict[str, rates.Ceiling], images: int, device: str
) -> dict[str, Any]:
    """Achieved GFLOP/s over the ceiling's, repeat by repeat."""
    kind = rates.kind_of(each.precision, device) if each.gigaflops is not None else None
    if each.gigaflops is None or kind not in ceilings:
        return {}
    work = each.gigaflops * each.samples * images
    most = [ceilings[kind].gigaflops / s for s in seconds[kind]]
    shares = [work / own / rate for own, rate in zip(seconds[each.name], most, strict=True)]
    return {
        "gigaflops a sample": each.gigaflops,
        "share of ceiling": spread(shares),
        "ceiling": kind,
        "ceiling GFLOP/s": spread(most)["median"],
    }
