"""The bench's results as a page for the docs: tables and plots, made from the JSON files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dave_fast.bench.case import label
from dave_fast.bench.machine import slug
from dave_fast.bench.report import duration, engine_cells, why_missing
from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.files import atomically
from dave_fast.images.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = "performance.md"
INTRODUCTION = """# Performance

{top}{gpu}
"""
READING = """## How to read the tables of speed

Every figure was measured in one run, in turns with what it is compared with, on the machine named above it, but for
memory against resolution on a CPU, which is the engine's own formula. *One image* is what someone who waits for one map
sees (median; 99th percentile where at least 100 runs were made, else the slowest of them and their number). *Of
ceiling* is the achieved rate over the machine's own rate for matrix products at the model's shapes, measured in
between, repeat by repeat; what is counted is the least arithmetic that the result takes, whatever a form does besides
(dave-fast walks the image itself forward once more, for its prediction and probability). *Error* is the relative
distance of single contributions from float64 at equal draws, and beside it that of plain PyTorch in the same precision:
a form with more than twice that is refused, not reported. *Times* is the ratio of images a second, repeat by repeat:
median, lowest and highest.
"""
NO_GPU = "**Nothing here was measured on a GPU yet.** `scripts/gpu` does it there, in two commands."
NOTHING = "No result of the bench is kept here yet.\n"
GPU = "Devices: {devices}."
AGAIN = """## Again

    dave-fast bench --op all --model {model} --samples {samples} --docs docs/    # ops and engine, anywhere
    python -m benchmarks.side_by_side --model {model} --samples {samples}        # beside the peers, from a checkout
    scripts/gpu short; scripts/gpu full                                          # on a GPU machine
