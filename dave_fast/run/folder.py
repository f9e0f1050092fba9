"""The folder of a run: what is done in it, and whether it may go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dave_fast.errors import InputError
from dave_fast.run.identity import RUN_FILE, load_identity, make_identity, refuse_other, save_identity
from dave_fast.run.lock import Fence, Lock
from dave_fast.run.shards import committed_ids, drop_errors, remove_leftovers, shard_files
from dave_fast.run.sources import RecordSource


class RunFolder:
    """A folder under lock, before and after it is found to hold the run that is asked for.

    done: the ids that have a row. limit: rows in all, at most. retry_errors: rows with an error are taken out.
    """

    def __init__(
        self, folder: Path, lock: Lock, source: RecordSource, *, limit: int | None = None, retry_errors: bool = False
    ) -> None:
        self.folder, self.lock, self.source, self.limit, self.retry_errors = folder, lock, source, limit, retry_errors
        # Whoever still works for an earlier run, somewhere, is kept out from here on.
        Fence.renew(folder)
        self.before = load_identity(folder)
        if self.before is None and shard_files(folder):
            raise InputError(f"{folder} holds Parquet files but no {RUN_FILE}: it is no run. Choose another --out.")
        if self.before is not None:
            # What a change of the source would make useless need not wait for the model.
            refuse_other(
                folder, self.before, self.before | {"source": make_identity({}, "", source.identity)["source"]}
            )
        remove_leftovers(folder)
        self.done = committed_ids(folder)

    def check(self, configuration: dict[str, Any], weights: str) -> dict[str, Any]:
        """The run's identity. Raises InputError where the folder holds another run."""
        identity = make_identity(configuration, weights, self.source.identity)
        if self.before is None:
            save_identity(self.folder, identity)
        else:
            refuse_other(self.folder, self.before, identity)
        if self.retry_errors and drop_errors(self.folder):
            self.done = committed_ids(self.folder)
        return identity

    def left(self) -> int | None:
        """How many records may be done; None for all that there are. Known once `check` has been called."""
        return None if self.limit is None else max(0, self.limit - len(self.done))

    def skip(self, record_id: str) -> bool:
        """Whether a record has its row."""
        return record_id in self.done
