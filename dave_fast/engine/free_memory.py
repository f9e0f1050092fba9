"""The free memory of a device."""

from __future__ import annotations

import os
import sys

import torch

CGROUP = "/sys/fs/cgroup"
# share of the free memory that an explanation may take by default
SHARE = 0.5


def megabytes(count: int) -> str:
    """Return a number of bytes as text in MiB."""
    return f"{count / 2**20:,.1f} MiB"


def free_bytes(device: torch.device) -> int:
    """Return how many bytes can still be allocated on a device; in a container, within its limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _container_limit())


def _available() -> int:
    """Return the available memory in bytes; half of all memory where the system does not report it (macOS)."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(available.split()[1]) * 1024


def _container_limit() -> int:
    """Return how many bytes are left within a container's limit; sys.maxsize where there is no limit."""
    try:
        with open(f"{CGROUP}/memory.max") as limit, open(f"{CGROUP}/memory.current") as taken:
            most = limit.read().strip()
            return sys.maxsize if most == "max" else max(0, int(most) - int(taken.read()))
    except OSError:
        return sys.maxsize
