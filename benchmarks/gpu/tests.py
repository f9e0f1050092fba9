"""A pytest plugin: a row a test, as soon as it has run (`-p benchmarks.gpu.tests`).

Where a CUDA error sticks, every later test of its process would fail with it: a worker of pytest-xdist ends after such
a test, and another takes its place.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.gpu.rows import row, write

# what an error says that no later call of its process survives
STICKY = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure")


class Rows:
    """Writes the rows in the process that collects the reports."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")
            lines = [line for line in text.splitlines() if line.strip()]
            # pytest marks what was raised by an E
            raised = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
            note = " ".join(raised)[:600] if report.outcome != "passed" else ""
            write(row(report.nodeid, report.outcome, report.duration, "s", note, test=True), show=False)


class Worker:
    """Ends a worker whose GPU is lost."""

    def __init__(self) -> None:
        self.lost = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.lost |= report.failed and any(words in str(report.longrepr) for words in STICKY)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.lost:
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    """Register the half that this process needs."""
    config.pluginmanager.register(Worker() if hasattr(config, "workerinput") else Rows())
