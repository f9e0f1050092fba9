"""The `.npz` file of an explained image, as the command line and the server write it.

It holds numbers and strings only, so that `numpy.load` reads it without pickle. With K targets, C channels of the
model's input and H×W pixels:

    maps                (K, H, W) float32, in [0, 1]
    raw                 (K, C, H, W) float32, signed attribution
    input               (H, W, 3) uint8, the crop of the photograph that the model was given
    targets             (K,) int64, class indices; −1 where a target is not a class
    class_names         (K,) strings, each target in words
    probabilities       (K,) float32; NaN where a target is not a class
    errors              (K,) float64, estimated errors (see `dave_fast.explain.convergence`); infinity where unknown
    error_bounds        (K,) float64, the bounds of these errors; infinity where unknown
    top_targets         int64, the five most probable classes (or all that were explained, where these are more);
                        empty where the model has no classes
    top_class_names     strings, one for each of top_targets
    top_probabilities   float32, one for each of top_targets
    samples             int64, perturbed samples that the maps are made of
    n_samples           int64, perturbed samples that were asked for
    seed                int64, or uint64 for a seed modulo 2⁶⁴
    noise_alpha         float64
    shrink              bool, whether the maps are shrunk (see `dave_fast.DAVE`), which raw never is; files without it
                        are of earlier versions, whose maps are not
    depth               string, "pixels", or the block or blocks whose tokens the maps are of, such as "6" or "5-9" (see
                        `dave_fast.explain.depth`); files without it have maps of pixels
    method              string, that of attribution: "DAVE", as of files without it, or another of `dave_fast.Explainer`
    model, precision, dave_fast_version, image    strings; image is the path of the photograph, empty where unknown

Of several depths in one file, as the server writes it, maps, raw, errors and error_bounds have a dimension L after K,
and depth has commas between them, as in "pixels,6".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dave_fast._version import __version__
from dave_fast.explain.depth import PIXELS
from dave_fast.explain.pictures import Scored

if TYPE_CHECKING:
    from torch import Tensor


def arrays_of(
    *,
    maps: Tensor,
    raw: Tensor,
    crop: np.ndarray,
    targets: Sequence[Scored],
    top: Sequence[Scored],
    samples: int,
    n_samples: int,
    seed: int,
    shrink: bool,
    model: str,
    precision: str,
    noise_alpha: float,
    depths: Sequence[str | int] = (PIXELS,),
    image: str = "",
    method: str = "DAVE",
    errors: Sequence[float] | None = None,
    error_bounds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the content of the file of an explained image.

    Args:
        maps: (K, H, W), of several depths (K, L, H, W).
        raw: (K, C, H, W), of several depths (K, L, C, H, W).
        crop: (H, W, 3) uint8.
        targets: the K targets.
        top: the most probable classes.
        samples: perturbed samples that the maps are made of.
        n_samples: perturbed samples that were asked for.
        seed: of the samples.
        shrink: whether the maps are shrunk.
        model: the model's name.
        precision: of the computation.
        noise_alpha: the largest noise level.
        depths: of the maps, resolved ones such as "pixels", 6 or "5-9".
        image: the path of the photograph.
        method: of attribution.
        errors: of the K maps; None where they were not estimated.
        error_bounds: of the K maps; None where they were not estimated.
    """
    unknown = [np.inf] * len(targets)
    # An integer outside of 64 bits would need pickle, and draws depend on the seed modulo 2⁶⁴ alone.
    kept_seed = np.int64(seed) if abs(seed) < 2**63 else np.uint64(seed % 2**64)
    return {
        "maps": maps.cpu().numpy(),
        "raw": raw.cpu().numpy(),
        "input": crop,
        **_columns(targets),
        "errors": np.array(unknown if errors is None else errors),
        "error_bounds": np.array(unknown if error_bounds is None else error_bounds),
        **{f"top_{name}": column for name, column in _columns(top).items()},
        "samples": np.int64(samples),
        "n_samples": np.int64(n_samples),
        "seed": kept_seed,
        "noise_alpha": np.float64(noise_alpha),
        "shrink": np.bool_(shrink),
        "depth": ",".join(map(str, depths)),
        "method": method,
        "model": model,
        "precision": precision,
        "dave_fast_version": __version__,
        "image": image,
    }


def _columns(rows: Sequence[Scored]) -> dict[str, np.ndarray]:
    return {
        "targets": np.array([target for target, _, _ in rows], np.int64),
        "class_names": np.array([name for _, name, _ in rows], np.str_),
        "probabilities": np.array([probability for _, _, probability in rows], np.float32),
    }
