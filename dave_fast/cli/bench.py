"""`dave-fast bench`: time the ops and the engine on this machine, for your model and shapes, or your own kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dave_fast.cli import options
from dave_fast.cli.options import MACHINE
from dave_fast.cli.terminal import console, plain_warnings, print_model, waiting
from dave_fast.defaults import DEFAULT_MODEL, DEFAULT_SAMPLES
from dave_fast.errors import InputError
from dave_fast.numbers import number_in, shown

if TYPE_CHECKING:
    from rich.console import Console

_WHAT, _HOW, _RESULT = "What", MACHINE, "Result"


def bench(
    op: Annotated[
        str,
        typer.Option(
            metavar="engine|all|OP", help="The whole engine, an op of `dave-fast info`, or all.", rich_help_panel=_WHAT
        ),
    ] = "engine",
    model: options.Model = None,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Fetch the model's weights; else random.", rich_help_panel=_WHAT)
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side.", show_default="the model's", rich_help_panel=_WHAT)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples S an image.", rich_help_panel=_WHAT)] = DEFAULT_SAMPLES,
    images: Annotated[int, typer.Option(min=1, help="Images at once, for throughput.", rich_help_panel=_WHAT)] = 1,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Samples of a micro-batch.", show_default="what fits", rich_help_panel=_WHAT),
    ] = None,
    device: options.Device = None,
    precision: options.Precision = None,
    isa: Annotated[
        str | None,
        typer.Option(
            metavar="all|NAME,…",
            help="Instruction sets of this CPU, each in a process of its own.",
            show_default="the best",
            rich_help_panel=_HOW,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="One of `dave-fast info`.", show_default="all; engine: auto", rich_help_panel=_HOW),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[OP=]MODULE:FUNCTION", help="Your own kernel for an op, as backend 'yours'.", rich_help_panel=_HOW
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="REV", help="Compare with a git revision.", rich_help_panel=_HOW)
    ] = None,
    threshold: Annotated[
        str, typer.Option(help="With --compare: exit code 1 where it is slower by more.", rich_help_panel=_HOW)
    ] = "5%",
    repeats: Annotated[int, typer.Option(min=1, help="Number of timings, in turns.", rich_help_panel=_HOW)] = 20,
    budget: Annotated[
        float, typer.Option(min=0.1, help="Seconds of timing, for each op's case or the engine.", rich_help_panel=_HOW)
    ] = 10.0,
    tests: Annotated[
        bool, typer.Option("--tests/--no-tests", help="Run the op's tests first, in a checkout.", rich_help_panel=_HOW)
    ] = True,
    json: Annotated[Path | None, typer.Option(help="Write the numbers here.", rich_help_panel=_RESULT)] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Write a page with plots into this folder.", rich_help_panel=_RESULT)
    ] = None,
) -> None:
    """Time the engine or its ops, beside plain PyTorch and beside float64.

    Wrong results are refused: every implementation is first compared with float64 on the operands that it is timed on
    (at most twice plain PyTorch's error), and in a checkout the op's tests are run.

    Exit code 0: measured; 1: something is refused or slower than before; 2: cannot be measured, and why.
    """
    from torch import nn

    from dave_fast.bench.compare import check_revision
    from dave_fast.bench.measure import run_here
    from dave_fast.bench.shapes import spec_of
    from dave_fast.ops.precision import choose_precision, resolve_device

    screen = console()
    place = resolve_device(device, nn.Identity(), named=device is None)
    if precision is not None:
        choose_precision(precision, place)
    wanted = {
        "op": op,
        "model": model or DEFAULT_MODEL,
        "weights": None if weights is None else str(weights.resolve()),
        "num_classes": num_classes,
        "pretrained": pretrained,
        "size": size,
        "samples": samples,
        "images": images,
        "rows": rows,
        "device": place.type,
        "precision": precision,
        "backend": backend,
        "repeats": repeats,
        "budget": budget,
    }
    before = None if compare is None else (compare, _share(threshold))
    if compare is not None:
        check_revision(compare)
    own = _kernels(kernel or [], op)
    print_model(screen, spec_of(wanted))
    settings = {"before": before, "tests": tests, "sweep": docs is not None}
    with plain_warnings(screen), waiting(screen, "starting") as say:
        if isa is None:
            results = {"": run_here(wanted, own, **settings, say=say)}
        else:
            results = _each_isa(isa, place.type, say, wanted, own, **settings)
    _keep(results, json, docs, screen)
    if any(result.get("red") for result in results.values()):
        raise typer.Exit(1)


def _each_isa(isa: str, device: str, say: Callable[[str], None], *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Return the results by instruction set."""
    from dave_fast.bench import isas
    from dave_fast.bench.measure import run_here

    if device != "cpu":
        raise InputError(f"--isa {isa} names instruction sets of a CPU; give --device cpu")
    found: dict[str, Any] = {}
    for name in isas.chosen(isa):
        say(name)
        found |= isas.each([name], run_here, *arguments, **settings)
    return found


def _keep(results: dict[str, Any], json: Path | None, docs: Path | None, screen: Console) -> None:
    """Show results by instruction set ("" for a single one), and write them to the files that were asked for."""
    from dave_fast.bench.isas import named
    from dave_fast.bench.machine import write_json
    from dave_fast.bench.page import write_page

    for isa, result in results.items():
        if isa:
            console(stderr=False).print(f"{isa}:", style="bold")
        if "not measured" in result:
            screen.print(f"not measured: {result['not measured']}")
            continue
        _show(result)
        if json is not None:
            write_json(named(json, isa) if isa else json, result)
        for reason in result["red"]:
            screen.print(f"refused: {reason}", style="red", soft_wrap=True)
    if docs is not None:
        screen.print(f"wrote {write_page([each for each in results.values() if 'setting' in each], docs)}")


def _share(text: str) -> float:
    """Return the number that a share such as 5% or 0.05 stands for."""
    value = number_in(text.rstrip("% "))
    if value is None or value < 0:
        raise InputError(f"--threshold is {shown(text)}; expected a share such as 5% or 0.05")
    return value / (100 if text.rstrip().endswith("%") else 1)


def _kernels(given: list[str], op: str) -> dict[str, str]:
    """Return "module:function" by op, from OP=MODULE:FUNCTION, or MODULE:FUNCTION with --op."""
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = op, text
        if name in ("engine", "all"):
            raise InputError(f"--kernel {text!r} does not say for which op; write OP={text} or give --op OP")
        found[name] = path
    return found


def _show(result: dict[str, Any]) -> None:
    from dave_fast.bench import report

    out = console(stderr=False)
    if result.get("engine"):
        out.print(report.engine_table(result))
    if result.get("ops"):
        out.print(report.ops_table(result))
    if "compare" in result:
        out.print(report.comparison_table(result))
    for name, said in result["tests"].items():
        out.print(f"tests of {name} {said}", style="dim")
