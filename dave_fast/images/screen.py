"""Show figures, below the cell of a notebook or by the system's program for pictures, and save them."""

from __future__ import annotations

import io
import os
import sys
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageShow

from dave_fast.errors import InputError
from dave_fast.images.drawing import check_suffix, save_as
from dave_fast.images.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# suffixes of figures without pixels
VECTORS = (".pdf", ".svg")
_NOTEBOOK_DPI = 150


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


class Drawn:
    """What can be drawn as a figure."""

    def figure(self, **options: Any) -> Figure:
        """Return the figure."""
        raise NotImplementedError

    def show(self, **options: Any) -> None:
        """Show the figure: below the cell of a notebook, else by the system's program for pictures.

        Args:
            options: those of `figure`.

        Raises:
            InputError: as `figure`, and where there is no screen.
        """
        show_png(self._png(**options))

    def _png(self, **options: Any) -> bytes:
        """Return the figure as PNG."""
        buffer = io.BytesIO()
        self.figure(**options).savefig(buffer, format="png", dpi=_NOTEBOOK_DPI)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes | None:
        """Return the figure as PNG for notebooks, None where there is none: a notebook then shows the words."""
        try:
            return self._png()
        except InputError:
            return None

    def _repr_html_(self) -> str:
        """Return the figure and the words, for notebooks that take HTML."""
        png, words = self._repr_png_(), f"<pre>{escape(repr(self))}</pre>"
        return words if png is None else f'<img src="data:image/png;base64,{b64encode(png).decode()}">{words}'

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the figure and return its path.

        Args:
            path: its suffix says the form: .pdf, .svg, .png, .jpg, .webp ...
            options: those of `figure`.

        Raises:
            InputError: as `figure`, and where the suffix is none of a picture or the file cannot be written.
        """
        if Path(path).suffix.lower() in VECTORS:
            return save_figure(self.figure(**options), path)
        check_suffix(path)
        return save_as(Image.open(io.BytesIO(self._png(**options))).convert("RGB"), path)
