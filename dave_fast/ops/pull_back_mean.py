"""pull_back_mean: robust_mean(pull_back(...)), one tile of source pixels at a time.

pull_back_mean_variance: the same, and the variance of the sum over channels of that mean.

It is for images and sample counts whose contributions do not fit in memory: it needs the cotangents of all S rows, in
any dtype (bfloat16 halves them), and the contributions of one tile. DAVE, arXiv 2602.06613, Eq. 6-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry, _warp
from dave_fast.ops.patches import PatchSize, patch_hw
from dave_fast.ops.pull_back import check, contributions_of, cotangents_and_images
from dave_fast.ops.robust_mean import MOST_SAMPLES, robust_mean_ref, robust_mean_variance_ref, variance_like
from dave_fast.sampling import Draws

# Rows of source pixels in a tile of the reference.
REF_TILE = 32
# Bytes of contributions in a tile of the CUDA form: they stay in the L2 cache of an A100 or H100.
SCRATCH_BYTES = 16 << 20
# Source pixels of the smallest tile: one block of threads.
SMALLEST_TILE = 128
# Makes the contributions (rows, C, rows of pixels, W) of some rows of the draws at some rows of source pixels.
Pull = Callable[[slice, slice], Tensor]


def pull_back_mean(
    token_cotangents: Tensor,
    images: Tensor,
    draws: Draws,
    patch_size: PatchSize,
    n_samples: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return the robust mean over each image's S contributions without storing all contributions at once.

    Args:
        token_cotangents: (B·S, n, C·p_h·p_w) float32, float64, bfloat16 or float16; rows image-major, b·S + s.
        images: (any number, C, H, W) float32 or float64, contiguous; the arithmetic is that of its dtype. Row r belongs
            to image draws.image_index[r], so that part of a batch's rows can be given with all of its images.
        draws: the B·S rows that the tokens were made from.
        patch_size: p or (p_h, p_w).
        n_samples: S; each run of S rows makes one output.
        backend: "auto", or the name of one.

    Returns:
        raw (B, C, H, W) of images' dtype: bit for bit robust_mean(pull_back(...)) of contributions in that dtype.

    Raises:
        TypeError: an argument is of another type.
        InputError: shapes do not match, or n_samples does not divide the rows.
    """
    given = token_cotangents, images, draws, patch_size, n_samples
    found: Tensor = _run("pull_back_mean", backend, *given)
    return found


