"""Compile every Triton kernel ahead of time, as launchers would run it, and report its resources by ptxas.

    python scripts/compile_kernels.py                                 every architecture; writes docs/kernels.md
    python scripts/compile_kernels.py --only "attention .*" --arch 90  prints rows as JSON

No GPU is needed; the process must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ptxas import ARCHITECTURES, Resources  # noqa: E402
from dave_fast.kernels import _launch, _linear, attention, fp8, linear, norm, rotary, tokens  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class Case:
    """A kernel as a launcher specialises it.

    Attributes:
        name: for the table.
        kernel: of Triton.
        types: of pointers and integers by argument.
        constants: values of constexpr arguments.
        configuration: tiles, warps and stages.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    configuration: triton.Config


@dataclass(frozen=True)
class Row:
    """The resources of one case.

    Attributes:
        name: of the case.
        arch: compute capability.
        tiles: sizes of its tiles.
        warps: of a program.
        stages: of its pipeline.
        registers: of a thread.
        spills: see `Resources`.
        shared: bytes of a program.
        resident: programs on a multiprocessor at once.
        instructions: for products and tiles, by the PTX.
        warnings: see `Resources`.
    """

    name: str
    arch: int
    tiles: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    resident: int
    instructions: str
    warnings: tuple[str, ...]

    def line(self) -> str:
        """Return a line of the page's table."""
        cells = (self.name, self.tiles, self.warps, self.stages, self.registers, self.spills, self.shared)
        made = ", ".join([self.instructions, *self.warnings])
        return f"| {' | '.join(map(str, cells))} | {self.resident} | {made} |"


def _scales(of: str) -> dict[str, str]:
    """Return the arguments for static scales of rows."""
    return {f"{of}_lead": "fp32", f"{of}_rest": "fp32", f"{of}_tokens": "i32", f"{of}_read": "i32"}


def linear_case(name: str, arch: int, dtype: torch.dtype = torch.bfloat16, **given: Any) -> Case:
    """Return a form of `linear`.

    Args:
        name: of its place in the walks.
        arch: compute capability.
        dtype: of the operands.
        given: optional pointers by name with their types, and constants in capitals; `candidate` is an index of
            configurations, `few` whether they are for few rows.
    """
    eight = dtype.itemsize == 1
    glu, few = given.get("GLU", 0), given.pop("few", False)
    form = {"glu": bool(glu), "few": few, "twice": "codes" in given and given.get("wide", True)}
    found = linear.configurations(arch, dtype, descriptors=True, **form)[given.pop("candidate", 0)]
    tile = found.kwargs
    element = NAMES[dtype]
    stored = "bf16" if eight else element
    types = {"x": f"*{element}", "w": f"*{element}"} | ({"y": f"*{stored}"} if given.pop("wide", True) else {})
    if tile["DESCRIPTORS"]:
        types["x_desc"] = f"tensordesc<{element}[{tile['BLOCK_T']}, {tile['BLOCK_I']}]>"
        types["w_desc"] = f"tensordesc<{element}[{tile['BLOCK_O']}, {tile['BLOCK_I']}]>"
    types |= dict.fromkeys(("T", "O", "I", "stride_x", "stride_w", "parts"), "i32")
    constants: dict[str, Any] = {"ACTIVATION": None, "GLU": 0, "EXACT": dtype == torch.float32, "EVEN_I": True}
    constants |= {"PART": linear.FEW_PART if few else linear.PART, "ROW_PARTS": 1, "INTERPRETED": False}
    if eight:
        given |= {"column_scale": "*fp32"} | (_scales("x") if "row_scale" not in given else {})
    if "row_sums" in given:
        given |= {"row_parts": "i32", "count": "i32", "eps": "fp32", "ROW_PARTS": 16}
    if "codes" in given:
        given |= _scales("code")
    for key, value in given.items():
        (constants if key.isupper() else types)[key] = value
    return Case(f"linear {name} {element}", _linear._linear_kernel, types, constants | tile, found)


