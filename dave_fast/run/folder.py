"""The folder of a run: which records are done, and whether the folder's run may be continued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dave_fast.errors import InputError
from dave_fast.run.identity import RUN_FILE, load_identity, make_identity, refuse_other, save_identity, save_names
from dave_fast.run.lock import Fence, Lock
from dave_fast.run.records import RecordSource
from dave_fast.run.shards import committed_ids, drop_errors, remove_leftovers, shard_files


class RunFolder:
    """A locked output folder. `check` compares the run in it with the one that is being started.

    Args:
        folder: the output folder, which exists.
        lock: the lock on it, held by this process.
        source: the records of the run that is being started.
        limit: the most rows in all, those of earlier runs included; None: no limit.
        retry_errors: whether records whose row is an error are explained again.

    Raises:
        InputError: the folder holds Parquet files of something else, or a run over another source.

    Attributes:
        done: the ids that have a row.
    """

    def __init__(
        self, folder: Path, lock: Lock, source: RecordSource, *, limit: int | None = None, retry_errors: bool = False
    ) -> None:
        self.folder, self.lock, self.source, self.limit, self.retry_errors = folder, lock, source, limit, retry_errors
        # From here on no worker of an earlier run can commit.
        Fence.renew(folder)
        self.before = load_identity(folder)
        if self.before is None and shard_files(folder):
            raise InputError(f"{folder} holds Parquet files but no {RUN_FILE}, so it is no run: choose another --out.")
        if self.before is not None:
            # Another source is refused before the model is loaded, which takes long.
            same_model = self.before | {"source": make_identity({}, "", source.identity)["source"]}
            refuse_other(folder, self.before, same_model)
        remove_leftovers(folder)
        self.done = committed_ids(folder)

    def check(self, configuration: dict[str, Any], weights: str, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the run's identity, which is saved if the folder is new, as the names of the classes are.

        Args:
            configuration: every setting that changes a map, `Mapper.configuration`.
            weights: hash of the model's weights.
            names: K class names, None where the classes have none. Another run may have others.

        Raises:
            InputError: the folder holds another run.
        """
        identity = make_identity(configuration, weights, self.source.identity)
        if self.before is None:
            save_identity(self.folder, identity)
        else:
            refuse_other(self.folder, self.before, identity)
        if names is not None:
            save_names(self.folder, names)
        if self.retry_errors:
            drop_errors(self.folder)
            self.done = committed_ids(self.folder)
        return identity

    def left(self) -> int | None:
        """Return how many more records may be explained, None without a limit. Valid once `check` has been called."""
        return None if self.limit is None else max(0, self.limit - len(self.done))
