"""Test the host's kernels on aarch64: built by a cross compiler, run under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.smoke import check_smoke

ROOT = Path(__file__).resolve().parents[2]
MISSING = [tool for tool in ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(tool)]


@pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}")
def test_the_kernels_of_every_instruction_set_of_arm_run_under_an_emulator(tmp_path):
    done = subprocess.run([ROOT / "scripts" / "arm", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    every, old = done.stdout.split("cortex-a72:\n")
    check_smoke(every.split("max:\n")[1], "neonbf16", "dotprod", "baseline")
    check_smoke(old, "baseline")
    assert "dotprod" not in old
