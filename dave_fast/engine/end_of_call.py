"""What the host must know at the end of a call, read from the device in one copy: the only time that it waits."""

from __future__ import annotations

from torch import Tensor

from dave_fast.engine.checks import finite_rows, refuse_rows
from dave_fast.models.fingerprint import HOST, State
from dave_fast.transfers import moved


class WeightsChangedError(Exception):
    """The weights are no longer those that the walks were made from: what was computed is to be done again."""


class EndOfCall:
    """The checks of one call.

    state: of the model when the walks of this call were made.

    Args:
        defers: whether checks are queued and read at the end, as on a GPU; else each is made at once, and `state` is
            known to be that of the model.
    """

    def __init__(self, *, defers: bool) -> None:
        self.state: State | None = None
        self._defers = defers
        self._checks: list[tuple[str, str]] = []
        self._finite: list[Tensor] = []

    def refuse_non_finite(self, values: Tensor, what: str, advice: str, *, now: bool = False) -> None:
        """NonFiniteError that names the images (rows of `values`) with NaN or infinity.

        Raised by `read` where checks are deferred; at once where they are not, or for values on the host (now=True).
        """
        finite = finite_rows(values)
        if self._defers and not now:
            self._checks.append((what, advice))
            self._finite.append(finite)
        else:
            refuse_rows(finite, what, advice)

    def read(self, *wanted: Tensor) -> list[Tensor]:
        """Tensors on the host, once all that the call has queued is done.

        Raises WeightsChangedError, NonFiniteError for the first check that failed.
        """
        # queued behind the call's work, so that the device is busy while the host queues them
        state = self.state if self._defers else None
        sums = [] if state is None else state.checksums()
        read = moved([*wanted, *self._finite, *sums], HOST)
        checks, last = len(wanted), len(wanted) + len(self._finite)
        if state is not None and not state.has(read[last:]):
            raise WeightsChangedError
        for finite, (what, advice) in zip(read[checks:last], self._checks, strict=True):
            refuse_rows(finite, what, advice)
        return read[:checks]
