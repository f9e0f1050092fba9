"""A pytest plugin that writes a row for each test as soon as it has run (`-p benchmarks.gpu.tests`).

After a persistent CUDA error every later test of the process would fail. So a worker of pytest-xdist ends after such a
test, and is replaced by another.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.gpu.rows import row, write

# messages of errors after which no later call of the process succeeds
STICKY = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure")


class Rows:
    """A plugin that writes the rows, in the process that collects the reports."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the row of a test."""
        if report.when == "call" or report.outcome != "passed":
            text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")
            lines = [line for line in text.splitlines() if line.strip()]
            # pytest begins lines of the exception with an E
            raised = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
            note = " ".join(raised)[:600] if report.outcome != "passed" else ""
            write(row(report.nodeid, report.outcome, report.duration, "s", note, test=True), show=False)


class Worker:
    """A plugin that ends a worker after a persistent CUDA error."""

    def __init__(self) -> None:
        self.lost = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notice a persistent CUDA error."""
        self.lost |= report.failed and any(words in str(report.longrepr) for words in STICKY)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """End the process if its GPU is lost."""
        if self.lost:
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin that this process needs."""
    config.pluginmanager.register(Worker() if hasattr(config, "workerinput") else Rows())
