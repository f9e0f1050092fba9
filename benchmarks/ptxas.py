"""The resources of a kernel that Triton compiled, as ptxas reports them, and its occupancy."""

from __future__ import annotations

import re
from dataclasses import dataclass

# compute capability -> registers of a multiprocessor, bytes of shared memory of a multiprocessor and of a program
ARCHITECTURES = {
    80: (65536, 164 * 1024, 163 * 1024),
    90: (65536, 228 * 1024, 227 * 1024),
    100: (65536, 228 * 1024, 227 * 1024),
}
# bytes of shared memory that the driver reserves for every program
RESERVED = 1024
WARPS = 64


@dataclass(frozen=True)
class Resources:
    """The resources of a kernel.

    Attributes:
        registers: of a thread.
        spills: bytes of spill stores and loads.
        warnings: codes, such as C7515.
    """

    registers: int
    spills: int
    warnings: tuple[str, ...]

    @staticmethod
    def read(log: str) -> Resources:
        """Read the output of `ptxas -v` for one kernel."""
        (registers,) = re.findall(r"Used (\d+) registers", log)
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
        return Resources(int(registers), spills, tuple(sorted(set(re.findall(r"\((C\d+)\)", log)))))

    @property
    def most_threads(self) -> int:
        """Threads of the largest program that fits a multiprocessor's registers; at most 1024."""
        return min(1024, 65536 // self._allotted // 32 * 32)

    @property
    def _allotted(self) -> int:
        """Registers of a thread, which are allocated in eights."""
        return -(-self.registers // 8) * 8

    def resident(self, arch: int, warps: int, shared: int) -> int:
        """Return how many programs of `warps` warps and `shared` bytes a multiprocessor runs at once."""
        registers, memory, _ = ARCHITECTURES[arch]
        return min(registers // (self._allotted * 32 * warps), memory // (shared + RESERVED), WARPS // warps)