def pull_back_mean_variance(
    token_cotangents: Tensor,
    images: Tensor,
    draws: Draws,
    patch_size: PatchSize,
    n_samples: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the robust mean over each image's S contributions and the variance of its sum over the channels.

    Args:
        token_cotangents: as `pull_back_mean` takes them, as are the others.
        images: (any number, C, H, W).
        draws: the B·S rows that the tokens were made from.
        patch_size: p or (p_h, p_w).
        n_samples: S.
        backend: "auto", or the name of one.

    Returns:
        raw (B, C, H, W) of images' dtype and the variance (B, H, W) float64: bit for bit
        robust_mean_variance(pull_back(...)) of contributions in images' dtype.

    Raises:
        TypeError: an argument is of another type.
        InputError: shapes do not match, or n_samples does not divide the rows.
    """
    given = token_cotangents, images, draws, patch_size, n_samples
    found: tuple[Tensor, Tensor] = _run("pull_back_mean_variance", backend, *given)
    return found


def _run(
    op: str, backend: str, token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> Any:
    """Run one of the two ops; raise TypeError or InputError where the arguments do not match."""
    if torch.compiler.is_compiling():
        return _library.call(op, token_cotangents, images, draws, *patch_hw(patch_size), n_samples, backend)
    check(token_cotangents, images, draws, patch_size)
    check_samples(n_samples, draws)
    return _registry.run(op, backend, token_cotangents, images, draws, patch_size, n_samples)


def check_samples(n_samples: int, draws: Draws) -> None:
    """Raise InputError where the rows of the draws are not those of images with n_samples each."""
    if not isinstance(n_samples, int) or not 1 <= n_samples < MOST_SAMPLES or len(draws) % n_samples:
        raise InputError(f"n_samples must divide the {len(draws)} rows of the draws; got {n_samples!r}")


def pull_back_mean_ref(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> Tensor:
    """Run `pull_back_mean` in PyTorch, on any device."""
    raw = images.new_empty(len(draws) // n_samples, *images.shape[1:])
    pull = _puller(token_cotangents, images, draws, patch_size)
    for b, rows, contributions in tiles(raw, n_samples, pull):
        raw[b, :, rows] = robust_mean_ref(contributions[None])[0]
    return raw


def pull_back_mean_variance_ref(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> tuple[Tensor, Tensor]:
    """Run `pull_back_mean_variance` in PyTorch, on any device."""
    raw = images.new_empty(len(draws) // n_samples, *images.shape[1:])
    variance = variance_like(raw)
    pull = _puller(token_cotangents, images, draws, patch_size)
    for b, rows, contributions in tiles(raw, n_samples, pull):
        (raw[b, :, rows],), (variance[b, rows],) = robust_mean_variance_ref(contributions[None])
    return raw, variance


def _puller(token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize) -> Pull:
    """Return what makes contributions of a part of the draws."""
    return lambda part, rows: contributions_of(token_cotangents[part], images, draws[part], patch_size, rows)


def tiles(raw: Tensor, n_samples: int, pull: Pull) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield an image's number, rows of its source pixels, and its contributions (S, C, rows, W) there.

    Args:
        raw: (B, C, H, W), of the dtype and on the device of the contributions; not read.
        n_samples: S.
        pull: makes the contributions.
    """
    _, channels, height, width = raw.shape
    step = min(n_samples, _warp.rows_a_chunk(raw))
    for b in range(len(raw)):
        for top in range(0, height, REF_TILE):
            rows = slice(top, min(top + REF_TILE, height))
            contributions = raw.new_empty(n_samples, channels, rows.stop - top, width)
            for start in range(0, n_samples, step):
                part = slice(b * n_samples + start, b * n_samples + min(start + step, n_samples))
                contributions[start : start + step] = pull(part, rows)
            yield b, rows, contributions


def pull_back_mean_native(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> Tensor:
    """Run `pull_back_mean` in C++ on the host."""
    images = images.contiguous()
    given = cotangents_and_images(token_cotangents, images, draws)
    raw = images.new_empty(len(draws) // n_samples, *images.shape[1:])
    _ext.run_native("pull_back_mean", *given, draws, *patch_hw(patch_size), n_samples, raw)
    return raw


def pull_back_mean_variance_native(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> tuple[Tensor, Tensor]:
    """Run `pull_back_mean_variance` in C++ on the host."""
    images = images.contiguous()
    given = cotangents_and_images(token_cotangents, images, draws)
    raw = images.new_empty(len(draws) // n_samples, *images.shape[1:])
    variance = variance_like(raw)
    _ext.run_native("pull_back_mean_variance", *given, draws, *patch_hw(patch_size), n_samples, raw, variance)
    return raw, variance


def pull_back_mean_cuda(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> Tensor:
    """Run `pull_back_mean` in CUDA C++ on images' device."""
    images = images.contiguous()
    given = cotangents_and_images(token_cotangents, images, draws)
    tile, scratch = tile_and_scratch(images, n_samples, variance=False)
    raw = images.new_empty(len(draws) // n_samples, *images.shape[1:])
    _ext.run_cuda("pull_back_mean", *given, draws, *patch_hw(patch_size), n_samples, tile, scratch, raw)
    return raw


def pull_back_mean_variance_cuda(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, n_samples: int
) -> tuple[Tensor, Tensor]:
    """Run `pull_back_mean_variance` in CUDA C++ on images' device."""
    images = images.contiguous()
    given = cotangents_and_images(token_cotangents, images, draws)
    tile, scratch = tile_and_scratch(images, n_samples, variance=True)
    raw = images.new_empty(len(draws) // n_samples, *images.shape[1:])
    variance = variance_like(raw)
    given = (*given, draws, *patch_hw(patch_size), n_samples, tile)
    _ext.run_cuda("pull_back_mean_variance", *given, scratch, raw, variance)
    return raw, variance


def tile_and_scratch(images: Tensor, n_samples: int, *, variance: bool) -> tuple[int, Tensor]:
    """Return how many source pixels the CUDA form takes at once, and its scratch memory.

    They are those whose contributions fit SCRATCH_BYTES, in whole blocks of threads.
    """
    channels, height, width = images.shape[1:]
    fitting = SCRATCH_BYTES // (n_samples * channels * images.element_size())
    tile = min(max(SMALLEST_TILE, fitting // SMALLEST_TILE * SMALLEST_TILE), height * width)
    # the contributions of a tile, and with the variance the median and the threshold of each of its means
    return tile, images.new_empty((n_samples + 2 * variance) * channels * tile)
