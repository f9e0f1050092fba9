"""The exceptions of dave-fast.

    DaveFastError
    ├── InputError            (ValueError)    images, targets or settings that cannot be explained
    │   ├── ImageError                        an image file that cannot be read
    │   │   └── TooLargeError                 an image of more pixels than the limit
    │   └── MissingPackageError (ImportError) a package that an extra of dave-fast installs, and that is not there
    ├── ModelError            (ValueError)    a model that cannot be explained, or not by the requested route
    │   ├── UnknownModelError                 an unknown model name, or weights that cannot be fetched
    │   └── NotFrozenError                    the affine replay found an operator that depends on the input
    ├── RefusedError          (RuntimeError)  a server does not accept a request: full, draining or too large
    ├── OutOfMemoryError      (MemoryError)   memory ran out with the smallest micro-batch
    ├── BackendError          (RuntimeError)  a backend requested by name cannot be used
    ├── RunError              (RuntimeError)  a run over a dataset stopped early; finished work is kept
    └── NonFiniteError        (ArithmeticError) NaN or infinity in images, logits or maps

    ImageWarning              (UserWarning)   an image file of which something had to be assumed
    InputWarning              (UserWarning)   images that look as if they were not what the model expects

Messages say what was given, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class DaveFastError(Exception):
    """Base class of the exceptions of dave-fast."""


class InputError(DaveFastError, ValueError):
    """Images, targets or settings that cannot be explained."""


class ImageError(InputError):
    """An image file that cannot be read."""


class TooLargeError(ImageError):
    """An image of more pixels than the limit."""


class MissingPackageError(InputError, ImportError):
    """A package that an extra of dave-fast installs, and that is not there."""


class ModelError(DaveFastError, ValueError):
    """A model that cannot be explained, or not by the requested route."""


class UnknownModelError(ModelError):
    """A model name that is unknown, or whose weights cannot be fetched."""


class NotFrozenError(ModelError):
    """An operator that depends on the input where it should be held constant, found by the affine replay."""


class RefusedError(DaveFastError, RuntimeError):
    """A request that a server does not accept.

    Args:
        kind: "full", "draining" or "too large".
        reason: the message.
        retry_after: whole seconds after which the client may try again, or None.
    """

    def __init__(self, kind: str, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.kind, self.retry_after = kind, retry_after


class OutOfMemoryError(DaveFastError, MemoryError):
    """Memory that ran out with the smallest micro-batch."""


class BackendError(DaveFastError, RuntimeError):
    """A backend requested by name that cannot be used."""


class RunError(DaveFastError, RuntimeError):
    """A run over a dataset that stopped early; finished work is kept, and the run can be resumed."""


class NonFiniteError(DaveFastError, ArithmeticError):
    """NaN or infinity where finite numbers are needed."""


class ImageWarning(UserWarning):
    """An image file that does not say all that its pixels mean, so that something was assumed; once for a file."""


class InputWarning(UserWarning):
    """Images that look as if they were not what the model expects, and are explained all the same."""


def reason_of(error: Exception) -> str:
    """Return what an error says, fit to stand inside of a sentence.

    The system's own words for an error of the operating system, else the first line of the message, else the error's
    class; without a full stop, and at most 300 characters.
    """
    if isinstance(error, OSError) and error.strerror:
        return (error.strerror[0].lower() + error.strerror[1:]).rstrip(".")
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


def installing(extra: str) -> str:
    """Return how an extra is installed; an installed package does not know where its checkout is, or was."""
    return f"pip install '.[{extra}]' in a checkout of dave-fast"


def missing(extra: str, what: str, package: str) -> MissingPackageError:
    """Return the error that `what` needs a package of an extra."""
    return MissingPackageError(f"{what} needs the package {package}, which is missing: {installing(extra)}")


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Import packages of an extra within this context.

    Args:
        extra: its name.
        what: what needs them, for the message.

    Raises:
        MissingPackageError: one of them is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(extra, what, (error.name or "").partition(".")[0]) from error


def suggestion(name: str, known: Sequence[str], listing: str) -> str:
    """Return a hint for an unknown name: the known names nearest to it, otherwise the call that lists them."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"see {listing}."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU, in PyTorch's CPU allocator, or in C++."""
    if isinstance(error, MemoryError):
        return True
    # PyTorch's own class is told by its name, so that this module needs no PyTorch
    words = ("can't allocate memory", "std::bad_alloc", "CUDA out of memory", "out of memory")
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
    )