def attention_case(
    name: str,
    arch: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    vjp: bool,
    queries: int = 197,
    bias: bool = False,
    codes: bool = False,
) -> Case:
    """Return a form of the attention of either walk for a head dimension."""
    block = max(16, triton.next_power_of_2(dim))
    found = attention.configurations(arch, dtype, block, queries, vjp=vjp, biased=bias)[0]
    pointers = ("q", "k", "d_out", "d_v") if vjp else ("q", "k", "v", "out")
    types = dict.fromkeys(pointers, f"*{NAMES[dtype]}") | {"peak": "*fp32", "factor": "fp32"}
    operands = ("q", "k", "o") if vjp else ("q", "k", "v")
    types |= dict.fromkeys((f"{t}_{axis}" for t in operands for axis in ("row", "token", "head")), "i32")
    types |= dict.fromkeys(("Q", "N", "H"), "i32")
    if dtype == torch.float32:
        types["share"] = "*fp32"
    if bias:
        types |= {"bias": f"*{NAMES[dtype]}", "over_scale": "fp32"}
    if codes:
        types |= {"d_v" if vjp else "out": "*fp8e4nv"} | _scales("code")
        del types["code_tokens"]
    kernel = attention._attention_vjp_kernel if vjp else attention._attention_kernel
    constants = {"D": dim, "D_BLOCK": block, "INTERPRETED": False} | found.kwargs
    return Case(f"attention {name} {NAMES[dtype]}", kernel, types, constants, found)


def row_case(name: str, kernel: Any, types: dict[str, str], width: int, warps: int = 4, **constants: Any) -> Case:
    """Return a form of a kernel that reads whole rows of `width` values."""
    block_t, block_d = _launch.row_blocks(width)
    blocks = {"BLOCK_T": block_t, "BLOCK_D": block_d}
    return Case(name, kernel, types, constants | blocks, triton.Config(blocks, num_warps=warps))


def row_cases() -> Iterator[Case]:
    """Yield the kernels without a product, for ViT-B's width, its heads and its parts of sums of squares."""
    sizes = dict.fromkeys(("T", "N", "H", "PREFIX", "D", "x_row", "x_token", "x_head"), "i32")
    rstd = dict.fromkeys(("T", "D", "stride", "count"), "i32") | {"rstd": "*fp32", "eps": "fp32"}
    kernel = norm._row_rstd_kernel
    yield row_case("row_rstd of squares", kernel, rstd | {"x": "*fp32"}, 12, CENTRED=True, SQUARES=True)
    yield row_case("row_rstd of rows", kernel, rstd | {"x": "*bf16"}, 768, CENTRED=False, SQUARES=False)
    whole = sizes | {"x": "*bf16", "y": "*bf16", "weight": "*fp32", "bias": "*fp32", "rstd": "*fp32", "eps": "fp32"}
    del whole["PREFIX"]
    kernel = norm._normalize_kernel
    yield row_case("normalize heads", kernel, whole, 64, CENTRES=True, CENTRED=False, VJP=False)
    yield row_case("normalize", kernel, whole, 768, CENTRES=True, CENTRED=True, VJP=False)
    yield row_case("normalize_vjp", kernel, whole, 768, CENTRES=True, CENTRED=True, VJP=True)
    stream = dict.fromkeys(("patches", "prefix", "position", "x"), "*bf16") | {"squares": "*fp32"}
    stream |= dict.fromkeys(("T", "N", "PREFIX", "D"), "i32")
    turned = dict.fromkeys(("T", "N", "H", "x_row", "x_token", "x_head", "table_token", "table_head"), "i32")
    turned |= {"x": "*bf16", "y": "*bf16", "cos": "*fp32", "sin": "*fp32"}
    yield row_case("rotate heads", rotary._rotate_kernel, turned, 32, HALF=32)
    yield row_case("assemble", tokens._assemble_kernel, stream, 768)


