"""Write the table of docs/cuda.md: registers, spills, local and shared memory of each CUDA kernel.

python scripts/cuda_resources.py [sm_90a sm_80 ...]     by default all architectures of CMakeLists.txt
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cuda.md"
SOURCES = ("perturb", "pull_back", "robust_mean", "shrink", "smooth")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100")
BEGIN, END = "<!-- cuda_resources.py: begin -->", "<!-- cuda_resources.py: end -->"
# as in CMakeLists.txt
FLAGS = ("-std=c++17", "-O3", "--fmad=false")


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel.

    Attributes:
        kernel: its name.
        registers: of a thread.
        spilled: bytes of spill stores and loads.
        local: bytes of local memory.
        shared: bytes of shared memory.
    """

    kernel: str
    registers: int
    spilled: int
    local: int
    shared: int


def compile_one(source: str, architecture: str) -> str:
    """Return the output of ptxas for one source; raise RuntimeError if it does not compile."""
    code = f"arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    command = ["nvcc", *FLAGS, "-gencode", code, "-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
    done = subprocess.run([*command, str(ROOT / "csrc" / f"{source}.cu")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def readable(mangled: str) -> str:
    """Return `Perturb<float, 4>` for a mangled run_block<dave::portable::Perturb<float, 4>>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    inner = name.split("run_block<", 1)[1].rsplit(">(", 1)[0]
    return re.sub(r"dave::\w+::", "", inner).strip()


def parse(text: str) -> list[Resources]:
    """Read the resources of every kernel from the output of ptxas."""
    found = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        number = {
            key: sum(map(int, re.findall(pattern, part)))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "spilled": r"(\d+) bytes spill (?:stores|loads)",
                "local": r"(\d+) bytes stack frame",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        found.append(Resources(readable(part.split("'", 1)[0]), **number))
    return found


def collect(architectures: tuple[str, ...]) -> dict[str, list[Resources]]:
    """Return the kernels by architecture, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        texts = {a: [pool.submit(compile_one, source, a) for source in SOURCES] for a in architectures}
        return {a: [kernel for text in parts for kernel in parse(text.result())] for a, parts in texts.items()}


def table(found: dict[str, list[Resources]]) -> str:
    """Return a Markdown table with a row for each kernel and a column for each architecture."""
    rows: dict[str, list[str]] = {}
    shared: dict[str, int] = {}
    for kernels in found.values():
        for one in kernels:
            wasted = f", {one.spilled} B spilled, {one.local} B local" if one.spilled or one.local else ""
            rows.setdefault(one.kernel, []).append(f"{one.registers}{wasted}")
            shared[one.kernel] = one.shared
    head = f"| kernel | shared memory (B) | {' | '.join(found)} |\n|---|--:|{'--:|' * len(found)}\n"
    return head + "".join(f"| `{k}` | {shared[k]} | {' | '.join(cells)} |\n" for k, cells in sorted(rows.items()))


def main() -> None:
    """Write the table into the page."""
    architectures = tuple(sys.argv[1:]) or ARCHITECTURES
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(collect(architectures))}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
