"""The script that measures and writes everything on a trained model: what it calls exists and takes those options."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "measure_trained"


def called(tmp_path, *arguments):
    """Run the script with an interpreter that only notes its arguments, and return them, a list for each call."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n')
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "PATH": "/usr/bin:/bin", "AUTHORS": "authors"}
    subprocess.run([SCRIPT, *arguments], env=environment, check=True)
    return [line.rstrip("\t").split("\t") for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("arguments", [("measure", "hf:/m", "two words", "b.json", "c", "out"), ("write", "out")])
def test_every_call_is_of_a_file_that_has_its_options(tmp_path, arguments):
    calls = called(tmp_path, *arguments)
    assert len(calls) > 3
    assert arguments[0] == "write" or sum("two words" in call for call in calls) == 10
    for call in calls:
        path = f"{call[1].replace('.', '/')}.py" if call[0] == "-m" else call[0]
        text = (ROOT / path).read_text()
        for option in (part for part in call if part.startswith("--")):
            # options of the folders are made in a loop over their names
            assert f'"{option}"' in text or re.search(rf'"{option[2:]}"', text), (path, option)


@pytest.mark.parametrize("arguments", [(), ("measure",), ("write",), ("other", "out")])
def test_other_arguments_print_the_usage(arguments):
    result = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "scripts/measure_trained write OUT" in result.stderr
