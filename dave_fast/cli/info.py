"""`dave-fast info`: list versions, devices, and the backends of every op."""

from __future__ import annotations

import json as jsonlib
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from dave_fast._version import __version__
from dave_fast.cli.terminal import console
from dave_fast.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

_PACKAGES = ("torch", "timm", "triton", "numpy", "pillow")
# the extras for users in pyproject.toml, and their packages
EXTRAS = {
    "hf": ("transformers", "peft", "sentencepiece", "torchvision"),
    "openclip": ("open_clip_torch", "torchvision"),
    "bcos": ("bcos", "einops", "torchvision"),
    "datasets": ("datasets",),
    "export": ("zarr", "h5py", "tensorboard"),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn", "httpx", "prometheus_client", "python-multipart"),
    "evaluate": ("captum", "torchcam", "torchvision"),
    "lrp": ("lxt", "transformers", "torchvision"),
}


@dataclass(frozen=True)
class Device:
    """A device that torch can use.

    Attributes:
        type: torch's name of the type.
        name: of the chip.
        memory: in GiB; None where unknown.
    """

    type: str
    name: str
    memory: float | None = None


@dataclass(frozen=True)
class Info:
    """A machine as dave-fast sees it.

    Attributes:
        versions: of each package.
        devices: the CPU, then accelerators.
        device: the type that `ops`, `precisions` and `choices` are about.
        threads: of torch on the CPU.
        isa: the instruction set that the native core uses; None without the core.
        native: the reason why there is no native core, or None.
        ops: for each op and backend "default", "yes" or the reason why not.
        choices: for each problem of the GPU's kernels and number of rows, the candidate that was measured to be fastest
            (see `dave_fast.ops.choices`).
        choices_file: where these choices are kept; None where the device is no GPU.
        extras: for each extra of dave-fast its packages that are not installed.
        precisions: for each precision "default", "yes" or the reason why the device does not multiply in it; empty
            where there is no such device.
        fastest: the precision whose maps take the least time on the device; None where there is no such device.
    """

    versions: dict[str, str]
    devices: tuple[Device, ...]
    device: str
    threads: int
    isa: str | None
    native: str | None
    ops: dict[str, dict[str, str]]
    choices: dict[str, dict[int, str]] = field(default_factory=dict)
    choices_file: str | None = None
    extras: dict[str, list[str]] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    fastest: str | None = None


