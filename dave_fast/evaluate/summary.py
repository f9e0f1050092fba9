"""Results summarised for reports: intervals, verdicts and paired differences; and as JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from torch import Tensor

from dave_fast.evaluate import statistics
from dave_fast.evaluate.methods import CONTROLS
from dave_fast.evaluate.settings import METRICS, VARIANTS, Results
from dave_fast.evaluate.statistics import DAVE, Interval, Verdict


@dataclass(frozen=True)
class Summary:
    """Intervals and verdicts of an evaluation.

    Attributes:
        intervals: variant -> method -> metric -> mean over images.
        verdicts: variant -> metric -> verdict.
        paired: variant -> metric -> baseline -> DAVE minus the baseline on the same images.
        seeds: variant -> method -> mean over seeds.
        metrics: the metrics that have a score, in their fixed order.
    """

    intervals: dict[str, dict[str, dict[str, Interval]]]
    verdicts: dict[str, dict[str, Verdict]]
    paired: dict[str, dict[str, dict[str, Interval]]]
    seeds: dict[str, dict[str, Interval]]
    metrics: tuple[str, ...]

    def best(self, variant: str, metric: str) -> str | None:
        """Return the method with the best mean, controls left out; None if neither direction is better."""
        means = {
            name: each[metric].mean
            for name, each in self.intervals[variant].items()
            if name not in CONTROLS and metric in each and each[metric].n
        }
        higher = METRICS[metric]
        if higher is None or not means:
            return None
        return (max if higher else min)(means, key=lambda name: means[name])


def summarise(results: Results) -> Summary:
    """Compute intervals, verdicts and paired differences of results."""
    found = Summary({}, {}, {}, {}, ())
    for variant in VARIANTS:
        scores = {name: variants[variant] for name, variants in results.scores.items() if variant in variants}
        found.intervals[variant] = {
            name: {metric: one for metric, values in row.items() if (one := statistics.over_images(values)).n}
            for name, row in scores.items()
        }
        found.verdicts[variant], found.paired[variant] = {}, {}
        for metric, higher in METRICS.items():
            rivals = {name: row[metric] for name, row in scores.items() if name not in CONTROLS and metric in row}
            judged = statistics.verdict(rivals, higher) if DAVE in rivals and higher is not None else None
            if judged is not None:
                found.verdicts[variant][metric] = judged
                found.paired[variant][metric] = {
                    name: statistics.paired(rivals[DAVE], values) for name, values in rivals.items() if name != DAVE
                }
        means = {name: variants[variant] for name, variants in results.seeds.items() if variant in variants}
        found.seeds[variant] = {name: statistics.over_seeds(each) for name, each in means.items()}
    present = {metric for each in found.intervals.values() for row in each.values() for metric in row}
    return replace(found, metrics=tuple(metric for metric in METRICS if metric in present))


def as_json(results: Results, summary: Summary, about: dict[str, Any]) -> dict[str, Any]:
    """Return results for json.dumps, without the scores of single images and the pictures; NaN is None.

    Args:
        results: of the evaluation.
        summary: of the results.
        about: further entries.
    """
    stages, correlations = results.randomised
    content = {
        **about,
        "facts": results.facts,
        "intervals": summary.intervals,
        "verdicts": {
            variant: {metric: asdict(one) | {"words": one.words} for metric, one in each.items()}
            for variant, each in summary.verdicts.items()
        },
        "paired": summary.paired,
        "seeds": {"mean EnergyPG a seed": results.seeds, "interval": summary.seeds},
        "curves": {
            protocol: {"changed": changed.tolist(), "mean": means_of(rows)}
            for protocol, (changed, rows) in results.curves.items()
        },
        "randomised": {"stages": stages, "rank correlation": means_of(correlations)},
        "not run": results.absent,
    }
    return _plain(content)


def means_of(rows: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """Return the means over images of curves (n, points) by method and variant, (points,) each."""
    return {name: {v: each.nanmean(0).tolist() for v, each in row.items()} for name, row in rows.items()}


def _plain(value: Any) -> Any:
    """Return a value with its dataclasses as dictionaries, its tuples as lists, and None for NaN and infinities."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(results: Results) -> str:
    """Return every score of every image as CSV; the column `number` counts the images of a metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("method", "variant", "metric", "number", "score"))
    for name, variants in results.scores.items():
        for variant, scored in variants.items():
            for metric, values in scored.items():
                writer.writerows((name, variant, metric, i, f"{value:.6g}") for i, value in enumerate(values))
    return out.getvalue()
