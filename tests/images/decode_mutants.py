"""Decode damaged pictures under limits of memory and time: `python -m tests.images.decode_mutants FIRST STOP`.

Prints a line for each before it is decoded, so that a crash names its picture, and one for each that was wrong.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings

from dave_fast.errors import ImageError
from dave_fast.images import decode_image
from tests.images.mutants import bombs, mutant

PIXELS = 4_000_000
MEGABYTES, SECONDS = 400, 2


def check(name: str, content: bytes) -> str | None:
    """Return what is wrong with how a picture is decoded, None if nothing is."""
    began = time.process_time()
    soft = int(began) + SECONDS + 2
    # A loop without end is ended by the system, with SIGXCPU.
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    wrong = None
    try:
        image = decode_image(content, name, max_pixels=PIXELS, note=len)
        if image.mode != "RGB" or image.width * image.height > PIXELS:
            wrong = f"is {image.mode} of {image.size}"
    except ImageError as error:
        causes: list[BaseException | None] = [error]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        short = any(isinstance(each, MemoryError) for each in causes)
        wrong = f"needed more than {MEGABYTES} MB" if short else None
    except BaseException as error:
        wrong = f"raised {type(error).__name__}: {error}"
    took = time.process_time() - began
    return wrong or (f"took {took:.1f} s" if took > SECONDS else None)


def main() -> None:
    """Check the mutants of the numbers FIRST to STOP - 1, or the bombs if there are no numbers."""
    # A decoder's warning is no concern of a caller.
    warnings.simplefilter("error")
    numbers = range(*map(int, sys.argv[1:] or ["0"]))
    cases = ((f"{n} {name}", content) for n in numbers for name, content in [mutant(n)]) if numbers else bombs().items()
    cases = iter(list(cases))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    most = used + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for name, content in cases:
        print("decoding", name, flush=True)
        wrong = check(name, content)
        if wrong:
            print("wrong", name, wrong, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
