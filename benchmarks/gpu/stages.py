"""The stages of `scripts/gpu short` and `scripts/gpu full`, the most important first, with their command lines."""

from __future__ import annotations

import importlib.util
import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import build

SUITES = "tests/gpu tests/kernels tests/engine/test_cuda_engine.py"
# by pytest's names: what a rehearsal runs of them, and what compute-sanitizer watches
REHEARSED = "tests/gpu -k 'one-token and fp32 or the_cpus or graphs'"
WATCHED = "tests/gpu/test_ops.py -k 'float64 and odd and row_rstd and triton and fp32'"
# seconds of a whole run
SECONDS = {"short": 240.0, "full": 400.0}


@dataclass(frozen=True)
class Stage:
    """One stage: commands that run one after the other until one fails.

    Args:
        name: of the stage, as --only takes it.
        what: its purpose, in words.
        limit: seconds for all its commands; infinite for all the time that is left.
        commands: on a GPU machine.
        rehearsal: commands on a CPU; None if they need a GPU.
        environment: further variables.
    """

    name: str
    what: str
    limit: float
    commands: list[list[str]]
    rehearsal: list[list[str]] | None
    environment: dict[str, str] = field(default_factory=dict)


def words(command: str) -> list[str]:
    """Return a command line as a list; "python" is this Python."""
    return [sys.executable if part == "python" else part for part in shlex.split(command)]


def measure(name: str, what: str, limit: float, options: str = "", stage: str = "", **environment: str) -> Stage:
    """Return a stage that `python -m benchmarks.gpu` measures, by the same command in a rehearsal."""
    commands = [words(f"python -m benchmarks.gpu {stage or name} {options}")]
    return Stage(name, what, limit, commands, commands, environment)


def built(architecture: str) -> Stage:
    """Return the stage that installs the tree."""
    forms = words("python -m benchmarks.gpu forms")
    commands = [words("python -m benchmarks.gpu.build"), forms]
    environment = {"CUDAARCHS": f"{architecture}-real"}
    return Stage("build", "the native modules, and what runs", 150.0, commands, [forms], environment)


def short(out: Path, work: Path, architecture: str) -> list[Stage]:
    """Return the stages of the short run: correctness, speed, and the time of each kernel."""
    parallel = "-n 8" if importlib.util.find_spec("xdist") else ""
    junit = shlex.quote(str(out / "junit.xml"))
    pytest = f"python -m pytest -p benchmarks.gpu.tests -p no:cacheprovider -W default -v --junitxml={junit}"
    return [
        built(architecture),
        measure("ops", "each op against float64, a process each", 70.0, PYTORCH_NVML_BASED_CUDA_CHECK="1"),
        measure("walks", "ViT-B against the frozen route, graphs against eager", 80.0),
        measure("speed", "ms an image by micro-batch", 45.0, "--micro-batches own 14 28 50 56 112 --budget 0.4"),
        measure("kernels", "the profile of a micro-batch by kernel", 30.0),
        measure("products", "the eight products beside cuBLAS", 45.0, "--micro-batches 28 56"),
        measure("attention", "beside SDPA", 25.0),
        Stage(
            "tests",
            "the GPU suites",
            math.inf,
            [words(f"{pytest} {parallel} {SUITES}")],
            [words(f"{pytest} {REHEARSED}")],
        ),
    ]


def full(
    out: Path, work: Path, architecture: str, authors: Path | None = None, wheels: Path | None = None
) -> list[Stage]:
    """Return the stages of the full run, after the short one: the goals, and comparisons."""
    goals = "--micro-batches own 28 56 --repeats 100 --budget 1.5"
    large = "--size 672 --precisions bf16 --images 1 4 --micro-batches own 10"
    compute_sanitizer = "compute-sanitizer --error-exitcode 9 --tool"
    program = shlex.quote(str(work / build.SMOKE))
    watched = [
        *build.smoke(work),
        words(f"{compute_sanitizer} memcheck {program}"),
        words(f"{compute_sanitizer} racecheck {program}"),
    ]
    triton = [words(f"{compute_sanitizer} memcheck python -m pytest -q -W default {WATCHED}")]
    arch = {"CUDAARCHS": f"{architecture}-real"}
    return [
        built(architecture),
        measure("goals", "ViT-B at 224 px: one image, and throughput", 60.0, goals, "speed"),
        measure("peers", "compiled PyTorch, Inductor's default mode", 80.0),
        measure("672px", "the goal for 672 px", 35.0, large, "speed"),
        measure("plain", "one image at S = 200 beside the plain way at S = 8", 30.0),
        *([their_code(work, authors, wheels)] if authors else []),
        measure("attention", "beside SDPA", 25.0),
        Stage("sanitizer", "the CUDA kernels, watched for wrong reads and races", 60.0, watched, None, arch),
        Stage("triton-memcheck", "a Triton kernel, watched for wrong reads", 40.0, triton, None),
        measure("tune", "every kernel's candidates, timed", 90.0, "--precisions bf16", "speed", DAVE_FAST_AUTOTUNE="1"),
        measure("choices", "what tuning chose", 15.0),
        measure("tuned", "the goals, with what tuning chose", 30.0, "--micro-batches own 28 --budget 0.5", "speed"),
        measure("pixels", "warps, medians, smoothing", 20.0),
        measure("max-autotune", "compiled PyTorch, tuned", 90.0, "--modes max-autotune-no-cudagraphs", "peers"),
        measure("fp32", "float32", 30.0, "--precisions fp32 --micro-batches own 28", "speed"),
    ]


def their_code(work: Path, authors: Path, wheels: Path | None) -> Stage:
    """Return the stage that times the authors' code, with the packages in `wheels` if there are any."""
    site, commands = work / "site", [words(f"python -m benchmarks.gpu authors --authors {shlex.quote(str(authors))}")]
    if wheels is not None:
        files = " ".join(shlex.quote(str(path)) for path in sorted(wheels.glob("*.whl")))
        target = shlex.quote(str(site))
        commands.insert(0, words(f"python -m pip install -q --no-index --no-deps --target {target} {files}"))
    return Stage("authors", "their code, one image", 60.0, commands, None, {"PYTHONPATH": str(site)})