def _installed(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def missing_of(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed."""
    return [package for package in EXTRAS[extra] if _installed(package) == "not installed"]


def collect(device: str | None = None) -> Info:
    """Look the machine over.

    Args:
        device: the type whose backends are listed, "cpu", "cuda" ...; None takes the best there is.

    Raises:
        InputError: no backend runs on such a device.
    """
    import torch

    from dave_fast.ops import _ext, _registry
    from dave_fast.ops.choices import Choices
    from dave_fast.ops.precision import fastest_precision

    devices = _devices()
    device = device or devices[-1].type
    known = {name: None for backend in _registry.BACKENDS.values() for name in backend.devices}
    if device not in known:
        raise InputError(f"device {device!r} is unknown; backends are for {', '.join(known)}.")
    native = _ext.unavailable()
    own = {"dave-fast": __version__, "python": platform.python_version()}
    versions = own | {name: _installed(name) for name in _PACKAGES}
    isa = None if native else _ext.isa()
    extras = {extra: missing_of(extra) for extra in EXTRAS}
    found = Info(versions, devices, device, torch.get_num_threads(), isa, native, _table(device), extras=extras)
    if device in {each.type for each in devices}:
        here = torch.device(device)
        found = replace(found, precisions=_precisions(here), fastest=fastest_precision(here))
    if device != "cuda" or not torch.cuda.is_available():
        return found
    kept = Choices.of(torch.cuda.get_device_name())
    choices = {name: {rows: each.name for rows, each in by_rows.items()} for name, by_rows in kept.all().items()}
    return replace(found, choices=choices, choices_file=str(kept.path))


def _devices() -> tuple[Device, ...]:
    """Return the CPU, then accelerators."""
    import torch

    found = [Device("cpu", _processor(), _host_memory())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            chip = torch.cuda.get_device_properties(index)
            found.append(Device("cuda", chip.name, chip.total_memory / 2**30))
    elif torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU"))
    return tuple(found)


def _processor() -> str:
    """Return the name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
            return next(named, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _host_memory() -> float | None:
    """Return the GiB of main memory; None on systems that do not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def _precisions(device: torch.device) -> dict[str, str]:
    """Return for each precision "default", "yes" or the reason why not."""
    from dave_fast.ops.precision import PRECISIONS, choose_precision, why_not

    usual = choose_precision(None, device)
    return {each: "default" if each == usual else why_not(each, device) or "yes" for each in PRECISIONS}


def _table(device: str) -> dict[str, dict[str, str]]:
    """Return for each op and backend "default", "yes" or the reason why not."""
    from dave_fast.ops import _registry

    table = {}
    for op, forms in _registry.IMPLEMENTATIONS.items():
        chosen = _registry.choose(op, "auto", device)
        table[op] = {
            backend: "default" if backend == chosen else _registry.why_not(op, backend, device) or "yes"
            for backend in _registry.BACKENDS
            if backend in forms
        }
    return table


def render(found: Info) -> RenderableType:
    """Render an Info as text: versions, devices, the native core, and the table op × backend."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    facts.add_row("versions", Text(versions))
    for device in found.devices:
        memory = f", {device.memory:.0f} GiB" if device.memory else ""
        facts.add_row("device", Text(f"{device.type}: {device.name}{memory}"))
    facts.add_row("threads", str(found.threads))
    native = f"not available: {found.native}" if found.native else f"yes, {found.isa}"
    facts.add_row("native core", Text(native))
    for number, (precision, said) in enumerate(found.precisions.items()):
        text = {"default": "yes, the default", "yes": "yes"}.get(said, f"no: {said}")
        fastest = f", the fastest here: --precision {precision}" if precision == found.fastest else ""
        facts.add_row("" if number else "precisions", Text(f"{precision}: {text}{fastest}"))
    if found.extras:
        missing = [f"{extra} (without {', '.join(names)})" for extra, names in found.extras.items() if names]
        facts.add_row("extras", Text(", ".join(extra for extra, names in found.extras.items() if not names) or "none"))
        facts.add_row("not installed", Text(", ".join(missing) or "none"))
    table, reasons = _ops_table(found)
    notes = [Text(f"  [{number}] {reason}", style="dim") for reason, number in reasons.items()]
    return Group(facts, "", table, *notes, *_choices_table(found))


def _choices_table(found: Info) -> list[RenderableType]:
    """Return the table of the fastest kernels measured on the GPU; empty for other devices."""
    from rich.table import Table
    from rich.text import Text

    if found.choices_file is None:
        return []
    if not found.choices:
        return ["", Text("kernels: none measured here; DAVE_FAST_AUTOTUNE=1 times the candidates of each shape once")]
    table = Table("kernel", "rows", "fastest candidate", title_justify="left", box=None, pad_edge=False)
    table.title = f"kernels measured on this GPU, kept in {found.choices_file}"
    for problem, by_rows in found.choices.items():
        for rows, name in by_rows.items():
            table.add_row(problem, str(rows), name)
    return ["", table]


def _ops_table(found: Info) -> tuple[RenderableType, dict[str, int]]:
    """Return the table op × backend and its footnotes, since reasons are long and most are those of many ops."""
    from rich.table import Table
    from rich.text import Text

    backends = list(dict.fromkeys(backend for row in found.ops.values() for backend in row))
    table = Table("op", *backends, title=f"backends on {found.device}", title_justify="left", box=None, pad_edge=False)
    reasons: dict[str, int] = {}
    for op, row in found.ops.items():
        cells = []
        for backend in backends:
            text = row.get(backend, "-")
            if text not in ("default", "yes", "-"):
                text = f"no [{reasons.setdefault(text, len(reasons) + 1)}]"
            cells.append(Text(text, style={"default": "bold green", "yes": "green"}.get(text, "dim")))
        table.add_row(op, *cells)
    return table, reasons


def info(
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda|...", help="List the backends of this device.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List versions, devices, and the backends of every op, or why they cannot be used."""
    found = collect(device)
    if json:
        typer.echo(jsonlib.dumps(asdict(found), indent=2))
        return
    console(stderr=False).print(render(found))
