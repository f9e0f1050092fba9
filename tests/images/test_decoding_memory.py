"""Tests that what decoding takes at its peak is what is told from the header."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.decoding_memory import PICTURES
from tests.tolerances import DECODING_MEMORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


@pytest.fixture(scope="module")
def measured():
    command = [sys.executable, "-m", "tests.images.decoding_memory"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PICTURES)
def test_decoding_takes_what_its_header_says(measured, name):
    taken, told = measured[name]
    assert taken <= (1 + DECODING_MEMORY) * told, f"{taken / told:.2f} of what is told"
    assert taken >= (1 - DECODING_MEMORY) * told, f"{taken / told:.2f} of what is told"
