"""Test that the README, the workflow and the hooks name the steps of `.ci/run`, which runs on every change."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RUN = (ROOT / ".ci/run").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_environment_has_the_same_extras_everywhere(name):
    """Every environment installs the same extras, the only ones that go together."""
    together = set(re.findall(r"'\.\[(test,[a-z,]+)\]'", (ROOT / name).read_text()))
    assert together == {"test,dev,docs"}
    assert {"test", "dev", "docs"} <= set(PROJECT["project"]["optional-dependencies"])


def test_the_workflow_runs_what_everybody_runs():
    steps = workflow("ci")["jobs"]["run"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    scripts = re.findall(r"^PYTHON=\.venv/bin/python (\S+)$", RUN, re.MULTILINE)
    assert scripts == ["scripts/check", "scripts/docs", "scripts/test"]
    assert all((ROOT / script).stat().st_mode & 0o100 for script in [*scripts, ".ci/run"])


def test_hooks_are_lines_of_scripts_check():
    lines = (ROOT / "scripts/check").read_text().replace('"$PYTHON"', "python").splitlines()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "mypy"]
    assert all(hook["entry"] in lines for hook in hooks)


def test_wheels_are_published_by_hand_on_a_tag_after_an_approval():
    jobs = workflow("wheels")["jobs"]
    publish = jobs.pop("publish")
    assert publish["environment"] == "release" and set(publish["needs"]) == set(jobs)
    assert "workflow_dispatch" in publish["if"] and "refs/tags/v" in publish["if"]
    assert not any("publish" in step.get("uses", "") for job in jobs.values() for step in job["steps"])


def test_wheels_are_built_for_every_python_that_the_tests_take():
    """Wheels are built for the tested versions of Python, the oldest of which is the oldest that the package allows."""
    versions = [int(name.removeprefix("cp3").removesuffix("-*")) for name in PROJECT["tool"]["cibuildwheel"]["build"]]
    assert versions == list(range(versions[0], versions[-1] + 1))
    assert PROJECT["project"]["requires-python"] == f">=3.{versions[0]}"
