"""Runs the stages one after the other, each within its time limit, and stores their rows and logs.

A stage is a process group of its own. At its limit it is interrupted as by Ctrl-C, so that pytest writes its report
and Python prints its stack; GRACE seconds later it is killed. If this program is killed, its stages end, too. It needs
only the standard library.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu import build, rows
from benchmarks.gpu.stages import Stage

ROOT = build.ROOT
GRACE = 8.0
# factor of all limits in a rehearsal, since they are for a GPU machine
REHEARSAL = 5.0
# seconds that must be left for a stage to be started
LEAST = 5.0
# bytes of log of a stage; the middle of a longer one is removed
LOG_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1
PROBE = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    chip = torch.cuda.get_device_properties(0)
    found |= {"device": chip.name, "GiB": round(chip.total_memory / 2**30), "L2 MiB": chip.L2_cache_size >> 20}
    found["multiprocessors"] = chip.multi_processor_count
    found["architecture"] = f"{chip.major}{chip.minor}" + ("a" if chip.major == 9 else "")
print(json.dumps(found))
"""


@dataclass
class Run:
    """One run of the script.

    Args:
        out: the folder of rows.jsonl, table.txt, logs.txt and junit.xml.
        work: a folder that is emptied beforehand.
        rehearsal: on the CPU.
        ends: when the run must end, by `time.monotonic`.
        before: number of rows in the file at the start.
    """

    out: Path
    work: Path
    rehearsal: bool
    ends: float
    before: int = 0

    def start(self, environment: dict[str, str]) -> dict[str, str]:
        """Make the folders, read the machine, write the first row; return the stages' environment."""
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        machine = probe()
        device = "CPU, a rehearsal" if self.rehearsal else machine.get("device", "no GPU")
        os.environ |= {rows.FILE: str(self.out / "rows.jsonl"), rows.DEVICE: device, **environment}
        self.before = len(rows.read(self.out / "rows.jsonl"))
        self.write(
            "machine",
            rows.row("machine", "measured", note=", ".join(f"{k} {v}" for k, v in machine.items()), **machine),
        )
        return machine

    def failed(self, since: int | None = None) -> bool:
        """Return whether a row is bad, among those after the first `since`; by default those of this run."""
        since = self.before if since is None else since
        return any(made["state"] in rows.BAD for made in rows.read(self.out / "rows.jsonl")[since:])

    def write(self, stage: str, made: rows.Row) -> None:
        """Append a row of a stage, and rewrite the table."""
        os.environ[rows.STAGE] = stage
        rows.write(made)
        temporary = self.out / "table.tmp"
        temporary.write_text(rows.table(rows.read(self.out / "rows.jsonl")))
        temporary.replace(self.out / "table.txt")

    def stage(self, stage: Stage, reason: str | None) -> None:
        """Run a stage and write the row of its end; `reason` is why it cannot run here, or None."""
        commands = stage.rehearsal if self.rehearsal else stage.commands
        left = self.ends - time.monotonic() - GRACE
        began = time.monotonic()
        if commands is None:
            state, note = "needs a GPU", stage.what
        elif reason is not None:
            state, note = "failed", reason
        elif left < LEAST:
            state, note = "no time left", stage.what
        else:
            print(f"{stage.name}: {stage.what}", flush=True)
            os.environ[rows.STAGE] = stage.name
            state, note = "interrupted", ""
            try:
                limit = stage.limit * (REHEARSAL if self.rehearsal else 1.0)
                before = len(rows.read(self.out / "rows.jsonl"))
                state, note = run(stage, commands, self.out / "logs.txt", min(limit, left))
                if state == "out of time" and math.isinf(stage.limit) and not self.failed(before):
                    state, note = "no time left", "cut short where the run ends"
            finally:
                if state == "interrupted":
                    self.write(stage.name, rows.row("the stage", state, time.monotonic() - began, "s"))
        self.write(stage.name, rows.row("the stage", state, time.monotonic() - began, "s", note))


def run(stage: Stage, commands: list[list[str]], log: Path, limit: float) -> tuple[str, str]:
    """Run the commands until one fails or the time is over; return the state, and the log's last line."""
    ends = time.monotonic() + limit
    state = "passed"
    with log.open("ab+") as file:
        start = file.tell()
        for command in commands:
            file.write(f"==== {stage.name}: {' '.join(command)}\n".encode())
            file.flush()
            state = run_one(command, file.fileno(), os.environ | stage.environment, ends, partial(trim, log, start))
            if state != "passed":
                break
        trim(log, start)
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return state, "" if state == "passed" else lines[-1].strip()[: rows.NOTE]


def run_one(
    command: list[str], output: int, environment: dict[str, str], ends: float, tick: Callable[[int], None]
) -> str:
    """Run one command in a process group of its own, which ends with it, and return its state.

    Args:
        command: with its arguments.
        output: file descriptor.
        environment: of the command.
        ends: when it is stopped, by `time.monotonic`.
        tick: called with the process group while it runs.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=_prepare_stage,
        )
    except FileNotFoundError:
        os.write(output, f"{command[0]} is not installed\n".encode())
        return "failed"
    try:
        while process.poll() is None and time.monotonic() < ends:
            tick(process.pid)
            time.sleep(0.05)
        if process.poll() is not None:
            return "passed" if process.returncode == 0 else "failed"
        return "out of time"
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process group, and kill it after GRACE seconds."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _prepare_stage() -> None:
    """Make the process end with its parent, and heed SIGINT: a shell starts what is in the background without it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends in any way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def trim(log: Path, start: int, writers: int | None = None) -> None:
    """Remove the middle of the log after `start` if it is longer than LOG_BYTES.

    Args:
        log: its path.
        start: offset in bytes.
        writers: process group that still writes, which is stopped meanwhile so that no line is lost.
    """
    if log.stat().st_size - start <= LOG_BYTES:
        return
    if writers is not None:
        os.killpg(writers, signal.SIGSTOP)
        os.waitid(os.P_PID, writers, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    try:
        _cut(log, start)
    finally:
        if writers is not None:
            os.killpg(writers, signal.SIGCONT)


def _cut(log: Path, start: int) -> None:
    """Keep a quarter of LOG_BYTES at both ends of the log after `start`."""
    size = log.stat().st_size - start
    half = LOG_BYTES // 4
    with log.open("r+b") as file:
        file.seek(start + size - half)
        end = file.read()
        file.seek(start + half)
        file.write(f"\n… {size - 2 * half} bytes left out …\n".encode() + end)
        file.truncate()


def probe() -> dict[str, str]:
    """Return versions and the GPU of this machine by its PyTorch, or the error of PyTorch."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
