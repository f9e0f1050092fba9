"""The bench's tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dave_fast.bench.case import label

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def duration(seconds: float) -> str:
    """Return a time with three digits and a unit: "1.23 ms"."""
    factor, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds * 1e3 >= 1 else (1e6, "µs")
    return f"{seconds * factor:.3g} {unit}"


def ops_table(result: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each case and backend, and below it the reasons of those not measured."""
    reasons: dict[str, None] = {}
    table = _table(result, "op", "backend", "median", "min to max", "GFLOP/s", "GB/s", "share", "error", "plain's")
    for row in result["ops"]:
        name = label(row["op"], row["case"])
        if "seconds" not in row:
            missing = why_missing(row) or ""
            table.add_row(name, row["backend"], missing.partition(":")[0])
            reasons[f"{row['backend']}: {missing}"] = None
            continue
        timed = row["seconds"]
        table.add_row(
            name,
            row["backend"],
            duration(timed["median"]),
            f"{duration(timed['min'])} to {duration(timed['max'])}",
            f"{row['GFLOP/s']:.0f}" if row["GFLOP/s"] else "",
            f"{row['GB/s']:.1f}",
            f"{row['share']['median']:.0%} of {row['ceiling of']}",
            f"{row['error']:.1e}",
            f"{row['plain']:.1e}",
        )
    return _with_lines(table, reasons)


def engine_table(result: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each contestant, and below it the reasons of those not measured."""
    table = _table(result, "", "images/s", "one image", "99 %", "rows", "memory", "of ceiling", "error", "plain's")
    for row in result["engine"]:
        missing = why_missing(row)
        table.add_row(row["name"], *([missing.partition(":")[0]] if missing else engine_cells(row)))
    return _with_lines(table, [f"{row['name']}: {why_missing(row)}" for row in result["engine"] if why_missing(row)])


def why_missing(row: dict[str, Any]) -> str | None:
    """Return "not measured: …" or "refused: …" for a row without numbers, otherwise None."""
    if row.get("not measured"):
        return f"not measured: {row['not measured']}"
    return f"refused: {row['reason']}" if row.get("reason") else None


def engine_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a contestant that ran."""
    wait, share = row["seconds an image"], row.get("share of ceiling")
    slowest = duration(wait["p99"]) if "p99" in wait else f"≤ {duration(wait['max'])} ({wait['repeats']})"
    return [
        f"{row['images a second']['median']:.3g}",
        duration(wait["median"]),
        slowest,
        "own choice" if row["rows"] is None else str(row["rows"]),
        "" if row["peak bytes"] is None else f"{row['peak bytes'] / 2**30:.2f} GiB",
        "" if share is None else f"{share['median']:.0%} of {row['ceiling'].partition(',')[0]}",
        "" if row.get("error") is None else f"{row['error']:.1e}",
        "" if row.get("plain error") is None else f"{row['plain error']:.1e}",
    ]


def comparison_table(result: dict[str, Any]) -> Table:
    """Return the table of a comparison with a revision."""
    found = result["compare"]
    table = _table(result, "", f"before ({found['before']})", f"after ({found['after']})", "after / before", "")
    for row in found["rows"]:
        change = row["ratio"]
        table.add_row(
            row["name"],
            duration(row["before"]["median"]),
            duration(row["after"]["median"]),
            f"{change['median']:.3f} ({change['min']:.3f} to {change['max']:.3f})",
            "slower" if row["slower"] else "",
        )
    return table


def _with_lines(table: Table, lines: Iterable[str]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(table, *(Text(line, style="dim") for line in lines))


def _table(result: dict[str, Any], *headings: str) -> Table:
    from rich.table import Table

    setting = result["setting"]
    title = f"{setting['model']}, {setting['image']}, S = {setting['samples']}, {result['environment']['device']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "op", "backend") else "right")
    return table
