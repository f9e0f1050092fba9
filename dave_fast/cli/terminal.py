"""What commands say to whoever sits in front of them: results on stdout, everything else on stderr."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dave_fast.errors import DaveFastError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LOG_WIDTH = 200


def console(*, stderr: bool = True) -> Console:
    """A console that leaves text as it is: no markup and no colouring of numbers in paths and names."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        # Rich takes 80 columns where it cannot ask; files and pipes have no edge to fold paths at.
        made.width = _LOG_WIDTH
    return made


def refuse(error: Exception, to: Console | None = None) -> None:
    """Print an error as one red line."""
    # Whatever a library put into several lines is still one message.
    text = " ".join(str(error).split())
    (to or console()).print(f"error: {text}", style="red", soft_wrap=True)


def plain(command: Callable[..., None]) -> Callable[..., None]:
    """A command that tells what went wrong in one line, with exit code 2, and has --debug for the traceback.

    Only errors that dave-fast raises on purpose are shortened: any other keeps its traceback.
    """

    @wraps(command)
    def run(*args: Any, debug: bool, **options: Any) -> None:
        try:
            command(*args, **options)
        except DaveFastError as error:
            if debug:
                raise
            refuse(error)
            raise typer.Exit(2) from error

    option = typer.Option("--debug", help="Show the traceback of an error.")
    switch = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
    own = signature(command, eval_str=True)
    # typer reads the options of a command from its signature.
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), switch])  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in own.parameters.items()} | {
        "debug": switch.annotation
    }
    return run


@contextmanager
def plain_warnings(to: Console) -> Iterator[None]:
    """Print warnings as plain lines, each text once, without the line of code that gave it."""
    seen = set()

    def show(message: Warning | str, *details: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            to.print(f"note: {text}", style="yellow", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def progress_bar(to: Console) -> Progress:
    """A progress bar with time left that vanishes when it is done; none where nobody watches, as in a log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, left"),
        TimeRemainingColumn(),
        console=to,
        transient=True,
        disable=not to.is_terminal,
    )
