"""List the launches of one micro-batch: every Triton kernel of both walks, as compiled for a GPU, and its occupancy.

    python scripts/launch_count.py                              ViT-B/16 at 224 px, 28 rows, bf16, for sm_90
    python scripts/launch_count.py MODEL --size 448 --rows 14 --precision fp8

No GPU is needed: kernels are compiled by Triton's JIT and ptxas, and their launches are counted. Columns:

    registers, spills    of a thread; bytes of spill stores and loads
    resident             programs that a multiprocessor runs at once, by registers, shared memory and warps
    waves, fill          programs / (resident · 132 multiprocessors), and the share of whole waves that is used
    MB                   of all tensors given to the launches, read or written once: the least traffic
    notes                warnings of ptxas; C7515: wgmma are serialised

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
# the optional operands in which forms of `linear` differ
OPERANDS = ("row_scale", "row_sums", "column_scale", "bias", "gate", "residual", "codes", "squares")


class PyTorchOps(TorchDispatchMode):
    """A mode that counts PyTorch's own ops by name, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def form(kernel: Kernel) -> str:
    """Return the kernel's name with its compiled options."""
    constants, types = dict(kernel.constants), dict(kernel.types)
    options = [name for name in OPERANDS if name in types]
    activation = constants.get("ACTIVATION")
    return " ".join([kernel.name.strip("_").removesuffix("_kernel"), *options, *([activation] if activation else [])])


def line(launch: Launch, count: int) -> str:
    """Return a row of the table, for `count` equal launches."""
    kernel, ptxas = launch.kernel, launch.kernel.resources
    sizes = " ".join(f"{name}={n}" for name, n in launch.sizes)
    cells = (
        *(count, form(kernel), sizes, math.prod(launch.grid), kernel.warps),
        *(ptxas.registers, ptxas.spills, kernel.shared, kernel.resident),
        *(f"{launch.waves:.2f}", f"{launch.fill:.2f}", f"{count * launch.bytes / 1e6:.1f}", " ".join(ptxas.warnings)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(launches: list[Launch]) -> str:
    """Return a Markdown table with a row for equal launches, in the order of the first of them."""
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
