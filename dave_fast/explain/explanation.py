"""The result of `DAVE.explain`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dave_fast.explain.depth import PIXELS
from dave_fast.explain.depth_account import Depths


@dataclass(frozen=True)
class Explanation:
    """Attribution maps of B images, and what they explain.

    Of K targets (`targets=` or `top_k=`) maps, raw, signed, target and probability have a dimension K after B. Of
    several depths maps, raw and signed have a dimension for them, after B and K.

    Attributes:
        maps: (B, H, W) float32 in [0, 1], for looking at: signed without its negative part, smoothed.
        raw: (B, C, H, W) float32, signed, per channel: the median/MAD mean of effective gradient ⊙ image. At a block,
            that of the evidence of its tokens, of which each channel has an equal share.
        signed: (B, H, W) float32, raw's sum over the channels, after shrinkage where `shrink` is True.
        target: (B,) int64, the class; −1 where the target is not a class.
        probability: (B,) float32, that of the class by the unperturbed image's output, a softmax or a sigmoid of it
            (`models.meaning`); NaN where the target is not a class, or the output has no probabilities.
        output: (B, ...) float32, the model's output for the unperturbed images.
        n_samples: as given.
        seed: as given.
        shrink: whether the maps are shrunk (see `DAVE`); False: they are the paper's.
        depth: "pixels", the number of a block or a range of blocks such as "5-9", or a tuple of them for several.
        depths: what of the decision each depth accounts for; None where only the pixels were asked for (`DAVE.depths`).
    """

    maps: Tensor
    raw: Tensor
    signed: Tensor
    target: Tensor
    probability: Tensor
    output: Tensor
    n_samples: int
    seed: int
    shrink: bool
    depth: str | int | tuple[str | int, ...] = PIXELS
    depths: Depths | None = None

    @property
    def levels(self) -> tuple[str | int, ...]:
        """Each depth, as a tuple also where there is one."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,)