"""


def write_page(
    results: Sequence[dict[str, Any]], folder: Path, *, top: str = "", first: Sequence[str] = (), again: str = ""
) -> Path:
    """Write `folder`/performance.md and its plots in `folder`/figures; return the path of the page.

    Args:
        results: comparisons make sections before ops; those of a single row, with nothing to plot, share the last one.
        folder: of the documents.
        top: what the page starts with.
        first: sections to put before those of the results.
        again: further commands.
    """
    alone = [r for r in results if len(r.get("engine", ())) == 1 and not any(r.get(key) for _, _, key, _ in PLOTS)]
    whole = [result for result in results if result not in alone]
    whole.sort(key=lambda result: bool(result.get("ops")))
    parts = [_section(result, folder) for result in whole] + ([_engines(alone)] if alone else [])
    gpus = sorted({r["environment"]["device"] for r in results if r["setting"]["device"] == "cuda"})
    gpu = GPU.format(devices=", ".join(gpus)) if gpus else NO_GPU
    usual = {"model": "vit_base_patch16_224", "samples": DEFAULT_SAMPLES}
    settings = (result["setting"] for result in [*whole, *alone])
    setting = max(settings, key=lambda each: each["samples"], default=usual)
    end = AGAIN.format(model=setting["model"], samples=setting["samples"]) + again
    text = "\n".join(
        [INTRODUCTION.format(top=f"{top}\n" if top else "", gpu=gpu), *first, READING, *(parts or [NOTHING]), end]
    )
    path = folder / PAGE
    with atomically(path) as file:
        file.write(text.encode())
    return path


def _engines(results: Sequence[dict[str, Any]]) -> str:
    """Return one section of results that have the engine alone, a line for each."""
    rows, lines = [], []
    for result in results:
        setting = result["setting"]
        what = f"{setting['model']}, {setting['image']}, S = {setting['samples']}"
        rows += [row | {"name": f"{what}: {row['name']}"} for row in result.get("engine", ())]
        lines += [_measured_on(result), *_lines(result)]
    said = [f"- {line}" for line in dict.fromkeys(lines)]
    return "\n".join(["## Models and sizes", "", engine_markdown(rows), "", *said]) + "\n"


def _measured_on(result: dict[str, Any]) -> str:
    """Return the environment of a result in words."""
    where = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number != "not installed")
    isa = f", {where['isa']}" if where.get("isa") else ""
    said = f"{where['device']}, {where['threads']} threads{isa}; commit {where['commit']}"
    return f"{said}, Python {where['python']}, {versions}."


def _lines(result: dict[str, Any]) -> list[str]:
    """Return what there is to say below the tables of a result."""
    lines = _trust(result)
    passed = [name for name, said in result.get("tests", {}).items() if said.startswith("passed")]
    if passed:
        lines.append(f"Tests passed of: {', '.join(passed)}.")
    lines += [f"{name}: tests {said}." for name, said in result.get("tests", {}).items() if name not in passed]
    return lines + [f"Refused: {reason}." for reason in result.get("red", ())]


def _section(result: dict[str, Any], folder: Path) -> str:
    """Return the section of one result: environment, tables, plots."""
    setting, where = result["setting"], result["environment"]
    what = "Op by op" if result.get("ops") else "Side by side" if len(result["engine"]) > 1 else "The engine"
    lines = [
        f"## {what}: {', '.join(_names(result))}",
        "",
        _measured_on(result) + (f" {setting['note']}" if setting.get("note") else ""),
        "",
    ]
    if result.get("engine"):
        lines += [engine_markdown(result["engine"]), ""]
    if result.get("ops"):
        lines += [ops_markdown(result["ops"]), ""]
    lines += [f"- {line}" for line in _lines(result)]
    for name, alt, key, draw in PLOTS:
        if result.get(key):
            figure = Path("figures") / f"{name}_{slug(' '.join([where['device'], *_names(result)]))}.png"
            save_figure(draw(result), folder / figure)
            lines += ["", f"![{alt}]({figure})"]
    return "\n".join(lines) + "\n"


def _names(result: dict[str, Any]) -> list[str]:
    """Return what tells a result from others of its machine: without all of it figures would have the same name."""
    setting, isa = result["setting"], result["environment"].get("isa")
    op = [f"{setting['op']} in {setting['precision']}"] if result.get("ops") and "op" in setting else []
    return [setting["model"], setting["image"], f"S = {setting['samples']}", *op, *([isa] if isa else [])]


def _trust(result: dict[str, Any]) -> list[str]:
    """Return lines with the agreement of final maps and reasons not to trust the ratios."""
    lines = [
        f"Final maps of the demo model, {precision} to fp32: Pearson ≥ {value:.5f}."
        for precision, value in result.get("agreement", {}).items()
        if isinstance(value, float)
    ]
    return lines + [f"**These ratios do not count**: {reason}." for reason in result.get("does not count because", ())]


def engine_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of contestants with the columns that have an entry, and below it who was not measured."""
    headings = ["images/s", "one image", "99 %", "rows", "memory", "of ceiling", "error", "plain PyTorch's"]
    ratios = list(dict.fromkeys(key for row in rows for key in row if key.startswith("times ")))
    measured = {
        row["name"]: engine_cells(row) + [_ratio(row.get(key)) for key in ratios]
        for row in rows
        if not why_missing(row)
    }
    headings += ratios
    used = [at for at in range(len(headings)) if any(cells[at] for cells in measured.values())]
    lines = [_row(["", *(headings[at] for at in used)]), _row(["---"] + ["---:"] * len(used))] if measured else []
    lines += [_row([name, *(cells[at] for at in used)]) for name, cells in measured.items()]
    absent = [f"- {row['name']}: {why_missing(row)}." for row in rows if why_missing(row)]
    return "\n".join([*lines, *([""] if measured and absent else []), *absent])


