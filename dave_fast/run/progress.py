"""The progress of a run: its counts, and the bar that shows them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dave_fast.run.messages import Mapped

if TYPE_CHECKING:
    from rich.console import Console

# Failures that are reported one by one.
_REPORTED = 5


@dataclass
class Tally:
    """The counts of one run.

    Attributes:
        workers: number of devices.
        images: records explained, those with an error included.
        errors: records without a map.
        busy_s: seconds that devices computed, summed over the devices.
        first_work: when the workers were ready, None before; this and `last_progress` are of `time.monotonic`.
        last_progress: when something was last heard of a worker.
        first_errors: (id, reason) of the first failures.
        doubles: ids that occurred twice in the source.
        stopped_by: number of the signal that stopped the run, or None.
    """

    workers: int
    images: int = 0
    errors: int = 0
    busy_s: float = 0.0
    first_work: float | None = None
    last_progress: float = field(default_factory=time.monotonic)
    first_errors: list[tuple[str, str]] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    stopped_by: int | None = None
    _parts: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Start the clock: the workers are ready."""
        self.first_work = self.last_progress = time.monotonic()

    def alive(self, worker: str, images: float | None = None) -> None:
        """Note that a worker is alive; `images` is how many of its current batch are done, as a fraction."""
        self.last_progress = time.monotonic()
        if images is not None:
            self._parts[worker] = images

    def mapped(self, worker: str, rows: Mapped) -> None:
        """Add rows that a worker has made."""
        self.alive(worker, 0.0)
        self.images += rows.records
        self.errors += len(rows.errors)
        self.busy_s += rows.busy_s
        self.first_errors += rows.errors[: max(0, _REPORTED - len(self.first_errors))]

    @property
    def done(self) -> float:
        """Images explained, with the fractions of those at work."""
        return self.images + sum(self._parts.values())

    @property
    def elapsed_s(self) -> float:
        """Seconds since the workers were ready, 0 before."""
        return 0.0 if self.first_work is None else time.monotonic() - self.first_work

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def device_share(self) -> float:
        """Share of the time that the devices computed, in [0, 1]; batches at work are not counted yet."""
        return min(1.0, self.busy_s / (self.workers * self.elapsed_s)) if self.elapsed_s > 0 else 0.0


class Report:
    """The base class of what shows a run's progress; it shows nothing itself."""

    def update(self, tally: Tally) -> None:
        """Show the counts and first failures, which may have changed."""

    def note(self, text: str) -> None:
        """Show a remark, such as a setting that had to be assumed."""


class Bar(Report):
    """A live bar on a terminal; in a log, a line every `LOG_S` seconds, every `LOADING_S` until the model is loaded.

    Args:
        screen: the console to write to.
        total: number of records in all, None if unknown.
        before: number of records that were done before this run.
    """

    LOG_S = 60.0
    LOADING_S = 5.0

    def __init__(self, screen: Console, total: int | None, before: int = 0) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._screen, self._total, self._before = screen, total, before
        self._reported = 0
        self._begun = self._logged = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]} · {task.fields[rate]} · device {task.fields[share]} ·", markup=False),
            *([TextColumn("left"), TimeRemainingColumn()] if total is not None else [TimeElapsedColumn()]),
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
            # Images may take seconds each.
            speed_estimate_period=300.0,
        )
        self._task = self._progress.add_task(
            "loading the model", total=total, completed=before, count="", rate="", share=""
        )

    def __enter__(self) -> Bar:
        if self._before:
            self._screen.print(f"resuming: {self._before} records are done", soft_wrap=True)
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def update(self, tally: Tally) -> None:
        """Move the bar, or write a line to the log if one is due; write the first failures, in red."""
        if tally.first_work is None:
            if self._due(self.LOADING_S):
                self._screen.print(f"loading the model, {time.monotonic() - self._begun:.0f} s")
            return
        for record_id, reason in tally.first_errors[self._reported :]:
            self._reported += 1
            self._screen.print(f"failed: {record_id}: {reason}", style="red", soft_wrap=True)
            if self._reported == _REPORTED:
                self._screen.print("failed: … further ones are counted only; their rows say why", style="red")
        done = self._before + tally.done
        count = f"{int(done)}{f'/{self._total}' if self._total is not None else ''} images"
        rate, share = speed(tally.rate), f"{100 * tally.device_share:.0f} %"
        self._progress.update(self._task, description="explaining", completed=done, count=count, rate=rate, share=share)
        if self._due(self.LOG_S):
            left = ""
            if self._total is not None and tally.rate > 0:
                left = f", {duration((self._total - done) / tally.rate)} left"
            self._screen.print(f"{count}, {rate}, device {share}, {tally.errors} failed{left}")

    def _due(self, seconds: float) -> bool:
        """Return whether the log has had no line for so long."""
        now = time.monotonic()
        if self._screen.is_terminal or now - self._logged < seconds:
            return False
        self._logged = now
        return True

    def note(self, text: str) -> None:
        """Write a remark, in yellow."""
        self._screen.print(f"note: {text}", style="yellow", soft_wrap=True)


def speed(images_s: float) -> str:
    """Return "3.1 images/s", or images a minute below 0.5 images a second."""
    return f"{images_s:.1f} images/s" if images_s >= 0.5 else f"{60 * images_s:.1f} images/min"


def duration(seconds: float) -> str:
    """Return a duration as text: "1 h 04 min", "3 min 20 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
