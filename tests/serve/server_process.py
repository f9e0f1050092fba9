"""`dave-fast serve demo` as a process of its own, seen from outside: its memory, its log and its end."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.serve.tiny_server import PATIENCE, until

# Of each process; several times what a server needs, since libraries reserve addresses that they never use.
ADDRESS_BYTES = 12 << 30


@dataclass
class ServerProcess:
    """A server that runs.

    Attributes:
        port: where it listens, on loopback.
        popen: the process.
        path: the file of what it writes to stdout and stderr.
    """

    port: int
    popen: subprocess.Popen[bytes]
    path: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pids(self) -> list[int]:
        """Return the process and all its descendants."""
        found = [self.popen.pid]
        for pid in found:
            # a child may end while it is looked at
            with suppress(FileNotFoundError, ProcessLookupError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def mebibytes(self, key: str = "VmRSS") -> float:
        """Return the memory of the process and its descendants; pages that they share count for each of them."""
        return sum(_mebibytes(pid, key) for pid in self.pids())

    def forget_peak(self) -> None:
        """Let VmHWM, the most that was resident, begin again at what is resident now."""
        for pid in self.pids():
            with suppress(FileNotFoundError, ProcessLookupError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def lines(self) -> list[str]:
        """Return the lines of the log; what a terminal is told before the log begins is none of them."""
        lines = self.path.read_text(errors="backslashreplace").splitlines()
        first = next((at for at, line in enumerate(lines) if line.startswith("{")), len(lines))
        return lines[first:]

    def records(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the records of the log, and the lines that are no JSON object."""
        records, others = [], []
        for line in self.lines():
            try:
                records.append(dict(json.loads(line)))
            except ValueError:
                others.append(line)
        return records, others


def _mebibytes(pid: int, key: str) -> float:
    # a zombie has no memory and no such line
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024
    return 0.0


@contextmanager
def serving_process(folder: Path, *options: str) -> Iterator[ServerProcess]:
    """Start `dave-fast serve demo` at a free port, wait until it is ready, yield it, and end it if it still runs."""
    command = [sys.executable, "-m", "dave_fast", "serve", "demo", "--port", "0", *options]
    path = folder / "server.log"
    with path.open("wb") as log:
        popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    server = ServerProcess(0, popen, path)
    try:
        # a server that an attack makes grow shall fail its test, and not take the memory of the machine
        resource.prlimit(popen.pid, resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))

        def is_ready() -> bool:
            assert popen.poll() is None, path.read_text()
            told = [record for record in server.records()[0] if record["message"] == "listening"]
            if not told:
                return False
            server.port = int(told[0]["address"].rsplit(":", 1)[1])
            return httpx.get(f"{server.address}/readyz", timeout=PATIENCE).status_code == 200

        until(is_ready)
        yield server
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()
