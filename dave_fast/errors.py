"""Everything dave-fast raises on purpose.

    DaveFastError
    ├── InputError            (ValueError)    images, targets or settings that cannot be explained
    │   └── ImageError                        a file that is no readable image
    │       └── TooLargeError                 an image of more pixels than are taken
    ├── ModelError            (ValueError)    the model cannot be explained, or not by the route asked for
    │   ├── UnknownModelError                 no such model name, or its weights cannot be fetched
    │   └── NotFrozenError                    the affine replay found an operator that was left unfrozen
    ├── RefusedError          (RuntimeError)  a server takes no more: its queue is full, or it is shutting down
    ├── OutOfMemoryError      (MemoryError)   not even the smallest micro-batch fits
    ├── BackendError          (RuntimeError)  a backend was asked for by name and cannot be used
    ├── RunError              (RuntimeError)  a run over a dataset stopped before its end; what is done is kept
    └── NonFiniteError        (ArithmeticError) NaN or infinity in images, logits or maps

Messages say what was given, what was expected, and what to do next.
"""

from __future__ import annotations


class DaveFastError(Exception):
    """Base of every error that dave-fast raises on purpose."""


class InputError(DaveFastError, ValueError):
    """Images, targets or settings that cannot be explained."""


class ImageError(InputError):
    """A file that is no readable image."""


class TooLargeError(ImageError):
    """An image of more pixels than are taken."""


class ModelError(DaveFastError, ValueError):
    """The model cannot be explained, or not by the route that was asked for."""


class UnknownModelError(ModelError):
    """No model of that name is known, or its weights cannot be fetched."""


class NotFrozenError(ModelError):
    """The affine replay found an input-dependent operator that was left unfrozen."""


class RefusedError(DaveFastError, RuntimeError):
    """A server does not take a request.

    kind: "full", "draining" or "too large". retry_after: whole seconds after which to come again, or None.
    """

    def __init__(self, kind: str, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.kind, self.retry_after = kind, retry_after


class OutOfMemoryError(DaveFastError, MemoryError):
    """Memory ran out with the smallest micro-batch."""


class BackendError(DaveFastError, RuntimeError):
    """A backend was asked for by name and cannot be used."""


class RunError(DaveFastError, RuntimeError):
    """A run over a dataset stopped before its end; what is done is kept, and it can be resumed."""


class NonFiniteError(DaveFastError, ArithmeticError):
    """NaN or infinity where finite numbers are needed."""


def reason_of(error: Exception) -> str:
    """Return what an error says, fit to stand inside of a sentence.

    The system's own words for an error of the operating system, else the first line of the message, else the error's
    class; without a full stop, and at most 300 characters.
    """
    if isinstance(error, OSError) and error.strerror:
        return (error.strerror[0].lower() + error.strerror[1:]).rstrip(".")
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
