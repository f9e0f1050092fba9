"""Read the records of a source ahead, on a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from itertools import islice

from dave_fast.errors import DaveFastError, RunError
from dave_fast.run.records import Record, RecordSource, Skip

# Bytes of encoded images that wait, in the parent or in one worker.
CONTENT_BYTES = 64 * 2**20
# The most records that wait in the parent.
_AHEAD = 1024


class Feed:
    """Records of a source, read ahead on a thread, within bounds on their number and bytes.

    Args:
        source: the records.
        skip: whether a record is left out, by its id.
        limit: the most records, None for all.

    Attributes:
        error: the error that ended the reading, or None.
        doubles: ids that occurred again; only sources that are not checked beforehand have them.
    """

    def __init__(self, source: RecordSource, skip: Skip, limit: int | None) -> None:
        self.error: BaseException | None = None
        self.doubles: list[str] = []
        self._source, self._skip, self._limit = source, skip, limit
        self._ready: deque[Record] = deque()
        self._bytes = 0
        self._room = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._read, name="source", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def ended(self) -> bool:
        """Whether no more records will come."""
        return not self._thread.is_alive() and not self._ready

    def take(self) -> Record | None:
        """Return the next record, None if none is ready."""
        if not self._ready:
            return None
        with self._room:
            record = self._ready.popleft()
            self._bytes -= len(record.content or b"")
            self._room.notify()
        return record

    def stop(self) -> None:
        """Stop reading."""
        with self._room:
            self._stopping = True
            self._room.notify()

    def _read(self) -> None:
        try:
            for record in islice(self._fresh(), self._limit):
                with self._room:
                    self._room.wait_for(self._may_go_on)
                    if self._stopping:
                        return
                    self._ready.append(record)
                    self._bytes += len(record.content or b"")
        except DaveFastError as error:
            self.error = error
        except BaseException as error:
            self.error = RunError(f"reading {self._source.place} failed: {type(error).__name__}: {error}")

    def _may_go_on(self) -> bool:
        return self._stopping or (len(self._ready) < _AHEAD and self._bytes <= CONTENT_BYTES)

    def _fresh(self) -> Iterator[Record]:
        """Yield the records without a row, each id once."""
        seen: set[str] = set()
        for record in self._source.records(self._skip):
            # Sources that know the number of their records have checked the ids.
            if self._source.count is None:
                if record.id in seen:
                    self.doubles.append(record.id)
                    continue
                seen.add(record.id)
            yield record
