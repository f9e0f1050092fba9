"""Damaged pictures give a picture or an ImageError, within 400 MB and 2 s each."""

import subprocess
import sys

import pytest


def decoded(*numbers):
    """Decode mutants, or the bombs, in a process of its own; return its last words and what was wrong."""
    command = [sys.executable, "-m", "tests.images.decode_mutants", *map(str, numbers)]
    told = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout.splitlines()
    return told[-1], [line for line in told if line.startswith("wrong")]


def test_mutants():
    assert decoded(0, 300) == ("done", [])


def test_bombs():
    assert decoded() == ("done", [])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 1000))
def test_many_mutants(first):
    assert decoded(first, first + 1000) == ("done", [])
