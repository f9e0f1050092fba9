"""Read the records of a source ahead, on a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress

from dave_fast.errors import DaveFastError, RunError
from dave_fast.run.records import Record, RecordSource, Skip

# Bytes of encoded images that wait, in the parent or in one worker.
CONTENT_BYTES = 64 * 2**20
_TICK_S = 0.25


class Feed:
    """Records of a source, read ahead on a thread, within bounds on their number and bytes.

    Args:
        source: the records.
        skip: whether a record is left out, by its id.
        limit: the most records, None for all.
        ahead: the most records that wait.

    Attributes:
        error: the error that ended the reading, or None.
        doubles: ids that occurred again; only sources that are not checked beforehand have them.
    """

    def __init__(self, source: RecordSource, skip: Skip, limit: int | None, ahead: int = 1024) -> None:
        self.error: BaseException | None = None
        self.doubles: list[str] = []
        self._source, self._skip, self._limit = source, skip, limit
        self._ready: queue.Queue[Record | None] = queue.Queue(maxsize=ahead)
        self._bytes = 0
        self._room = threading.Condition()
        self._stopping = False
        threading.Thread(target=self._read, name="source", daemon=True).start()

    def take(self, most: int) -> list[Record] | None:
        """Return the records that are ready, at most `most`; None at the end of the source."""
        records: list[Record] = []
        while len(records) < most:
            try:
                record = self._ready.get_nowait()
            except queue.Empty:
                break
            if record is None:
                self._ready.put(None)
                return records or None
            with self._room:
                self._bytes -= len(record.content or b"")
                self._room.notify()
            records.append(record)
        return records

    def empty(self) -> bool:
        """Return whether no record is ready."""
        return self._ready.empty()

    def stop(self) -> None:
        """Stop reading."""
        with self._room:
            self._stopping = True
            self._room.notify()

    def _read(self) -> None:
        try:
            for record in self._fresh():
                with self._room:
                    self._bytes += len(record.content or b"")
                self._put(record)
                with self._room:
                    self._room.wait_for(lambda: self._stopping or self._bytes <= CONTENT_BYTES)
                if self._stopping:
                    break
        except DaveFastError as error:
            self.error = error
        except BaseException as error:
            self.error = RunError(f"reading {self._source.place} failed: {type(error).__name__}: {error}")
        self._put(None)

    def _put(self, record: Record | None) -> None:
        while not self._stopping:
            with suppress(queue.Full):
                self._ready.put(record, timeout=_TICK_S)
                break

    def _fresh(self) -> Iterator[Record]:
        """Yield the records without a row, each id once, up to the limit."""
        seen: set[str] | None = set() if self._source.count is None else None
        number = 0
        if self._limit is not None and self._limit <= 0:
            return
        for record in self._source.records(self._skip):
            if seen is not None:
                if record.id in seen:
                    self.doubles.append(record.id)
                    continue
                seen.add(record.id)
            yield record
            number += 1
            if self._limit is not None and number >= self._limit:
                return
