"""Results summarised for reports: intervals, verdicts and paired differences; and as JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass
from typing import Any

from dave_fast.evaluate import statistics
from dave_fast.evaluate.methods import CONTROLS
from dave_fast.evaluate.settings import METRICS, VARIANTS, Results
from dave_fast.evaluate.statistics import Interval, Verdict

DAVE = "DAVE"


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
    intervals: dict[str, dict[str, dict[str, Interval]]] = {variant: {} for variant in VARIANTS}
    for name, variants in results.scores.items():
        for variant, scored in variants.items():
            found = {metric: statistics.over_images(values) for metric, values in scored.items()}
            intervals[variant][name] = {metric: one for metric, one in found.items() if one.n}
    verdicts: dict[str, dict[str, Verdict]] = {variant: {} for variant in VARIANTS}
    paired: dict[str, dict[str, dict[str, Interval]]] = {variant: {} for variant in VARIANTS}
    for variant in VARIANTS:
        for metric, higher in METRICS.items():
            rivals = _scores(results, variant, metric)
            if DAVE not in rivals or higher is None:
                continue
            judged = statistics.verdict(rivals, higher, DAVE)
            if judged is not None:
                verdicts[variant][metric] = judged
                paired[variant][metric] = {
                    name: statistics.paired(rivals[DAVE], values) for name, values in rivals.items() if name != DAVE
                }
    seeds: dict[str, dict[str, Interval]] = {variant: {} for variant in VARIANTS}
    for name, by_variant in results.seeds.items():
        for variant, means in by_variant.items():
            seeds[variant][name] = statistics.over_seeds(means)
    present = {metric for each in intervals.values() for row in each.values() for metric in row}
    return Summary(intervals, verdicts, paired, seeds, tuple(metric for metric in METRICS if metric in present))


def _scores(results: Results, variant: str, metric: str) -> dict[str, list[float]]:
    """Return the scores of a metric by method, without the controls."""
    rows = {name: variants.get(variant, {}) for name, variants in results.scores.items() if name not in CONTROLS}
    return {name: row[metric] for name, row in rows.items() if metric in row}


def as_json(results: Results, summary: Summary, about: dict[str, Any]) -> dict[str, Any]:
    """Return results for json.dumps, without the scores of single images and the pictures; NaN is None.

    Args:
        results: of the evaluation.
        summary: of the results.
        about: further entries.
    """
    content = {
        **about,
        "facts": results.facts,
        "intervals": _dicts(summary.intervals),
        "verdicts": {variant: {m: _told(one) for m, one in each.items()} for variant, each in summary.verdicts.items()},
        "paired": _dicts(summary.paired),
        "seeds": {"mean EnergyPG a seed": results.seeds, "interval": _dicts(summary.seeds)},
        "curves": {
            protocol: {
                "changed": changed.tolist(),
                "mean": {n: {v: each.nanmean(0).tolist() for v, each in r.items()} for n, r in rows.items()},
            }
            for protocol, (changed, rows) in results.curves.items()
        },
        "randomised": {
            "stages": list(results.randomised[0]),
            "rank correlation": {
                n: {v: each.nanmean(0).tolist() for v, each in r.items()} for n, r in results.randomised[1].items()
            },
        },
        "not run": results.absent,
    }
    return _plain(content)


def _told(found: Verdict) -> dict[str, Any]:
    return asdict(found) | {"words": found.words}


def _dicts(value: Any) -> Any:
    """Return nested dictionaries with their dataclasses as dictionaries."""
    return {key: _dicts(one) for key, one in value.items()} if isinstance(value, dict) else asdict(value)


def _plain(value: Any) -> Any:
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
