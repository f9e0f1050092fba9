"""Test Triton without a GPU: the kernels' own tests in the interpreter, compiled kernels, the dispatcher.

Kernels are interpreted or compiled for a whole process, so tests/kernels runs in processes of its own: one for the
engine, whose tests take longest, one for everything else.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dave_fast.errors import BackendError
from dave_fast.ops import _registry
from tests.toys import engine_of
from tests.variants import ENGINE

ROOT = Path(__file__).resolve().parents[2]
ENGINE_FILE = "tests/kernels/test_engine.py"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*command: object, **environment: str) -> str:
    """Return what a Python process printed; where it fails, fail with its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels runs on this machine's GPU itself")
@pytest.mark.parametrize("files", [[ENGINE_FILE], ["tests/kernels", f"--ignore={ENGINE_FILE}"]], ids=["engine", "rest"])
def test_the_kernels_by_the_interpreter(files):
    plain = ("-p", "no:cacheprovider", "-p", "no:xdist")
    out = run("-m", "pytest", "-q", "--tb=short", *plain, *files, TRITON_INTERPRET="1")
    assert "passed" in out and "skipped" not in out


PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# each kernel's forms with the most registers, and each type of operands
DEMANDING = "linear fc1 .*|linear VJP fc2 .*|attention (forward|VJP), D = 80 bf16|attention .* e4m3, .*|normalize.*"


def assert_compiled(rows, arch):
    """Fail unless kernels do not spill, multiply on the architecture's tensor cores, and match docs/kernels.md."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (section,) = (part for part in page.split("\n## ") if part.startswith(f"sm_{arch}\n"))
    assert rows
    # other versions allot registers in their own way, and compile to other numbers
    same = f"Triton {version('triton')} " in page
    for row in rows:
        assert row["spills"] <= (0 if same else 64), row
        if ("bf16" in row["name"] or "fp8" in row["name"]) and "1 query" not in row["name"]:
            assert PRODUCTS[arch] in row["instructions"], row
        if "linear" in row["name"] and "fp32" not in row["name"] and arch >= 90:
            assert "cp.async.bulk.tensor" in row["instructions"], row
        if same:
            assert row["line"] in section.splitlines(), "run scripts/compile_kernels.py"


def compiled(*arguments):
    return [json.loads(line) for line in run(ROOT / "scripts" / "compile_kernels.py", *arguments).splitlines()]


@needs_triton
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def test_every_kernel_compiles_ahead_of_time_as_the_page_says(arch):
    assert_compiled(compiled("--arch", arch), arch)


@pytest.mark.slow
@needs_triton
def test_demanding_kernels_compile_for_other_architectures_as_the_page_says():
    rows = compiled("--only", DEMANDING, "--arch", 80, "--arch", 100)
    for arch in (80, 100):
        assert_compiled([row for row in rows if row["arch"] == arch], arch)


@pytest.fixture
def faked(monkeypatch):
    """Return a function that fakes a machine: faked(triton=, gpu=, capability=)."""

    def fake(*, triton=True, gpu=True, capability=(9, 0)):
        monkeypatch.setattr(_registry, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(
            _registry,
            "BACKENDS",
            _registry.BACKENDS | {"triton": _registry.Backend("triton", ("cuda",), _registry._triton_unavailable)},
        )

    return fake


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"triton": False}, "not installed"),
        ({"gpu": False}, "no GPU"),
        ({"capability": (7, 5)}, "8.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_missing_triton_is_reported_with_the_reason(faked, machine, reason):
    faked(**machine)
    assert _registry.choose("linear", "auto", "cuda") == "torch"
    for op in ("pack_weight", "linear", "attention", "attention_vjp", "row_rstd"):
        with pytest.raises(BackendError, match=f"'triton' was asked for and cannot run '{op}'.*{reason}"):
            _registry.choose(op, "triton", "cuda")


def test_a_gpu_uses_triton_in_the_walks(faked):
    faked()
    assert _registry.why_not("linear", "triton", "cuda") is None
    assert {_registry.choose(op, "auto", "cuda") for op in ("pack_weight", "linear", "attention")} == {"triton"}


def test_a_cpu_has_no_triton_unless_it_interprets(faked):
    faked()
    with pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        engine_of(ENGINE["vit"].build(), dtype=torch.float32, backend="triton")
    for op in _registry.IMPLEMENTATIONS:
        assert _registry.choose(op, "auto", "cpu") != "triton"


def test_the_package_imports_without_triton():
    without = "import sys; sys.modules['triton'] = None; import dave_fast, dave_fast.engine.walks; "
    ops = "from dave_fast.ops import _registry as r; [r.load(op, r.choose(op)) for op in r.IMPLEMENTATIONS]; "
    assert run("-c", without + ops + "print('good')").strip() == "good"
    assert (
        run("-c", "import sys, dave_fast.engine.walks; print('dave_fast.kernels.linear' in sys.modules)").strip()
        == "False"
    )
