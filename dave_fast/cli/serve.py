"""`dave-fast serve`: serve explanations over HTTP."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dave_fast.cli import options
from dave_fast.cli.config import Config
from dave_fast.cli.options import MACHINE
from dave_fast.cli.terminal import console, plain_warnings, repeated, waiting
from dave_fast.defaults import DEFAULT_MODEL
from dave_fast.errors import InputError, needs, reason_of
from dave_fast.serve.logs import log, log_to_stderr
from dave_fast.serve.signals import end_start, leave
from dave_fast.signals import at_signals

_LIMITS, _ACCESS = "Limits", "Access"
KEYS_VARIABLE = "DAVE_FAST_API_KEYS"


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[[NAME=]MODEL]...", help=options.NAMES, show_default=DEFAULT_MODEL)
    ] = None,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    labels: options.ClassNames = None,
    image_size: options.ImageSize = None,
    link: options.Link = None,
    config: options.ConfigFile = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cpu|cuda:0|...", help="A device, with its own engine; repeatable.", rich_help_panel=MACHINE
        ),
    ] = None,
    precision: options.Precision = None,
    backend: options.Backend = "auto",
    noise_alpha: options.NoiseAlpha = None,
    shrink: options.Shrink = None,
    internal_batch_size: options.InternalBatchSize = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests in the queue.", rich_help_panel=_LIMITS)] = 64,
    max_samples: Annotated[int, typer.Option(min=1, help="Samples of one request.", rich_help_panel=_LIMITS)] = 1024,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Size of one upload.", rich_help_panel=_LIMITS)] = 20,
    max_megapixels: Annotated[float, typer.Option(min=0.1, help="Size of one image.", rich_help_panel=_LIMITS)] = 25.0,
    memory_megabytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Memory for all requests.", show_default="half of what is free", rich_help_panel=_LIMITS
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time for accepted requests after SIGTERM.", rich_help_panel=_LIMITS)
    ] = 30.0,
    api_keys: Annotated[
        Path | None,
        typer.Option(help=f"A file with a key a line; or {KEYS_VARIABLE}.", rich_help_panel=_ACCESS),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may call; repeatable.", rich_help_panel=_ACCESS)
    ] = None,
) -> None:
    """Serve explanations over HTTP, with a page to try them.

    The page is at /, the documentation of the routes at /docs.

    tokens:MODEL serves a timm model's tokens, which patches are asked of, and
    detections:MODEL a detector's boxes; models with a text tower answer texts.

    It is ready when every engine has explained an image. SIGTERM and Ctrl-C
    end it with exit code 0, after the requests that were accepted are answered;
    a second one ends it at once, with exit code 143 or 130.
    """
    screen = console()
    # Words are for a person at a terminal. Somebody who has replaced stderr, as tests do, keeps it.
    in_words = screen.is_terminal or sys.stderr is not sys.__stderr__
    if not in_words:
        log_to_stderr()
    keys, given = _keys(api_keys), options.read_config(config)
    own = options.ModelOptions(None, weights, num_classes, labels, image_size, link)
    settings: dict[str, Any] = {
        "precision": precision,
        "backend": backend,
        "internal_batch_size": internal_batch_size,
        **options.method(None, noise_alpha, shrink, config=given)[1],
    }
    # A port that is in use is refused before the models are loaded.
    with at_signals(end_start), _bound(host, port) as listening:
        with needs("serve", "serving"):
            from dave_fast.serve.app import create_app
            from dave_fast.serve.limits import Limits
            from dave_fast.serve.models import load_models
            from dave_fast.serve.server import make_server
            from dave_fast.serve.service import Service

        names, of_model = _models(models or [], own, given)
        say: Callable[[str], None] = partial(screen.print, soft_wrap=True) if in_words else log.info
        for name in names:
            say(f"model: {name}")
        if given.n_samples is not None:
            say(f"n_samples = {given.n_samples} of {config} is left out: each request says how many samples it wants.")
        told = plain_warnings(screen) if in_words else nullcontext()
        text = f"loading {', '.join(names)}"
        with told, waiting(screen, text) if in_words else repeated(say, text):
            loaded = load_models(names, device or [None], **of_model, **settings)
        limits = Limits(
            samples=max_samples,
            requests=max_requests,
            body_bytes=max_megabytes << 20,
            pixels=int(max_megapixels * 1e6),
            memory_bytes=None if memory_megabytes is None else memory_megabytes << 20,
            drain_seconds=drain_seconds,
        )
        app = create_app(Service(loaded, limits), limits, api_keys=keys, cors_origins=cors_origin or ())
        if in_words:
            where = f"http://{host}:{listening.getsockname()[1]}"
            screen.print(f"serving {', '.join(loaded)} at {where} (docs at /docs); Ctrl-C ends it", soft_wrap=True)
        log_to_stderr()
        make_server(app, limits).run([listening])
    leave(0)


def _models(models: list[str], own: options.ModelOptions, config: Config) -> tuple[list[str], dict[str, Any]]:
    """Return the models to serve, and the keywords of `load_models` that belong to a single one.

    Raises:
        InputError: there is no such file, or a configuration is given with several models.
    """
    from dave_fast.serve.models import served_name

    if len(set(models)) > 1:
        if config != Config():
            raise InputError(
                f"--config belongs to one model, and {len(set(models))} are named: start a server for each."
            )
        spec = own.spec()
    else:
        spec = replace(own, model=served_name(models[0])[1] if models else None).spec(config)
        models = models or [spec.name]
    return models, {name: getattr(spec, name) for name in ("weights", "num_classes", "labels", "image_size", "link")}


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the port."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port}: {reason_of(error)}. Choose another --host or --port."
        ) from error
    return made


def _keys(path: Path | None) -> list[str]:
    """Read the API keys of a file or of the environment; an empty list lets everybody in."""
    text = os.environ.get(KEYS_VARIABLE, "").replace(",", "\n")
    if path is not None:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API keys in {path}: {reason_of(error)}.") from error
        if not text.strip():
            raise InputError(f"{path} has no API key; give one a line, or leave --api-keys out.")
    return [line.strip() for line in text.splitlines() if line.strip()]
