"""Show a picture: below the cell of a notebook, else by the system's program for pictures."""

from __future__ import annotations

import io
import os
import sys

from PIL import Image, ImageShow

from dave_fast.errors import InputError


def show_png(content: bytes) -> None:
    """Show a PNG.

    Raises:
        InputError: there is no screen, or no program that shows pictures.
    """
    if _in_notebook():
        from IPython.display import Image as Shown
        from IPython.display import display

        display(Shown(data=content))
        return
    headless = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless or not ImageShow.show(Image.open(io.BytesIO(content)), title="dave-fast"):
        raise InputError("there is no screen here, or no program that shows pictures; write a file: .save('map.png')")


def _in_notebook() -> bool:
    """Return whether a notebook's kernel runs this code."""
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    return running is not None and hasattr(running, "kernel")
