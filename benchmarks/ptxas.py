"""What ptxas says of a kernel that Triton compiled, and how many of its programs a multiprocessor holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

# compute capability -> registers of a multiprocessor, bytes of shared memory of a multiprocessor and of a program
ARCHITECTURES = {
    80: (65536, 164 * 1024, 163 * 1024),
    90: (65536, 228 * 1024, 227 * 1024),
    100: (65536, 228 * 1024, 227 * 1024),
}
# bytes of every program's shared memory that the driver keeps for itself
RESERVED = 1024
WARPS = 64


@dataclass(frozen=True)
class Resources:
    """registers of a thread · spills: bytes that a thread stores and loads again · warnings: codes, such as C7515."""

    registers: int
    spills: int
    warnings: tuple[str, ...]

    @staticmethod
    def read(log: str) -> Resources:
        """From what `ptxas -v` prints of one kernel."""
        (registers,) = re.findall(r"Used (\d+) registers", log)
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
        return Resources(int(registers), spills, tuple(sorted(set(re.findall(r"\((C\d+)\)", log)))))

    @property
    def most_threads(self) -> int:
        """Threads of the largest program that the registers of a multiprocessor hold; at most 1024."""
        return min(1024, 65536 // self._allotted // 32 * 32)

    @property
    def _allotted(self) -> int:
        """Registers are given out in eights a thread."""
        return -(-self.registers // 8) * 8

    def resident(self, arch: int, warps: int, shared: int) -> int:
        """Programs of `warps` warps and `shared` bytes that a multiprocessor holds at once."""
        registers, memory, _ = ARCHITECTURES[arch]
        return min(registers // (self._allotted * 32 * warps), memory // (shared + RESERVED), WARPS // warps)