def quantise_case() -> Case:
    """Return the kernel that converts rows to e4m3 before an fp8 product."""
    types = {"x": "*bf16", "row_scale": "*fp32", "codes": "*fp8e4nv", "scale": "*fp32", "I": "i32", "stride_x": "i32"}
    constants = {"LARGEST": fp8.LARGEST, "TINY": torch.finfo(torch.float32).tiny, "BLOCK_I": 1024, "INTERPRETED": False}
    return Case("quantise", fp8._quantise_kernel, types, constants, triton.Config({"BLOCK_I": 1024}, num_warps=4))


def cases(arch: int) -> Iterator[Case]:
    """Yield every form that the walks launch."""
    scale, bias, gate = {"row_sums": "*fp32"}, {"bias": "*bf16"}, {"gate": "*u8"}
    residual, squares = {"residual": "*bf16"}, {"squares": "*fp32"}
    kept = {"new_gate": "*u8", "ACTIVATION": "gelu"}
    forms: dict[str, dict[str, Any]] = {
        "qkv": scale | bias,
        "proj, fc2": bias | residual | squares,
        "fc1": scale | bias | kept,
        "VJP fc2": scale | gate,
        "VJP fc1": residual,
        "VJP proj": {},
        "VJP qkv": scale | residual,
    }
    for name, form in forms.items():
        yield linear_case(name, arch, **form)
    yield linear_case("fc1 SwiGLU", arch, **scale, **bias, new_gate="*bf16", ACTIVATION="silu", GLU=1)
    for name in ("fc1", "proj, fc2"):
        yield linear_case(f"{name} of few rows", arch, **forms[name], few=True)
    wide = {key: value.replace("bf16", "fp32") for key, value in (scale | bias).items()}
    yield linear_case("fc1", arch, torch.float32, **wide, new_gate="*fp32", ACTIVATION="gelu")
    if arch >= 90:
        eight, codes = torch.float8_e4m3fn, {"codes": "*fp8e4nv"}
        yield linear_case("qkv", arch, eight, **scale, **bias)
        yield linear_case("fc1", arch, eight, **scale, **bias, **kept, **codes, wide=False)
        yield linear_case("proj, fc2", arch, eight, **bias, **residual, **squares, **codes)
        yield linear_case("VJP fc2", arch, eight, **scale, **gate, **codes, wide=False)
        yield linear_case("VJP fc1", arch, eight, **residual, **codes)
        yield linear_case("VJP qkv", arch, eight, **scale, **residual, **codes)
        yield attention_case("forward to e4m3, D = 64", arch, 64, vjp=False, codes=True)
        yield attention_case("VJP to e4m3, D = 64", arch, 64, vjp=True, codes=True)
        yield quantise_case()
    yield from attention_cases(arch)
    yield from row_cases()


def attention_cases(arch: int) -> Iterator[Case]:
    """Yield the forms of attention that do not write e4m3."""
    for dim in (64, 80):
        yield attention_case(f"forward, D = {dim}", arch, dim, vjp=False)
        yield attention_case(f"VJP, D = {dim}", arch, dim, vjp=True)
    yield attention_case("forward with a bias, D = 64", arch, 64, vjp=False, bias=True)
    yield attention_case("VJP with a bias, D = 64", arch, 64, vjp=True, bias=True)
    yield attention_case("forward of 1 query, D = 64", arch, 64, vjp=False, queries=1)
    yield attention_case("VJP of 1 query, D = 64", arch, 64, vjp=True, queries=1)
    yield attention_case("forward, D = 64", arch, 64, torch.float32, vjp=False)
    yield attention_case("VJP, D = 64", arch, 64, torch.float32, vjp=True)
    yield attention_case("forward, D = 80", arch, 80, torch.float32, vjp=False)
    yield attention_case("VJP, D = 80", arch, 80, torch.float32, vjp=True)


