"""Output of the commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dave_fast.cli.hints import as_options, options_of
from dave_fast.errors import DaveFastError, InputError
from dave_fast.numbers import parse_number, parse_whole

if TYPE_CHECKING:
    from rich.console import Console

    from dave_fast.models.spec import ModelSpec

_LOG_WIDTH = 200
# seconds between two lines of progress in a file
LOG_S = 5.0
# the options of the command that runs, for its messages
_options: ContextVar[dict[str, tuple[str, str | None]]] = ContextVar("options")


def print_any_name() -> None:
    """Let stdout and stderr write what they have no bytes for as backslashes: the name of a file need not be UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        # A program that calls this one may have put something else there.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(*, stderr: bool = True) -> Console:
    """Return a console that prints text unchanged, without markup and without colours for numbers in names."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        # Files and pipes have no width; rich would fold paths at 80 columns.
        made.width = _LOG_WIDTH
    return made


def refuse(error: Exception, to: Console | None = None) -> None:
    """Print an error as one red line, with the command's options in place of keywords."""
    # Messages of libraries may have several lines.
    text = as_options(" ".join(str(error).split()), _options.get({}))
    (to or console()).print(f"error: {text}", style="red", soft_wrap=True)


def plain(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that prints its errors in one line and ends with exit code 2; --debug shows the traceback.

    Only errors that dave-fast raises on purpose are shortened: any other keeps its traceback. A parameter whose type is
    a dataclass becomes an option for each field.
    """
    own = signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: each.annotation for name, each in own.parameters.items() if is_dataclass(each.annotation)
    }

    @wraps(command)
    def run(*, debug: bool, context: typer.Context, **options: Any) -> None:
        _options.set(options_of(context))
        for name, group in groups.items():
            options[name] = group(**{each.name: options.pop(each.name) for each in fields(group)})
        try:
            command(**options)
        except DaveFastError as error:
            if debug:
                raise
            refuse(error)
            raise typer.Exit(2) from error

    option = typer.Option("--debug", help="Show the traceback of an error.")
    running = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    switch = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
    parameters: list[Parameter] = []
    for name, each in own.parameters.items():
        parameters += signature(groups[name], eval_str=True).parameters.values() if name in groups else [each]
    for each in parameters:
        _parse_numbers(each)
    parameters += [switch, running]
    # Typer reads the options of a command from its signature.
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parse_numbers(parameter: Parameter) -> None:
    """Let an option of a number take what `dave_fast.numbers` takes; typer's own types also take 1_0, and nan."""
    types = set(get_args(get_args(parameter.annotation)[0])) or {get_args(parameter.annotation)[0]}
    (option,) = get_args(parameter.annotation)[1:] or (None,)
    kind = next((each for each in (int, float) if each in types), None)
    if kind is None or option is None or option.parser is not None:
        return
    least, most = option.min, option.max

    def parse(text: Any) -> float:
        try:
            if kind is int:
                return parse_whole(text, "the value", least, most)
            unbounded = (-math.inf if least is None else least, math.inf if most is None else most)
            return parse_number(text, "the value", *unbounded)
        except InputError as error:
            raise typer.BadParameter(str(error)) from error

    option.parser = parse
    option.metavar = option.metavar or ("INTEGER" if kind is int else "FLOAT")


def note(to: Console, text: str) -> None:
    """Print a note as one yellow line."""
    to.print(f"note: {text}", style="yellow", soft_wrap=True)


class _Lines(logging.Handler):
    """A handler of log records that gives their text to a function."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Give the text of a record to the function."""
        self._show(record.getMessage())


@contextmanager
def plain_warnings(to: Console) -> Iterator[None]:
    """Print warnings in the block, and what was chosen for the model, as notes; each text once, without its place."""
    seen = set()

    def show(message: Warning | str, *_details: Any, **_more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            note(to, text)

    handler, choices = _Lines(show), logging.getLogger("dave_fast.explain")
    level = choices.level
    choices.addHandler(handler)
    choices.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        choices.removeHandler(handler)
        choices.setLevel(level)


@contextmanager
def waiting(to: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Say in the block what is under way; the block gets a function that changes the words.

    Where `to` is not a terminal, a line is printed every `LOG_S` seconds.
    """
    if to.is_terminal:
        with to.status(text) as status:
            yield status.update
        return
    with repeated(lambda line: to.print(line, soft_wrap=True), text) as say:
        yield say


def print_model(to: Console, spec: ModelSpec) -> None:
    """Print which model is taken, in one line."""
    weights = ", random weights" if spec.random_weights else f", weights {spec.weights}" if spec.weights else ""
    to.print(f"model: {spec.name}{weights}", soft_wrap=True)


@contextmanager
def loading(to: Console, spec: ModelSpec) -> Iterator[None]:
    """Print which model is taken, and say in the block that it is loaded."""
    print_model(to, spec)
    with waiting(to, f"loading {spec.name}"):
        yield
    if spec.random_weights:
        note(to, "the weights are random: the maps show speed and mechanics, and mean nothing.")


@contextmanager
def progress(to: Console, name: str, unit: str = "samples") -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar in the block, which gets a function of (done, in all, current work) that updates it.

    The bar vanishes at the end of the block. Where `to` is not a terminal, a line is printed every `LOG_S` seconds.
    """
    if not to.is_terminal:
        with waiting(to, name) as say:
            yield lambda done, total, work: say(f"{work}: {done} of {total} {unit}")
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=to, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total, work: bar.update(task, completed=done, total=max(done, total), description=work)


@contextmanager
def repeated(show: Callable[[str], None], text: str) -> Iterator[Callable[[str], None]]:
    """Give a text and the seconds of the block to a function every `LOG_S` seconds, from a thread of its own.

    The block gets a function that changes the text.
    """
    begun, ended, words = time.monotonic(), threading.Event(), [text]

    def tell() -> None:
        while not ended.wait(LOG_S):
            show(f"{words[0]}, {time.monotonic() - begun:.0f} s")

    thread = threading.Thread(target=tell, daemon=True, name="dave-fast-progress")
    thread.start()
    try:
        yield lambda text: words.__setitem__(0, text)
    finally:
        ended.set()
        thread.join()
