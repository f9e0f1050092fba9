"""Comparison of a git revision with the working tree, in turns, so that other load on the machine affects both.

The revision is checked out and built in a temporary folder, and each side runs in a process of its own (`worker`). A
turn times one side and then the other, and the next turn in the opposite order. A case is slower if the median of the
turns' ratios exceeds the threshold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from dave_fast.bench import machine
from dave_fast.bench.timing import spread
from dave_fast.errors import BackendError, InputError

WORKER = Path(__file__).with_name("worker.py")
BUILD_SECONDS = 900


class Worker:
    """A process that times one tree.

    Args:
        name: of the tree, for messages.
        process: with pipes to its standard input and output.
    """

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and return the answer; raise BackendError if the process fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # a process that has ended gives no line
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BackendError(f"{self.name}: its process ended without an answer; see the lines above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BackendError(f"{self.name} cannot be timed: {answer['error']}")
        return answer


@contextmanager
def started(name: str, tree: Path) -> Iterator[Worker]:
    """Start a worker on the package in `tree`; it ends with the context."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Worker(name, process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def revision(name: str, root: Path) -> Iterator[Path]:
    """Check out and build a git revision in a temporary folder, which is removed with the context.

    Args:
        name: of the revision.
        root: of the repository.

    Raises:
        InputError: git does not know the revision.
        BackendError: it cannot be built.
    """
    commit = _commit(name, root)
    with tempfile.TemporaryDirectory(prefix="dave-fast-bench-") as folder:
        tree = Path(folder) / "tree"
        made = _git(root, "worktree", "add", "--detach", str(tree), commit)
        if made.returncode != 0:
            raise InputError(f"git cannot check out {name!r}: {made.stderr.strip()}")
        try:
            _build(tree, name)
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def check_revision(name: str) -> Path:
    """Return the root of the checkout that this package runs from.

    Raises:
        InputError: there is none, as for an installed package, or its git does not know the revision.
    """
    root = machine.checkout()
    if root is None:
        raise InputError(
            "--compare needs a git checkout of dave-fast, and this package is not in one "
            f"({machine.ROOT}): run it in a checkout, or after pip install -e . there"
        )
    _commit(name, root)
    return root


def _commit(name: str, root: Path) -> str:
    known = _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if known.returncode != 0:
        raise InputError(f"git knows no revision {name!r} in {root}; give a commit, a branch or a tag")
    return known.stdout.strip()


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InputError("--compare needs git, which is not installed here") from error


def _build(tree: Path, name: str) -> None:
    """Build the native core in place, and link the Triton kernels to where an installed package has them."""
    kernels = tree / "dave_fast" / "kernels"
    if (tree / "kernels").is_dir() and not kernels.exists():
        kernels.symlink_to(tree / "kernels", target_is_directory=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    settings: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": BUILD_SECONDS}
    built = subprocess.run(command, cwd=tree, env={"CUDAARCHS": _architecture(), **os.environ}, **settings)
    if built.returncode != 0:
        raise BackendError(f"{name} cannot be built: {' '.join(built.stderr.split())[-400:]}")


def _architecture() -> str:
    """Return CMake's name of this machine's CUDA architecture, of Hopper without a GPU."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def compare(
    before: str,
    wanted: dict[str, Any],
    *,
    repeats: int,
    threshold: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time a revision and the working tree in turns.

    Args:
        before: the revision.
        wanted: for `worker.prepare`.
        repeats: number of turns.
        threshold: ratio − 1 from which a case is slower, 0.05 for 5 %.
        progress: called with a description of each step.

    Returns:
        "rows" with the seconds of both and the ratios of the turns, and "refused": case -> reason.

    Raises:
        InputError: this is no git checkout, or git does not know the revision.
        BackendError: a side cannot be built or timed.
    """
    root = check_revision(before)
    with ExitStack() as stack:
        progress(f"building {before}")
        tree = stack.enter_context(revision(before, root))
        old = stack.enter_context(started(before, tree))
        new = stack.enter_context(started("the working tree", root))
        progress("preparing both sides")
        prepared = {side: side.ask({"prepare": wanted}) for side in (old, new)}
        rows = []
        for name in prepared[new]["names"]:
            if name in prepared[old]["names"]:
                progress(name)
                rows.append(_row(name, *_in_turns(old, new, name, repeats), threshold))
    return {
        "before": before,
        "after": machine.commit(),
        "threshold": threshold,
        "rows": rows,
        "refused": prepared[new]["refused"],
    }


def _in_turns(old: Worker, new: Worker, name: str, repeats: int) -> tuple[list[float], list[float]]:
    seconds: dict[Worker, list[float]] = {old: [], new: []}
    for repeat in range(repeats):
        for side in (old, new) if repeat % 2 == 0 else (new, old):
            seconds[side].append(side.ask({"time": name})["seconds"])
    return seconds[old], seconds[new]


def _row(name: str, before: list[float], after: list[float], threshold: float) -> dict[str, Any]:
    ratio = spread([b / a for a, b in zip(before, after, strict=True)])
    slower = ratio["median"] > 1 + threshold
    return {"name": name, "before": spread(before), "after": spread(after), "ratio": ratio, "slower": slower}