def _ratio(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def ops_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of ops, and below it the backends that were not measured."""
    headings = ("op", "backend", "median", "GFLOP/s", "GB/s", "share of", "error", "plain PyTorch's")
    absent = {row["backend"]: row["not measured"] for row in rows if row.get("not measured")}
    rows = [row for row in rows if not row.get("not measured")]
    lines = [_row(headings), _row(["---", "---"] + ["---:"] * (len(headings) - 2))]
    for row in rows:
        name = label(row["op"], row["case"])
        if "seconds" not in row:
            lines.append(_row([name, row["backend"], why_missing(row) or "", *[""] * (len(headings) - 3)]))
            continue
        cells = [duration(row["seconds"]["median"]), f"{row['GFLOP/s']:.0f}" if row["GFLOP/s"] else ""]
        cells += [f"{row['GB/s']:.2g}", f"{row['share']['median']:.0%} of {row.get('ceiling of', row['of'])}"]
        lines.append(_row([name, row["backend"], *cells, f"{row['error']:.1e}", f"{row['plain']:.1e}"]))
    return "\n".join([*lines, "", *(f"- {backend}: not measured: {why}." for backend, why in absent.items())])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def roofline(result: dict[str, Any]) -> Figure:
    """Draw GFLOP/s of ops with matrix products against their arithmetic for each byte, under the measured ceilings."""
    from matplotlib.ticker import NullFormatter

    figure, axes = _axes("FLOP a byte (least traffic)", "GFLOP/s")
    rows = [row for row in result["ops"] if row.get("GFLOP/s")]
    copies = [row["ceiling"] for row in result["ops"] if row.get("of") == "copying memory"]
    intensity = [row["gigaflops"] / row["gigabytes"] for row in rows]
    axes.set(xscale="log", yscale="log")
    if rows:
        peak = max(row["ceiling"] for row in rows)
        # the axes always include the corner of the roofline
        corner = peak / max(copies) if copies else min(intensity)
        left, right = min(*intensity, corner) / 2, max(*intensity, corner) * 2
        axes.set(xlim=(left, right), ylim=(min(peak / 4, *(row["GFLOP/s"] for row in rows)) / 1.5, peak * 1.6))
        axes.plot([corner, right], [peak, peak], color="0.4", linewidth=1)
        style: dict[str, Any] = {"fontsize": 6.5, "color": "0.35"}
        axes.text(right / 1.1, peak * 1.2, "matrix products, measured", ha="right", **style)
        if copies:
            axes.plot([left, corner], [peak * left / corner, peak], color="0.4", linewidth=1, linestyle="--")
            axes.text(left * 1.1, peak * 1.2, "copying memory, measured", ha="left", **style)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        for backend in dict.fromkeys(row["backend"] for row in rows):
            own = [(x, row["GFLOP/s"]) for x, row in zip(intensity, rows, strict=True) if row["backend"] == backend]
            x, y = zip(*own, strict=True)
            axes.scatter(x, y, s=16, label=backend)
        axes.legend(fontsize=7, frameon=False)
    return figure


def latency(result: dict[str, Any]) -> Figure:
    """Draw the seconds of one image against S."""
    figure, axes = _axes("samples S", "seconds of one image")
    rows = result["latency"]
    seconds = [row["seconds"] for row in rows]
    low, high = ([abs(s["median"] - s[end]) for s in seconds] for end in ("min", "max"))
    axes.errorbar([row["samples"] for row in rows], [s["median"] for s in seconds], [low, high], marker="o", ms=3, lw=1)
    axes.set(xlim=(0, None), ylim=(0, None))
    return figure


def memory(result: dict[str, Any]) -> Figure:
    """Draw bytes against resolution: by the formula, and the measured peak if there is one."""
    figure, axes = _axes("pixels a side", "GiB")
    rows = result["memory"]
    sizes = [row["size"] for row in rows]
    formula = [(row["weight bytes"] + row["rows"] * row["row bytes"]) / 2**30 for row in rows]
    axes.plot(sizes, formula, marker="o", ms=3, lw=1, label=f"formula: weights, {rows[0]['rows']} × a row")
    measured = [(row["size"], row["peak bytes"] / 2**30) for row in rows if row.get("peak bytes")]
    if measured:
        x, y = zip(*measured, strict=True)
        axes.scatter(x, y, s=16, color="C1", label="measured peak, weights not counted")
    axes.set(ylim=(0, None), xticks=sizes)
    axes.legend(fontsize=7, frameon=False)
    return figure


# name, alternative text, key of the result that it is drawn from, function
PLOTS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], Figure]], ...] = (
    ("roofline", "Rates of the ops under the machine's ceilings", "ops", roofline),
    ("latency", "Seconds of one image against the number of samples", "latency", latency),
    ("memory", "Memory against resolution", "memory", memory),
)
