"""Evidence regions: the smallest set of pixels that holds a share of a map, as a mask of the photograph.

A pixel of the photograph belongs to the region where its centre lies in a pixel of the map that does. Where the map is
finer than the photograph, a pixel belongs to it where the centre of any such pixel of the map lies in it.
"""

from __future__ import annotations

import numpy as np

_DONE = 255


def smallest_region(heat: np.ndarray, share: float) -> np.ndarray:
    """Return the smallest set of pixels whose values sum to at least a share of the map's: bool (H, W).

    Of equal values the first are taken, row by row. A map without evidence has an empty region.

    Args:
        heat: non-negative (H, W).
        share: in (0, 1].
    """
    order = np.argsort(-heat, axis=None, kind="stable")
    held = np.cumsum(heat.ravel()[order], dtype=np.float64)
    region = np.zeros(heat.size, bool)
    if held[-1] > 0:
        region[order[: np.searchsorted(held, share * held[-1]) + 1]] = True
    return region.reshape(heat.shape)


def on_photograph(region: np.ndarray, seen: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """Return a region (H, W) of a crop as one of the photograph: bool (height, width).

    Args:
        region: bool (H, W).
        seen: left, top, right and bottom of the crop, in pixels of the photograph (`Geometry.seen`).
        width: of the photograph.
        height: of the photograph.
    """
    left, top, right, bottom = seen
    return _stretched(_stretched(region, top, bottom, height).T, left, right, width).T


def _stretched(rows: np.ndarray, first: float, last: float, length: int) -> np.ndarray:
    """Return rows (n, m) that lie between two places, as rows of unit length from 0 on: bool (length, m)."""
    step = (last - first) / len(rows)
    made = np.zeros((length, rows.shape[1]), bool)
    if step >= 1:
        source = np.floor((np.arange(length) + 0.5 - first) / step).astype(np.int64)
        inside = (source >= 0) & (source < len(rows))
        made[inside] = rows[source[inside]]
    else:
        place = np.floor(first + (np.arange(len(rows)) + 0.5) * step).astype(np.int64)
        inside = (place >= 0) & (place < length)
        np.logical_or.at(made, place[inside], rows[inside])
    return made


def box_of(mask: np.ndarray) -> list[int]:
    """Return x, y, width and height of the smallest rectangle around a mask that is not empty."""
    (x, y), (right, bottom) = zip(*((int(found[0]), int(found[-1]) + 1) for found in _used(mask)), strict=True)
    return [x, y, right - x, bottom - y]


def _used(mask: np.ndarray) -> list[np.ndarray]:
    """Return the columns and the rows of a mask that have a pixel."""
    return [np.flatnonzero(mask.any(axis)) for axis in (0, 1)]


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of a mask (H, W), column by column; the first is of pixels outside: int64 (n,)."""
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return np.diff(changes, prepend=0, append=mask.size)


def packed(lengths: np.ndarray) -> str:
    """Return run lengths as COCO's compressed text.

    From the fourth on, a length is its difference to the length before the last. A number is written in groups of five
    bits, the lowest first, as the characters from "0" on; the sixth bit says that another group follows, and the last
    group's highest bit is the sign.
    """
    rest = lengths.astype(np.int64)
    rest[3:] -= lengths[1:-2]
    open_, groups = np.ones(len(rest), bool), []
    while open_.any():
        low, rest = rest & 31, rest >> 5
        more = np.where(low & 16, rest != -1, rest != 0)
        groups.append(np.where(open_, low + 32 * more + ord("0"), _DONE))
        open_ &= more
    characters = np.stack(groups, 1).ravel()
    return characters[characters != _DONE].astype(np.uint8).tobytes().decode("ascii")
