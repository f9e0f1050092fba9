"""What one micro-batch launches: every Triton kernel of both walks, as compiled for a GPU, and how it fills the chip.

    python scripts/launch_count.py                              ViT-B/16 at 224 px, 28 rows, bf16, for sm_90
    python scripts/launch_count.py MODEL --size 448 --rows 14 --precision fp8

No GPU is needed: kernels go through Triton's JIT and ptxas, and what would be launched is counted. Columns:

    registers, spills    of a thread; bytes stored and loaded again
    resident             programs that a multiprocessor holds at once, by registers, shared memory and warps
    waves, fill          programs / (resident · 132 multiprocessors), and the share of whole waves that is used
    MB                   of all tensors given to the launches, read or written once: a floor of the traffic
    notes                what ptxas warned of; C7515: its wgmma wait for each other

PyTorch's own ops of a micro-batch (the tail, its derivative, what the walks add to it) are counted by name below.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import timm
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ptxas import ARCHITECTURES  # noqa: E402
from tests.fake_gpu import Kernel, Launch, build, fake_gpu, walk  # noqa: E402

HEADING = (
    "launches", "kernel", "sizes", "grid", "warps", "registers", "spills", "shared", "resident", "waves", "fill", "MB",
    "notes",
)  # fmt: skip
# the optional operands that tell one form of `linear` from another
OPERANDS = ("row_scale", "row_sums", "column_scale", "bias", "gate", "residual", "codes", "squares")


class PyTorchOps(TorchDispatchMode):
    """How often PyTorch's own ops ran, by name, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def form(kernel: Kernel) -> str:
    """A readable name: the kernel's, and which of its options are compiled in."""
    constants, types = dict(kernel.constants), dict(kernel.types)
    options = [name for name in OPERANDS if name in types]
    activation = constants.get("ACTIVATION")
    return " ".join([kernel.name.strip("_").removesuffix("_kernel"), *options, *([activation] if activation else [])])


def line(launch: Launch, count: int) -> str:
    """A row of the table, for `count` equal launches."""
    kernel, ptxas = launch.kernel, launch.kernel.resources
    sizes = " ".join(f"{name}={n}" for name, n in launch.sizes)
    cells = (
        *(count, form(kernel), sizes, math.prod(launch.grid), kernel.warps),
        *(ptxas.registers, ptxas.spills, kernel.shared, kernel.resident),
        *(f"{launch.waves:.2f}", f"{launch.fill:.2f}", f"{count * launch.bytes / 1e6:.1f}", " ".join(ptxas.warnings)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(launches: list[Launch]) -> str:
    """Markdown: equal launches are one row, in the order of their first."""
    counted = Counter(launches)
    total = f"{len(launches)} launches, {sum(launch.bytes for launch in launches) / 1e6:.0f} MB"
    rows = [line(launch, count) for launch, count in counted.items()]
    return "\n".join([f"| {' | '.join(HEADING)} |", "|" + "---|" * len(HEADING), *rows, "", total])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vit_base_patch16_224", help="a name of timm's; random weights")
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("--rows", type=int, default=28)
    parser.add_argument("--depth", type=int, help="blocks; the model's own by default")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="bf16")
    parser.add_argument("--arch", type=int, default=90, choices=tuple(ARCHITECTURES))
    given = parser.parse_args()
    settings = {"depth": given.depth} if given.depth else {}
    model = timm.create_model(given.model, **settings).eval()
    with fake_gpu(given.arch) as launches:
        engine = build(model, given.precision, given.size and (given.size, given.size))
        launches.clear()
        with PyTorchOps() as ops:
            walk(engine, given.rows)
    print(table(launches))
    print(f"PyTorch's own: {ops.counted.total()}:", ", ".join(f"{n} {name}" for name, n in ops.counted.most_common()))


if __name__ == "__main__":
    main()
