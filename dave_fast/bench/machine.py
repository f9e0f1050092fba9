"""The environment of a measurement, stored with every result."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dave_fast.files import atomically
from dave_fast.ops import _ext

# the folder that holds the package: a checkout, or site-packages
ROOT = Path(__file__).resolve().parents[2]


def device_name(device: torch.device | str | None = None) -> str:
    """Return the name of the processor or GPU; without a device that of the GPU if there is one."""
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def environment(*packages: str, device: torch.device | str | None = None) -> dict[str, Any]:
    """Return the device, the instruction set of the native core, threads, commit and versions of packages."""
    versions = {name: _version(name) for name in ("dave-fast", "torch", "timm", "triton", "numpy", *packages)}
    return {
        "device": device_name(device),
        "isa": _ext.isa(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def checkout() -> Path | None:
    """Return the root of the git checkout that this package runs from; None for an installed wheel or a bare copy."""
    return ROOT if (ROOT / ".git").exists() else None


def commit() -> str:
    """Return the commit that is checked out, marked "-dirty" if tracked files differ from it.

    Without .git it is $DAVE_FAST_COMMIT, which can be set for a copy of the files, otherwise "unknown".
    """
    if checkout() is None:
        return os.environ.get("DAVE_FAST_COMMIT", "unknown")
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def slug(name: str) -> str:
    """Return a device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results atomically, and make missing folders."""
    with atomically(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
