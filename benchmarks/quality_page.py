"""The section of docs/performance.md about quality for time, and its plot, from the result of that benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality_forms import AUTHORS
from dave_fast.bench.machine import slug
from dave_fast.bench.report import duration
from dave_fast.images.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTION = """## Quality for time: {title}

How long does an image take until its map is good? {photographs} photographs with boxes ({half}), noise_alpha
{noise_alpha:g}, one photograph a call, on {device} ({isa}), {threads} threads.

*EnergyPG* is the share of the map inside the object's box. *Correlation* is that with the map that DAVE tends to: the
paper's map of other draws at S = {limit_samples}, for {limits} of the photographs. dave-fast's maps are
[shrunk](guide.md#shrinkage), which takes away most of what noise adds to the background at a small S; "the paper's map"
is without that.

{verdict}

![EnergyPG and correlation against seconds an image]({figure})

*Points: S = {samples}. Bars: 95 % intervals over the photographs. These are the same for all
methods, so that differences between methods are known better than the bars say.*

When is the quality of the authors' code at S = {of} reached, and how many times faster is that? Intervals are over
photographs and rounds of timing; between two measured S the quality is interpolated in log S.

{reached}

{tables}

- {shrinkage}
- Times are of calls with that S. For quality, DAVE's maps of a smaller S are made of the samples of the largest: the
  first ones, for the authors' code those at the noise levels of the smaller S.
- All maps are smoothed alike, also those of integrated gradients and SmoothGrad (captum, ⊙ input, S passes). These two
  tend to maps of their own: the correlation says how much they resemble DAVE's map, not how good they are.
- No line of the authors' code was changed. It takes timm's VisionTransformer, replaces attention, LayerNorm and GELU,
  and leaves the rest, such as LayerScale, to autograd. It needs kornia and PyYAML; `benchmarks/authors.py` gives it the
  model and drops the argument `is_causal`, which newer releases of timm pass to attention. It draws anew at every call,
  so that its figures vary from run to run.
{absent}
Commit {commit}, {versions}. The run took {minutes:.0f} minutes.
"""
AGAIN = """
    git clone https://github.com/a-vrobell/DAVE build/authors      # and: pip install kornia pyyaml captum
    python -m benchmarks.quality_for_time MODEL PHOTOS --boxes BOXES --authors build/authors
    python -m benchmarks.performance_page
"""
FASTER = (
    "**dave-fast ({name}) reaches the EnergyPG that the authors' code has at S = {of} in {seconds} an image instead of "
    "{theirs}: {times} times faster** ({low:.3g} to {high:.3g})."
)
NEVER = "**dave-fast ({name}) does not reach the EnergyPG that the authors' code has at S = {of}.**"
NO_AUTHORS = "The authors' code was not run, so that there is no time to its quality."
LABELS = {"EnergyPG": "EnergyPG", "correlation": "correlation with the limit"}
COLOURS = ("C3", "C0", "C1", "C9", "0.2", "C2", "C4")


def section(result: dict[str, Any], folder: Path) -> str:
    """Write the plot in `folder`/figures and return the section.

    Args:
        result: of `benchmarks.quality_for_time`.
        folder: of the page.
    """
    setting, where = result["setting"], result["environment"]
    figure = Path("figures") / f"quality_for_time_{slug(where['device'])}.png"
    save_figure(plot(result), folder / figure)
    cost = result["shrinkage"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number != "not installed")
    return SECTION.format(
        title=setting["title"] or "a trained model",
        **{key: setting[key] for key in ("photographs", "half", "noise_alpha", "limits", "limit_samples")},
        **{key: where[key] for key in ("device", "isa", "threads", "commit")},
        verdict=verdict(result),
        figure=figure,
        samples=", ".join(map(str, sorted({row["samples"] for row in result["forms"]}))),
        of=setting["of"],
        reached="\n\n".join(reached_table(result, kind) for kind in LABELS)
        if result["time to quality"]
        else NO_AUTHORS,
        tables="\n\n".join(table(result, heading, cell) for heading, cell in CELLS),
        shrinkage=f"Shrinkage changes the time of a call by {cost['median'] - 1:+.1%} ({cost['low'] - 1:+.1%} to "
        f"{cost['high'] - 1:+.1%}; {cost['pairs']} pairs of calls with and without it, side by side, of 16 samples or "
        "more).",
        absent="".join(f"- Not measured: {name}: {why}.\n" for name, why in result["not measured"].items()),
        versions=versions,
        minutes=result["seconds of the run"] / 60,
    )


def verdict(result: dict[str, Any]) -> str:
    """Return the sentence with the ratio of the default form."""
    if not result["time to quality"]:
        return NO_AUTHORS
    row = result["time to quality"][0]
    name = row["name"].removeprefix("dave-fast ")
    if row["ratio"] is None:
        return NEVER.format(name=name, of=row["of"])
    theirs = next(r for r in result["forms"] if r["name"] == AUTHORS and r["samples"] == row["of"])
    times = ("at least " if row["at_least"] else "") + f"{row['ratio']:.3g}"
    return FASTER.format(
        **{key: row[key] for key in ("of", "low", "high")},
        name=name,
        seconds=duration(row["seconds"]),
        theirs=duration(theirs["seconds"]["median"]),
        times=times,
    )


def reached_table(result: dict[str, Any], kind: str) -> str:
    """Return the table of times to the authors' quality in one score, a line for each method."""
    rows = {row["name"]: _cells(row) for row in result["time to quality"] if row["score"] == kind}
    return _table([f"until the authors' {LABELS[kind]}", "S", "an image", "times faster"], rows)


def _cells(row: dict[str, Any]) -> list[str]:
    """Return S, time and ratio of one comparison."""
    if row["ratio"] is None:
        return ["not reached", "", "" if row["share"] == 0 else f"reached in {row['share']:.0%} of resamples"]
    edge = ("≤ ", "≤ ", "≥ ") if row["at_least"] else ("", "", "")
    low = f"{row['low']:.3g}" if row["low"] else "not reached"
    cells = (f"{row['samples']:.3g}", duration(row["seconds"]), f"{row['ratio']:.3g} ({low} to {row['high']:.3g})")
    return [before + cell for before, cell in zip(edge, cells, strict=True)]


def table(result: dict[str, Any], heading: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table with a line for each method and a column for each S."""
    rows = {(row["name"], row["samples"]): row for row in result["forms"]}
    samples = sorted({s for _, s in rows})
    names = dict.fromkeys(name for name, _ in rows)
    cells = {name: [cell(rows[name, s]) if (name, s) in rows else "" for s in samples] for name in names}
    return _table([f"{heading} at S =", *map(str, samples)], cells)


CELLS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("seconds an image", lambda row: f"{row['seconds']['median']:.3g}"),
    ("EnergyPG", lambda row: f"{row['EnergyPG']['mean']:.3f}"),
    ("correlation", lambda row: f"{row['correlation']['mean']:.3f}"),
)


def plot(result: dict[str, Any]) -> Figure:
    """Draw each score against seconds an image, a line for each method; dotted, the authors' at the S to be reached."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["name"] for row in result["forms"]))
    for axes, kind in zip(figure.subplots(1, 2), LABELS, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            rows = [row for row in result["forms"] if row["name"] == name]
            x = [row["seconds"]["median"] for row in rows]
            y = [row[kind]["mean"] for row in rows]
            across = [[abs(row["seconds"][end] - row["seconds"]["median"]) for row in rows] for end in ("min", "max")]
            bars = [[abs(row[kind][end] - row[kind]["mean"]) for row in rows] for end in ("low", "high")]
            style = "--" if "paper's map" in name else "-"
            axes.errorbar(x, y, bars, across, color=colour, ls="", elinewidth=0.7, alpha=0.35)
            axes.plot(x, y, style, color=colour, marker="o", ms=3.5, lw=1.3, label=name)
            if name == AUTHORS:
                at = [row["samples"] for row in rows].index(result["setting"]["of"])
                axes.axhline(y[at], color=colour, lw=0.8, ls=":")
        axes.set(xscale="log", xlabel="seconds an image", ylabel=LABELS[kind])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _table(headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown table whose first column has the names of the rows."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
