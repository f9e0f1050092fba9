"""How much memory is free on a device, and whether an error says that it ran out."""

from __future__ import annotations

import os
import sys

import torch

CGROUP = "/sys/fs/cgroup"


# share of the free memory that an explanation may take when nobody says otherwise
SHARE = 0.5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, in PyTorch's CPU allocator, or in C++."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "std::bad_alloc", "CUDA out of memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def megabytes(count: int) -> str:
    """A number of bytes, for messages."""
    return f"{count / 2**20:,.1f} MiB"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _container_limit())


def _available() -> int:
    """What the operating system says can be taken; half of the memory where it does not say (macOS)."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(available.split()[1]) * 1024


def _container_limit() -> int:
    """What is left of a container's memory; no limit where there is none."""
    try:
        with open(f"{CGROUP}/memory.max") as limit, open(f"{CGROUP}/memory.current") as taken:
            most = limit.read().strip()
            return sys.maxsize if most == "max" else max(0, int(most) - int(taken.read()))
    except OSError:
        return sys.maxsize
