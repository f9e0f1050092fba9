"""The head of docs/performance.md: a chart and three sentences, from the results of `benchmarks.side_by_side`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dave_fast.bench.report import duration
from dave_fast.bench.timing import spread
from dave_fast.images.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE = Path("figures") / "speed.png"
OURS, THEIRS, PEERS = "dave-fast ", "the authors' code, fp32", "PyTorch "
AUTHORS, COMPILED = "the authors' code", "the best compiled PyTorch"
# from the finest to the coarsest, with the colour of each
PRECISIONS = {"fp32": "0.45", "bf16": "C0", "fp8": "C1", "int8": "C3"}
# the model of the sentences, where it was measured
USUAL = "vit_base_patch16_224"
TEXT = """![Times the speed of {authors} and of {compiled}, by precision, model and CPU]({figure})

*Images a second over those of {authors} (float32) and of {compiled}, which is the fastest of our own
[PyTorch forms](bench.md#pages-and-peers) in the same precision or a finer one, at its best micro-batch. Medians of the
repeats of one run, in turns; whiskers from the lowest to the highest.*

{sentences}
"""


def section(results: Sequence[dict[str, Any]], folder: Path) -> str:
    """Write the chart in `folder`/figures and return the head of the page, empty without results to draw.

    Args:
        results: of `benchmarks.side_by_side`, among others, which are left out.
        folder: of the page.
    """
    compared = [result for result in results if speedups(result)]
    if not compared:
        return ""
    compared.sort(key=_place)
    save_figure(plot(compared), folder / FIGURE)
    said = " ".join(sentences(compared[0]))
    return TEXT.format(authors=AUTHORS, compiled=COMPILED, figure=FIGURE, sentences=said)


def speedups(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by precision of dave-fast its speed over that of AUTHORS and of COMPILED, where they were timed."""
    rows = {row["name"]: row for row in result.get("engine", ()) if "images a second" in row}
    found = {}
    for precision in PRECISIONS:
        own = rows.get(OURS + precision)
        if own is None:
            continue
        others = {AUTHORS: rows.get(THEIRS), COMPILED: best_peer(rows, precision)}
        found[precision] = {name: _ratio(own, row) for name, row in others.items() if row is not None}
    return {precision: ratios for precision, ratios in found.items() if ratios}


def best_peer(rows: Mapping[str, dict[str, Any]], precision: str) -> dict[str, Any] | None:
    """Return the row of the fastest peer in PyTorch in a precision or a finer one, or None."""
    finer = list(PRECISIONS)[: list(PRECISIONS).index(precision) + 1]
    peers = [row for name, row in rows.items() if name.startswith(PEERS) and row["precision"] in finer]
    return max(peers, key=lambda row: row["images a second"]["median"], default=None)


def _ratio(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the spread of the ratio of images a second, repeat by repeat."""
    pairs = zip(own["images a second"]["all"], other["images a second"]["all"], strict=False)
    return spread([mine / theirs for mine, theirs in pairs])


def sentences(result: dict[str, Any]) -> list[str]:
    """Return what a result says in three sentences: seconds, times faster, agreement of maps."""
    setting, where, found = result["setting"], result["environment"], speedups(result)
    seconds = {row["name"]: row["seconds an image"]["median"] for row in result["engine"] if "seconds an image" in row}
    took = _listed([f"{duration(seconds[OURS + precision])} in {precision}" for precision in found])
    isa = f", {where['isa']}" if where.get("isa") else ""
    said = [
        f"A map of {setting['model']} ({setting['image']}, S = {setting['samples']}) takes {took} on "
        f"{where['device']} ({where['threads']} threads{isa})."
    ]
    times = []
    for name in (AUTHORS, COMPILED):
        medians = [f"{r[name]['median']:.2f} ({precision})" for precision, r in found.items() if name in r]
        times += [f"{_listed(medians)} times the speed of {name}"] if medians else []
    said.append(f"That is {_listed(times)}.")
    agreement = {name: value for name, value in result.get("agreement", {}).items() if isinstance(value, float)}
    maps = _listed([f"{value:.5f} ({precision})" for precision, value in agreement.items()])
    said.append(
        f"Final maps of the demo model, whose weights are trained, correlate with float32's at equal draws by {maps} "
        "or more."
        if maps
        else "Contributions at equal draws differ from float64's by rounding, at most twice as much as plain PyTorch's."
    )
    return said


def _listed(parts: list[str]) -> str:
    """Return words with commas and "and" between."""
    *before, last = parts or [""]
    return f"{', '.join(before)} and {last}" if before else last


def _place(result: dict[str, Any]) -> tuple[bool, int, str, str]:
    """Return what results are sorted by: the usual model first, and what runs in most precisions."""
    model = result["setting"]["model"]
    return model != USUAL, -len(speedups(result)), model, _where(result)


def _where(result: dict[str, Any]) -> str:
    where = result["environment"]
    return f"{where['device']}, {where['isa']}" if where.get("isa") else str(where["device"])


def plot(results: Sequence[dict[str, Any]]) -> Figure:
    """Draw the ratios as bars: a panel for each of AUTHORS and COMPILED, a group for each result, a bar a precision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = sum(len(speedups(result)) for result in results)
    figure = Figure(figsize=(9.6, 1.1 + 0.26 * bars + 0.3 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, (AUTHORS, COMPILED), strict=True):
        _panel(axes, results, name)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in PRECISIONS if name in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure


def _panel(axes: Axes, results: Sequence[dict[str, Any]], name: str) -> None:
    """Draw the ratios to one contestant, downwards in the order of the results."""
    at, ticks, labels = 0.0, [], []
    for result in results:
        found = speedups(result)
        for number, (precision, ratios) in enumerate(found.items()):
            if name in ratios:
                ratio = ratios[name]
                ends = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
                axes.barh(at + number, ratio["median"], 0.8, color=PRECISIONS[precision], label=precision)
                axes.errorbar(ratio["median"], at + number, xerr=ends, color="0.2", lw=0.8, capsize=2, ls="")
                axes.text(ratio["max"], at + number, f"  {ratio['median']:.2f}", va="center", fontsize=7.5)
        setting = result["setting"]
        ticks.append(at + (len(found) - 1) / 2)
        labels.append(f"{setting['model']}, {setting['image']}\nS = {setting['samples']}, {_where(result)}")
        at += len(found) + 1
    axes.axvline(1, color="0.5", lw=0.8, ls=":")
    axes.set_yticks(ticks, labels, fontsize=7.5)
    axes.set_ylim(at - 1.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"times the speed of {name}", fontsize=8)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
