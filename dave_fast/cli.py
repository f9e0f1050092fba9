"""The command line: one command a module, gathered here.

A command is a function with typer's annotations. To add one, write it in a module of its own and give it a
line at the end of this file. Modules of commands import torch only inside functions: --help stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from dave_fast import __version__
from dave_fast.cli_explain import explain
from dave_fast.errors import DaveFastError
from dave_fast.info import info
from dave_fast.terminal import refuse


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


app = typer.Typer(
    name="dave-fast",
    help="Attribution maps for Vision Transformers: which pixels speak for a class, and how strongly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dave-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """The entry point of the console script."""
    app()


app.command()(plain(explain))
app.command()(plain(info))
