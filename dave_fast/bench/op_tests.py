"""The tests of an op, run before it is timed; they exist in a checkout, and need pytest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from dave_fast.bench.machine import ROOT
from dave_fast.ops.precision import NARROW

FOLDER = ROOT / "tests" / "ops"
# ops that are tested in another op's file
FILES = {"attention_vjp": "attention", "row_rstd": "linear", "rotate": "rotary"}
FILES |= {f"linear_{narrow}": narrow for narrow in NARROW}
FILES |= dict.fromkeys(("normalize", "normalize_vjp", "assemble"), "norms_and_tokens")
FILES |= {f"{op}_variance": op for op in ("robust_mean", "pull_back_mean", "spread_mean")}
ENGINE_TEST = ROOT / "tests" / "engine" / "test_walks.py"
SECONDS = 900


def run_tests(op: str) -> tuple[str, bool]:
    """Run the tests of an op; return the outcome ("passed: tests/ops/test_linear.py") and whether a test failed.

    Without a checkout or pytest nothing is run, and the outcome is the reason.
    """
    path = ENGINE_TEST if op == "engine" else FOLDER / f"test_{FILES.get(op, op)}.py"
    if not path.exists():
        return "not run: the tests are in a checkout of the repository, and this is an installed package", False
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed", False
    name = path.relative_to(ROOT)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode == 0:
        return f"passed: {name}", False
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"red: {failed[0] if failed else name}", True
