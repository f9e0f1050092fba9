"""Deferred checks of a call, read from the device in one copy at its end, so that the host waits once."""

from __future__ import annotations

import torch
from torch import Tensor

from dave_fast.errors import NonFiniteError
from dave_fast.models.fingerprint import HOST, State
from dave_fast.transfers import moved


class WeightsChangedError(Exception):
    """Weights that differ from those that the walks were made from, so that the call has to be repeated."""


class EndOfCall:
    """The checks of one call.

    Args:
        defers: whether checks are queued and read at the end, as on a GPU; otherwise each is made at once, and the
            caller has already compared `state` with the model.

    Attributes:
        state: of the model when the walks of this call were made.
    """

    def __init__(self, *, defers: bool) -> None:
        self.state: State | None = None
        self._defers = defers
        # (finite, values in words, advice)
        self._checks: list[tuple[Tensor, str, str]] = []

    def refuse_non_finite(self, values: Tensor, what: str, advice: str, *, now: bool = False) -> None:
        """Raise NonFiniteError, now or in `read`, where images have NaN or infinity.

        Args:
            values: (B, ...), one row an image.
            what: the values, for the message.
            advice: what to do, for the message.
            now: whether to check at once, for values on the host; otherwise deferred checks are made by `read`.
        """
        finite = torch.isfinite(values).reshape(len(values), -1).all(1)
        if self._defers and not now:
            self._checks.append((finite, what, advice))
        else:
            _refuse(finite, what, advice)

    def read(self, *wanted: Tensor) -> list[Tensor]:
        """Wait for all that the call has queued and return tensors on the host.

        Args:
            wanted: tensors on the device.

        Raises:
            WeightsChangedError: the model's weights are no longer those of `state`.
            NonFiniteError: a queued check failed; the first one is named.
        """
        # queued behind the call's work: the device is not idle while the host queues them
        state = self.state if self._defers else None
        sums = [] if state is None else state.checksums()
        read = moved([*wanted, *(finite for finite, _, _ in self._checks), *sums], HOST)
        checks, last = len(wanted), len(wanted) + len(self._checks)
        if state is not None and not state.has(read[last:]):
            raise WeightsChangedError
        for finite, (_, what, advice) in zip(read[checks:last], self._checks, strict=True):
            _refuse(finite, what, advice)
        return read[:checks]


def _refuse(finite: Tensor, what: str, advice: str) -> None:
    """Raise NonFiniteError with the numbers of the images that are not finite; finite: (B,) bool on the host."""
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise NonFiniteError(f"NaN or infinity in {what} of image {', '.join(map(str, bad))}. {advice}")
