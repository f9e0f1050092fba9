"""The command line's entry point, which gathers the commands.

A command is a function with typer's annotations. To add one, write it in a module of its own and give it a
line at the end of this file. Modules of commands import torch inside functions only, so that --help is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dave_fast._version import __version__
from dave_fast.cli.bench import bench
from dave_fast.cli.evaluate import evaluate
from dave_fast.cli.explain import explain
from dave_fast.cli.export import export
from dave_fast.cli.info import info
from dave_fast.cli.run import run
from dave_fast.cli.serve import serve
from dave_fast.cli.terminal import plain, print_any_name
from dave_fast.cli.tune import tune

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
    """Run the console script `dave-fast`."""
    print_any_name()
    app()


app.command()(plain(explain))
app.command()(plain(run))
app.command()(plain(export))
app.command()(plain(evaluate))
app.command()(plain(tune))
app.command()(plain(info))
app.command()(plain(bench))
app.command()(plain(serve))