def compiled(case: Case, arch: int) -> Row:
    """Compile one case by Triton and ptxas without a cache."""
    kernel = case.kernel
    constants = {name: case.constants.get(name) for name in kernel.arg_names if name not in case.types}
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    # Triton specialises by divisibility: addresses and sizes are multiples of 16, the arguments in `odd` are not
    odd = {"T", "N", "Q", "PREFIX", "parts", "row_parts", "H", "x_tokens", "x_read", "code_tokens", "code_read"}
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith(("*", "i")) and name not in odd
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    options = {
        "num_warps": case.configuration.num_warps,
        "num_stages": case.configuration.num_stages,
        "maxnreg": case.configuration.maxnreg,
    }
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, ptxas, shared = made.asm["ptx"], Resources.read(log.getvalue()), made.metadata.shared
    kinds = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async")
    used = [kind for kind in kinds if re.search(rf"\b{re.escape(kind)}[. ](?!bulk)", ptx)]
    tiles = "×".join(str(v) for k, v in case.configuration.kwargs.items() if k.startswith("BLOCK"))
    warps = case.configuration.num_warps
    return Row(
        *(case.name, arch, tiles, warps, case.configuration.num_stages, ptxas.registers, ptxas.spills, shared),
        *(ptxas.resident(arch, warps, shared), ", ".join(used), ptxas.warnings),
    )


INTRODUCTION = """# What the compiler makes of the Triton kernels

Every kernel of `kernels/` in its fixed configuration, compiled ahead of time by Triton {triton} and the ptxas that
comes with it; written by `python scripts/compile_kernels.py`, which needs no GPU. These are facts about the code, not
speeds: nothing on this page was timed. `linear` is named by the place of the walks that it serves; types are those of
the operands (fp8e4nv: e4m3).

- tiles: T×O×I (rows, out- and in-features) in `linear`, queries×tokens in `attention`, rows×columns in the others.
- spills: bytes that a thread stores and loads again for lack of registers. Shared: bytes of a program.
- resident: programs that a multiprocessor holds at once, by registers and shared memory. Two of them let one's
  epilogue hide behind the other's product.
- instructions: how products and tiles come about: wgmma and tensor copies (TMA) on sm_90, tcgen05 on sm_100. float32
  products are IEEE, which tensor cores are not. C7515: ptxas makes the kernel's wgmma wait for each other.

Other versions allot registers in their own way: for sm_90 Triton 3.6 and 3.9 spill nothing either in these forms.

`DAVE_FAST_AUTOTUNE=1` times other configurations at the first call of a shape, takes the fastest, and keeps the choice
on disk for every later process (`dave-fast info` lists what is kept).

Head dimensions that are no power of two are padded to one (80 to 128). What kernels do not cover goes to PyTorch:
float64, head dimensions above 128, scales that are not positive, and in Triton's interpreter bfloat16, which it
multiplies wrongly.
"""

HEADING = """
## sm_{arch}

| kernel | tiles | warps | stages | registers | spills | shared | resident | instructions |
|---|---|---|---|---|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    """Return docs/kernels.md."""
    text = INTRODUCTION.format(triton=triton.__version__)
    for arch in dict.fromkeys(row.arch for row in rows):
        text += HEADING.format(arch=arch) + "".join(row.line() + "\n" for row in rows if row.arch == arch)
    return text


def main() -> None:
    """Print rows as JSON, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="regular expression of the names to compile; prints JSON")
    parser.add_argument("--arch", type=int, action="append", choices=tuple(ARCHITECTURES))
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.")
    rows = []
    for arch in given.arch or ARCHITECTURES:
        for case in cases(arch):
            if given.only is None or re.fullmatch(given.only, case.name):
                rows.append(compiled(case, arch))
                print(json.dumps(asdict(rows[-1]) | {"line": rows[-1].line()}, ensure_ascii=False), flush=True)
    if given.only is None and given.arch is None:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
