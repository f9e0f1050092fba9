"""What a run has done so far, and how it is told: the accounts, and the bar that shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Failures that are told one by one.
_TOLD = 5


@dataclass
class Tally:
    """The accounts of one run. busy_s: seconds that all devices were at work."""

    workers: int = 1
    images: int = 0
    errors: int = 0
    busy_s: float = 0.0
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    first_work: float | None = None
    last_progress: float = field(default_factory=time.monotonic)
    first_errors: list[tuple[str, str]] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    stopped_by: int | None = None
    _parts: dict[str, float] = field(default_factory=dict)

    def alive(self, worker: str | None = None, images: float = 0.0) -> None:
        """A sign of life; images: of the batch at work that are done, in parts."""
        self.last_progress = time.monotonic()
        if worker is not None:
            self._parts[worker] = images

    def mapped(self, worker: str, records: int, busy_s: float, errors: list[tuple[str, str]]) -> None:
        """Rows were made."""
        self.alive(worker)
        self.images += records
        self.errors += len(errors)
        self.busy_s += busy_s
        self.first_errors += errors[: max(0, _TOLD - len(self.first_errors))]

    def committed(self, rows: int, size: int) -> None:
        """A shard was committed."""
        self.last_progress = time.monotonic()
        self.shards, self.rows, self.bytes = self.shards + 1, self.rows + rows, self.bytes + size

    @property
    def done(self) -> float:
        """Images, with those at work in parts."""
        return self.images + sum(self._parts.values())

    @property
    def elapsed_s(self) -> float:
        """Seconds since the workers were ready."""
        return time.monotonic() - (self.first_work or self.started)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def device_share(self) -> float:
        """Share of the time that the devices were at work, in [0, 1]; the batches at work are not counted yet."""
        return min(1.0, self.busy_s / (self.workers * self.elapsed_s)) if self.elapsed_s > 0 else 0.0


class Report:
    """What is said during a run: nothing, by default."""

    def begin(self, tally: Tally) -> None:
        """The workers are ready."""
        tally.first_work = tally.last_progress = time.monotonic()

    def update(self, tally: Tally) -> None:
        """Something may have changed."""

    def note(self, text: str) -> None:
        """What had to be assumed."""

    def failed(self, record_id: str, reason: str) -> None:
        """A record could not be explained."""


class Bar(Report):
    """A live bar on a terminal, a line now and then in a log."""

    LOG_S = 60.0

    def __init__(self, screen: Console, total: int | None, before: int = 0) -> None:
        """total: records in all, None where nobody knows; before: those that were done already."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._screen, self._total, self._before = screen, total, before
        self._told = 0
        self._logged = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]} · {task.fields[rate]} · device {task.fields[share]} ·", markup=False),
            *([TextColumn("left"), TimeRemainingColumn()] if total is not None else [TimeElapsedColumn()]),
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
            # images may take seconds each
            speed_estimate_period=300.0,
        )
        self._task = self._progress.add_task(
            "loading the model", total=total, completed=before, count="", rate="", share=""
        )

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def begin(self, tally: Tally) -> None:
        """Start the clock."""
        super().begin(tally)
        self._progress.update(self._task, description="explaining")

    def update(self, tally: Tally) -> None:
        """Move the bar; in a log, say a line a minute."""
        if tally.first_work is None:
            return
        done = self._before + tally.done
        count = f"{int(done)}{f'/{self._total}' if self._total is not None else ''} images"
        rate, share = f"{speed(tally.rate)}", f"{100 * tally.device_share:.0f} %"
        self._progress.update(self._task, completed=done, count=count, rate=rate, share=share)
        now = time.monotonic()
        if not self._screen.is_terminal and now - self._logged >= self.LOG_S:
            self._logged = now
            left = ""
            if self._total is not None and tally.rate > 0:
                left = f", {duration((self._total - done) / tally.rate)} left"
            self._screen.print(f"{count}, {rate}, device {share}, {tally.errors} failed{left}")

    def note(self, text: str) -> None:
        """A yellow line."""
        self._screen.print(f"note: {text}", style="yellow", soft_wrap=True)

    def failed(self, record_id: str, reason: str) -> None:
        """The first failures one by one, then silence: the summary counts them."""
        self._told += 1
        if self._told <= _TOLD:
            self._screen.print(f"failed: {record_id}: {reason}", style="red", soft_wrap=True)
        if self._told == _TOLD:
            self._screen.print("failed: … further ones are counted only; their rows say why", style="red")


def speed(images_s: float) -> str:
    """Images a second, for readers; a minute where they are slow."""
    return f"{images_s:.1f} images/s" if images_s >= 0.5 else f"{60 * images_s:.1f} images/min"


def duration(seconds: float) -> str:
    """ "1 h 04 min", "3 min 20 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Bytes for readers."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def simple_bar(screen: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many are done; none where nobody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
