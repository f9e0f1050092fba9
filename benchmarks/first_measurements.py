"""What to know first of a GPU: the rates that every estimate of this project rests on, part by part.

    python -m benchmarks.first_measurements [linear attention pixels rows walks] [--out FOLDER] [--tiny]

linear      the eight products of a block at the micro-batches that fill 132 multiprocessors: the library's bare
            product, and every backend with its epilogue, in bf16, and in e4m3 where the device has it
attention   forward and frozen VJP at N = 197, 785, 1370, 1765, beside scaled_dot_product_attention and its backward
pixels      perturb, pull_back, robust_mean, pull_back_mean, smooth at S = 50, 100, 128, 256
rows        both walks of ViT-B/16 at micro-batches of 14 to 224 rows, seconds a row: where the L2 cache ends
walks       both walks beside the PyTorch ladder at the same rows

A JSON a part, written as soon as the part is done. --tiny is the rehearsal: small shapes, on any device.
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import machine
from benchmarks.contestants import why_no
from benchmarks.peers import LADDER, Peer
from dave_fast.bench import rates
from dave_fast.bench.ops import bench_op
from dave_fast.bench.report import duration, ops_table
from dave_fast.bench.shapes import Shapes, build_model
from dave_fast.bench.timing import in_turns, spread
from dave_fast.engine import Engine
from dave_fast.precision import has_bf16

# model -> width, heads, blocks
MODELS = {"S/16": (384, 6, 12), "B/16": (768, 12, 12), "L/16": (1024, 16, 24)}
FILLING = {"S/16": (26, 50), "B/16": (28, 50, 56), "L/16": (21, 42)}
TOKENS = {197: (224, 16), 785: (448, 16), 1370: (518, 14), 1765: (672, 16)}
SWEEP = (14, 21, 28, 42, 50, 56, 84, 112, 168, 224)
SAMPLES = (50, 100, 128, 256)
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA plain": SDPBackend.MATH,
}


def shapes(model: str, rows: int, *, size: int = 224, patch: int = 16, samples: int = 50) -> Shapes:
    width, heads, blocks = MODELS[model]
    return Shapes(
        samples=samples,
        rows=rows,
        image=(3, size, size),
        patch=(patch, patch),
        prefix=1,
        width=width,
        heads=heads,
        head_dim=width // heads,
        hidden=4 * width,
        activation="gelu",
        blocks=blocks,
        read=1,
    )


class Measurements:
    """The parts, on one device and in its best precision."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.precision = "bf16" if has_bf16(torch.device(device)) else "fp32"
        self.dtype = rates.DTYPES[self.precision]
        self.repeats, self.budget = (1, 0.5) if tiny else (20, 1.0)

    def linear(self) -> Iterator[dict[str, Any]]:
        """Rows of `bench_op`, with the bare product's rate of the same shape beside each."""
        for model, every in {"S/16": (1,)}.items() if self.tiny else FILLING.items():
            for rows in every:
                given = shapes(model, rows)
                for op, precision in (("linear", self.precision), ("linear_fp8", "fp8")):
                    if op == "linear_fp8" and why_no("fp8", self.device) is not None:
                        continue
                    for row in self._op(op, given):
                        yield {"model": model, "rows": rows, "library": self._bare(precision, row, given), **row}

    def attention(self) -> Iterator[dict[str, Any]]:
        """Rows of `bench_op`, and the library's forward and forward with backward at the same shapes."""
        for tokens, (size, patch) in list(TOKENS.items())[: 1 if self.tiny else None]:
            rows = 1 if self.tiny else max(1, 11032 // tokens)
            given = shapes("S/16" if self.tiny else "B/16", rows, size=size, patch=patch)
            for op in ("attention", "attention_vjp"):
                for row in self._op(op, given):
                    yield {"tokens": tokens, "rows": rows, **row}
            yield from self._library_attention(given)

    def pixels(self) -> Iterator[dict[str, Any]]:
        """Rows of `bench_op` for the pixel ops."""
        for samples in (3,) if self.tiny else SAMPLES:
            given = shapes("B/16", 1, size=32 if self.tiny else 224, samples=samples)
            for op in ("perturb", "pull_back", "robust_mean", "pull_back_mean", "smooth"):
                for row in self._op(op, given):
                    yield {"samples": samples, **row}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Seconds a row of both walks at each micro-batch."""
        model = self._model()
        engine = Engine.build(model, dtype=self.dtype, device=self.device)
        for rows in (1, 2) if self.tiny else SWEEP:
            seconds = in_turns({"walks": [self._walks(engine, model, rows)]}, self.repeats, self.device)["walks"]
            yield {"rows": rows, "seconds a row": spread([s / rows for s in seconds])}

    def walks(self) -> Iterator[dict[str, Any]]:
        """Both walks in turns with the PyTorch ladder, at the same rows and from the same tokens."""
        model = self._model()
        for rows in (2,) if self.tiny else (56, 112):
            calls: dict[str, list[Callable[[], Any]]] = {}
            engine = Engine.build(model, dtype=self.dtype, device=self.device)
            calls["dave-fast"] = [self._walks(engine, model, rows)]
            for step, tricks in list(LADDER.items())[: 1 if self.tiny else None]:
                if tricks.eight_bits and why_no("fp8", self.device) is not None:
                    continue
                tokens = self._tokens(model, rows)
                peer = Peer(model, tricks, self.dtype, self.device)
                try:
                    peer.cotangents(tokens, 0)
                except (RuntimeError, NotImplementedError) as error:
                    yield {"rows": rows, "name": step, "not measured": " ".join(str(error).split())[:200]}
                    continue
                calls[step] = [partial(peer.cotangents, tokens, 0)]
            seconds = in_turns(calls, self.repeats, self.device, host=True)
            for name, values in seconds.items():
                yield {"rows": rows, "name": name, "seconds a row": spread([s / rows for s in values])}

    # ---- how ----

    def _op(self, op: str, given: Shapes) -> list[dict[str, Any]]:
        return bench_op(
            op,
            given,
            dtype=self.dtype,
            precision=self.precision,
            device=self.device,
            repeats=self.repeats,
            budget=self.budget,
        )

    def _bare(self, precision: str, row: dict[str, Any], given: Shapes) -> float:
        """GFLOP/s of the library's product without an epilogue, at the row's shape."""
        width = given.width
        inner, outer = {
            "qkv": (width, 3 * width),
            "fc1": (width, 4 * width),
            "fc2 back": (width, 4 * width),
            "fc2": (4 * width, width),
            "fc1 back": (4 * width, width),
        }.get(row["case"], (width, width))
        tokens = given.rows * given.tokens
        call = rates.product(rates.kind_of(precision, self.device), tokens, inner, outer, self.device)
        seconds = in_turns({"bare": [call]}, self.repeats, self.device, budget=self.budget)["bare"]
        return 2e-9 * tokens * inner * outer / spread(seconds)["median"]

    def _library_attention(self, given: Shapes) -> Iterator[dict[str, Any]]:
        size = (given.rows, given.heads, given.tokens, given.head_dim)
        q, k, v, d_out = (torch.randn(size, device=self.device).to(self.dtype) for _ in range(4))
        v.requires_grad_()

        def both() -> torch.Tensor:
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), v, d_out)[0]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v)

        for name, kernel in BACKENDS.items():
            for case, call in (("forward", forward), ("forward and gradient of v", both)):
                row = {"tokens": given.tokens, "rows": given.rows, "op": name, "case": case, "backend": "library"}
                try:
                    with sdpa_kernel(kernel):
                        seconds = in_turns({case: [call]}, self.repeats, self.device, budget=self.budget)[case]
                except RuntimeError as error:
                    yield {**row, "not measured": " ".join(str(error).split())[:200]}
                    continue
                yield {**row, "seconds": spread(seconds)}

    def _model(self) -> Any:
        return build_model("demo" if self.tiny else "vit_base_patch16_224").to(self.device)

    def _tokens(self, model: Any, rows: int) -> torch.Tensor:
        length = model.patch_embed.proj.weight[0].numel()
        return torch.randn(rows, model.patch_embed.num_patches, length, device=self.device).to(self.dtype)

    def _walks(self, engine: Engine, model: Any, rows: int) -> Callable[[], Any]:
        tokens = self._tokens(model, rows)
        cotangent = torch.zeros(rows, model.num_classes, device=self.device)
        cotangent[:, 0] = 1

        def run() -> torch.Tensor:
            _, saved = engine.forward(tokens)
            return engine.vjp(saved, cotangent)

        return run


PARTS = ("linear", "attention", "pixels", "rows", "walks")


def show(part: str, rows: list[dict[str, Any]], console: Console, setting: dict[str, Any]) -> None:
    """The part as a table, or a line a row."""
    ops = [row for row in rows if "backend" in row and row["backend"] != "library"]
    if ops:
        console.print(ops_table({"setting": setting, "environment": {"device": machine.device_name()}, "ops": ops}))
    for row in rows:
        if row not in ops:
            timed = row.get("seconds") or row.get("seconds a row")
            what = {key: value for key, value in row.items() if not isinstance(value, dict)}
            console.print(f"{part}: {what} {duration(timed['median']) if timed else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all by default")
    parser.add_argument("--out", type=Path, help="folder; by default benchmarks/results/<device>")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = Measurements(device, args.tiny)
    setting = {"model": "S, B, L", "image": "as said", "samples": "as said", "device": device, "tiny": args.tiny}
    console, failed = Console(width=160), []
    for part in args.parts or PARTS:
        rows: list[dict[str, Any]] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # what came before an error is kept
                rows.extend(getattr(made, part)())
        except Exception:
            # what was measured before is kept, the other parts are measured, and the exit code says it
            traceback.print_exc()
            failed.append(part)
        show(part, rows, console, setting)
        path = (args.out or machine.results_path("x").parent) / f"first_{part}.json"
        machine.write_json(path, {"setting": setting, "environment": machine.environment(), "rows": rows})
        print(f"wrote {path}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
