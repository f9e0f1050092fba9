"""The command line's entry point, which gathers the commands.

A command is a function with typer's annotations. To add one, write it in a module of its own and give it a
line at the end of this file, with an example. Modules of commands import torch inside functions only, so that --help
is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dave_fast._version import __version__
from dave_fast.cli.bench import bench
from dave_fast.cli.doctor import doctor
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


# the commands in the order of --help, each with the example below its own help
COMMANDS: dict[Callable[..., None], str] = {
    explain: "dave-fast explain photo.jpg --top-k 3 --out maps/",
    run: "dave-fast run photos/ --target tiger --n-samples 32 --out run/",
    export: "dave-fast export run/ --to png --out overlays/",
    evaluate: "dave-fast evaluate photos/ --boxes boxes.csv --images 50",
    tune: "dave-fast tune photos/ --images 8 --out tuned/",
    info: "dave-fast info --device cpu --json",
    doctor: "dave-fast doctor",
    bench: "dave-fast bench --model vit_base_patch16_224 --samples 8",
    serve: "dave-fast serve demo --port 8080",
}
for _command, _example in COMMANDS.items():
    app.command(epilog=f"Example: {_example}")(plain(_command))
