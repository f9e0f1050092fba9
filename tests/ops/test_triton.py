"""Test Triton without a GPU: the kernels' own tests in the interpreter, compiled kernels, the dispatcher.

Kernels are interpreted or compiled for a whole process, so each file of tests/kernels runs in a process of its own.
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
FILES = sorted(path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py"))

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
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_by_the_interpreter(file):
    # NumPy warns where a kernel means its infinities and NaN
    quiet = ("-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", "-p", "no:xdist")
    out = run("-m", "pytest", "-q", "--tb=short", *quiet, ROOT / "tests" / "kernels" / file, TRITON_INTERPRET="1")
    assert "passed" in out and "skipped" not in out


PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def assert_compiled(rows, arch):
    """Fail unless kernels do not spill, multiply on the architecture's tensor cores, and match docs/kernels.md."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (section,) = (part for part in page.split("\n## ") if part.startswith(f"sm_{arch}\n"))
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


@needs_triton
@pytest.mark.parametrize("arch", PRODUCTS)
def test_every_kernel_compiles_ahead_of_time_as_the_page_says(arch):
    out = run(ROOT / "scripts" / "compile_kernels.py", "--arch", arch)
    assert_compiled([json.loads(line) for line in out.splitlines()], arch)


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
