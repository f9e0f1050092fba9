"""Loading from hubs: one request decides whether the hub answers; if not, only files on disk are used.

Without it the hubs' own clients retry for half a minute for each file, or wait forever if packets are lost.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from urllib.parse import urlsplit

from dave_fast.errors import DaveFastError, UnknownModelError

SECONDS = 5.0
LOCAL = (
    "download it where there is a network, and copy the folder or the file here (hf:./FOLDER, or the architecture's "
    "name with --weights FILE)"
)
_lock = threading.Lock()


def answers(url: str) -> bool:
    """Return whether the host of a URL answers within SECONDS, through the user's proxies."""
    from huggingface_hub.utils import get_session

    place = urlsplit(url)
    try:
        get_session().head(f"{place.scheme}://{place.netloc}", timeout=SECONDS)
    # errors of httpx or requests, depending on the version of huggingface_hub: all of them mean no answer
    except Exception:
        return False
    return True


@contextmanager
def loading(name: str, *, remote: bool) -> Iterator[None]:
    """Load a model of another library within this context.

    Args:
        name: of the model, for messages.
        remote: whether the model may come from the Hugging Face hub; if that does not answer, its cache is used.

    Raises:
        UnknownModelError: anything inside fails, other than by an error of dave_fast or a missing package; the message
            has the reason and how to use local files.
    """
    from huggingface_hub import constants

    with _lock if remote else nullcontext():
        before = constants.HF_HUB_OFFLINE
        silent = remote and not before and not answers(constants.ENDPOINT)
        if silent:
            # the clients of timm and open_clip have no argument for it
            constants.HF_HUB_OFFLINE = True
        try:
            yield
        # a package that is missing is named with the extra that installs it
        except (DaveFastError, ModuleNotFoundError):
            raise
        except Exception as error:
            if not remote:
                raise UnknownModelError(f"{name!r} could not be loaded: {reason(error)}.") from error
            raise UnknownModelError(_why(name, error, constants.ENDPOINT, silent, before)) from error
        finally:
            if silent:
                constants.HF_HUB_OFFLINE = before


def _why(name: str, error: Exception, endpoint: str, silent: bool, offline: bool) -> str:
    if silent or offline:
        hub = f"{endpoint} does not answer" if silent else "the hub is switched off (HF_HUB_OFFLINE)"
        found = "is not on this machine" if _absent(error) else f"could not be loaded from here: {reason(error)}"
        return f"{hub}, and {name!r} {found}. {'Check the network' if silent else 'Unset it'}, or {LOCAL}."
    return f"{name!r} could not be loaded: {reason(error)}. Check the name and the tag, or {LOCAL}."


def _absent(error: BaseException | None) -> bool:
    """Return whether an error was caused by a file that is not in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def download(name: str, url: str, file: str | os.PathLike[str]) -> Iterator[None]:
    """Load a file from a URL within this context, unless it is on disk already.

    Args:
        name: of the model, for messages.
        url: of the file.
        file: its path on disk.

    Raises:
        UnknownModelError: the host does not answer, or anything inside fails.
    """
    place = urlsplit(url)
    if not os.path.exists(file) and not answers(url):
        raise UnknownModelError(
            f"{place.scheme}://{place.netloc} does not answer, and the weights of {name!r} are not on this machine. "
            f"Check the network, or {LOCAL}."
        )
    try:
        yield
    except Exception as error:
        raise UnknownModelError(
            f"{name!r} could not be loaded: {reason(error)}. Check the network and the disk, or {LOCAL}."
        ) from error


def reason(error: Exception) -> str:
    """Return an error of another library in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('. ')[:300] if lines else 'it does not say why'}"
