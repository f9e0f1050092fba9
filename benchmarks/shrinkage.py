"""Forms of shrinkage, compared on the samples of the same images: which one `dave_fast.ops.shrink` computes, and why.

    python -m benchmarks.shrinkage scenes
    python -m benchmarks.shrinkage photographs --model hf:FOLDER --photographs FOLDER --boxes FILE
    python -m benchmarks.shrinkage write

A form takes the S samples of an image to the signed channel sum m' that `smooth` makes a map of. The first half of the
images is what the form was chosen on, the other half was looked at afterwards. Each image's limit is the paper's map of
further samples. The first two steps take minutes and write JSON beside the other results; the last one writes the
tables of docs/shrinkage.md.

With m = Σ_channels raw, v its variance, G_σ a Gaussian window, and share(p, n) = max(1 − n/p, 0):

    paper             m
    one factor        m·share(G₁.₅*m², G₁.₅*v)
    by channel        the same, channel by channel, and then summed
    halves            m·(G₁.₅*(A·B)) / (G₁.₅*m²), of the robust means A, B of both halves of the samples
    soft threshold    sign(m)·max(|m| − √v/2, 0)
    Wiener            μ + d·share(G₁*d², G₁*v), μ = G₁*m, d = m − μ
    wavelet           share in each of three à trous bands and the rest, by the samples' own variance in the band
    two exact bands   as `shrink`'s detail and mean, each by the samples' own variance in it
    windows of 4      (μ + d·share(G₄*d²))·share(G₄*m²), both shares with the noise G₄*v
    windows of 8      the same, of 8 pixels
    shrink            the same, of 5 pixels: what the op computes
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dave_fast
from benchmarks import machine
from benchmarks.convergence import Example, ImageSet, contributions, photographs, scenes
from dave_fast.evaluate import metrics
from dave_fast.ops.robust_mean import mean_and_kept, robust_mean, robust_mean_variance
from dave_fast.ops.shrink import shrink, shrink_ref
from dave_fast.ops.smooth import blur, gaussian_weights, smooth

SIZES = (8, 16, 32, 64)
# scenes of this seed are in no other table; images of each kind, and samples of their limits
SEED, IMAGES, LIMITS = 2026_13, {"scenes": 48, "photographs": 28}, {"scenes": 768, "photographs": 320}
PAGE = Path(__file__).parents[1] / "docs" / "shrinkage.md"


@dataclass(frozen=True)
class Samples:
    """The first S contributions (S, C, H, W) of an image, and what the robust mean makes of them.

    Attributes:
        contributions: (S, C, H, W).
        raw: (C, H, W).
        variance: (H, W), of m.
        by_channel: (S, C, H, W) float64: keep·(c_s − raw).
        divisor: (H, W): the sum of squared deviations over it is a variance.
    """

    contributions: Tensor
    raw: Tensor
    variance: Tensor
    by_channel: Tensor
    divisor: Tensor

    @classmethod
    def of(cls, contributions: Tensor) -> Samples:
        """Return the samples with their statistics."""
        raw, variance = (each[0] for each in robust_mean_variance(contributions[None]))
        kept = mean_and_kept(contributions)[1]
        number = kept.sum(0).double().mean(0)
        divisor = (number * (number - 1)).clamp(min=1e-9)
        return cls(contributions, raw, variance, (contributions - raw).double() * kept, divisor)

    @property
    def sum(self) -> Tensor:
        """The sum m (H, W) of raw over the channels, in float64."""
        return self.raw.double().sum(0)

    @property
    def deviations(self) -> Tensor:
        """The samples' deviations (S, H, W) from m."""
        return self.by_channel.sum(1)


def window(planes: Tensor, sigma: float) -> Tensor:
    """Return planes (..., H, W) in float64 convolved with a normalised Gaussian, padded with zeros."""
    return _blurred(planes, gaussian_weights(2 * math.ceil(3 * sigma) + 1, sigma))


def _blurred(planes: Tensor, weights: list[float]) -> Tensor:
    return blur(planes.double().reshape(-1, *planes.shape[-2:]), weights).view(planes.shape)


def share(values: Tensor, noise: Tensor) -> Tensor:
    """Return max(1 − noise/values, 0); 0 where there is neither."""
    return torch.where(values > noise, 1 - noise / values.clamp(min=1e-300), 0)


def one_factor(of: Samples) -> Tensor:
    """Return m times the share of its power that is not noise."""
    return of.sum * share(window(of.sum**2, 1.5), window(of.variance, 1.5))


def by_channel(of: Samples) -> Tensor:
    """Return the sum of the channels, each times its own share."""
    noise = of.by_channel.square().sum(0) / of.divisor
    return (of.raw * share(window(of.raw.double() ** 2, 1.5), window(noise, 1.5))).sum(0)


def halves(of: Samples) -> Tensor:
    """Return m times the share of its power that both halves of the samples have in common."""
    size = len(of.contributions) // 2
    parts = [robust_mean(of.contributions[None, at : at + size])[0].double().sum(0) for at in (0, size)]
    power = window(of.sum**2, 1.5)
    return of.sum * (window(parts[0] * parts[1], 1.5).clamp(min=0) / power.clamp(min=1e-300)).clamp(max=1)


def soft_threshold(of: Samples) -> Tensor:
    """Return m moved towards 0 by half its standard error."""
    return of.sum.sign() * (of.sum.abs() - of.variance.sqrt() / 2).clamp(min=0)


def wiener(of: Samples) -> Tensor:
    """Return the local mean and the share of the detail that is not noise."""
    mean = window(of.sum, 1)
    detail = of.sum - mean
    return mean + detail * share(window(detail**2, 1), window(of.variance, 1))


def wavelet(of: Samples) -> Tensor:
    """Return the sum of three bands of an à trous transform and the rest, each times its share."""
    planes, total = torch.cat([of.sum[None], of.deviations]), torch.zeros_like(of.sum)
    for level in range(3):
        # the taps are 2^level pixels apart
        weights = [0.0] * (4 * 2**level + 1)
        weights[:: 2**level] = [tap / 16 for tap in (1, 4, 6, 4, 1)]
        low = _blurred(planes, weights)
        total += _own_share(planes - low, of.divisor, 1.5 * 2**level)
        planes = low
    return total + _own_share(planes, of.divisor, 12)


def two_exact_bands(of: Samples) -> Tensor:
    """Return the local mean and the detail, each times its share by the samples' own variance in it."""
    planes = torch.cat([of.sum[None], of.deviations])
    low = window(planes, 1)
    return _own_share(low, of.divisor, 4) + _own_share(planes - low, of.divisor, 4)


def _own_share(planes: Tensor, divisor: Tensor, sigma: float) -> Tensor:
    """Return a band of m, the first of the planes, times its share; the others are the samples' deviations in it."""
    noise = planes[1:].square().sum(0) / divisor
    return planes[0] * share(window(planes[0] ** 2, sigma), window(noise, sigma))


FORMS: dict[str, Callable[[Samples], Tensor]] = {
    "paper": lambda of: of.sum,
    "one factor": one_factor,
    "by channel": by_channel,
    "halves": halves,
    "soft threshold": soft_threshold,
    "Wiener": wiener,
    "wavelet": wavelet,
    "two exact bands": two_exact_bands,
    "windows of 4": lambda of: shrink_ref(of.raw[None], of.variance[None], 4)[0, 0].double(),
    "windows of 8": lambda of: shrink_ref(of.raw[None], of.variance[None], 8)[0, 0].double(),
    "shrink": lambda of: shrink(of.raw[None], of.variance[None])[0, 0].double(),
}


def score(explainer: dave_fast.DAVE, example: Example, number: int, limit: int) -> dict[str, list[list[float]]]:
    """Return EnergyPG and correlation with the limit of one image, form -> a pair for each of `SIZES`."""
    image, objects = example
    target = int(explainer.predict(image[None]).argmax(1))
    made = contributions(explainer, image, number, target, SIZES[-1] + limit)
    mask = objects.get(target, torch.zeros(image.shape[1:], dtype=torch.bool))[None]
    further = smooth(robust_mean(made[None, SIZES[-1] :])).double()
    found: dict[str, list[list[float]]] = {"limit": [[float(metrics.energy_pointing_game(further, mask)), 1.0]]}
    for size in SIZES:
        samples = Samples.of(made[:size])
        for name, form in FORMS.items():
            one = smooth(form(samples)[None, None])
            pair = [float(metrics.energy_pointing_game(one, mask)), float(metrics.correlation(one, further))]
            found.setdefault(name, []).append(pair)
    return found


def measure(kind: str, explainer: dave_fast.DAVE, examples: Iterator[Example], out: Path) -> None:
    """Score the images of a kind and write JSON."""
    scores = []
    for number, example in enumerate(examples):
        scores.append(score(explainer, example, number, LIMITS[kind]))
        print(f"{kind} {number + 1} of {IMAGES[kind]}", flush=True)
    content = {
        "environment": machine.environment(),
        # a folder by its name alone
        "model": explainer.model_name.rpartition("/")[2],
        "precision": explainer.precision,
        "noise_alpha": explainer.sampling.noise_alpha,
        "limit": LIMITS[kind],
        "sizes": SIZES,
        "chosen on": (len(scores) + 1) // 2,
        "scores": scores,
    }
    machine.write_json(out, content)


def table(content: dict[str, Any], half: slice) -> list[str]:
    """Return Markdown of one half's images: a row a form; differences from the paper's map with standard errors."""
    of_half = content["scores"][half]
    limit = np.nanmean([one["limit"][0][0] for one in of_half])
    lines = ["| form | " + " | ".join(f"S = {size}" for size in content["sizes"]) + " |"]
    lines.append("| --- |" + " ---: |" * len(content["sizes"]))
    paper = np.array([one["paper"] for one in of_half])
    for form in FORMS:
        values = np.array([one[form] for one in of_half])
        inside, alike = np.nanmean(values, 0).T
        change = values[..., 1] - paper[..., 1]
        spread = change.std(0, ddof=1) / np.sqrt(len(change))
        cells = [
            f"{e:.3f}, {c:.3f}" + ("" if form == "paper" else f" ({d:+.3f} ± {s:.3f})")
            for e, c, d, s in zip(inside, alike, change.mean(0), spread, strict=True)
        ]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return [*lines, "", f"EnergyPG of the limit, the paper's map of {content['limit']} further samples: {limit:.3f}."]


def write(results: dict[str, Path]) -> None:
    """Write the tables of the kinds that were measured into the page, behind its last heading."""
    text = PAGE.read_text()
    lines = [text[: text.index("## Tables")] + "## Tables"]
    for kind, path in ((kind, path) for kind, path in results.items() if path.exists()):
        content = json.loads(path.read_text())
        chosen = content["chosen on"]
        for title, half in (("chosen on", slice(0, chosen)), ("held out", slice(chosen, None))):
            count = len(content["scores"][half])
            lines += ["", f"### {kind.capitalize()}, {title}: {count}", "", *table(content, half)]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*IMAGES, "write"))
    parser.add_argument("--model", help="of photographs")
    parser.add_argument("--photographs", type=Path, help="a folder")
    parser.add_argument("--boxes", type=Path, help="as `dave-fast evaluate --boxes` takes them")
    given = parser.parse_args()
    results = {kind: machine.results_path(f"shrinkage_{kind}") for kind in IMAGES}
    if given.step == "write":
        write(results)
        return
    chosen = ImageSet(IMAGES[given.step], LIMITS[given.step])
    if given.step == "scenes":
        explainer = dave_fast.DAVE("demo", precision="fp32")
        examples = scenes(chosen.images, SEED)
    elif None in (given.model, given.photographs, given.boxes):
        parser.error("photographs need --model, --photographs and --boxes")
    else:
        explainer = dave_fast.DAVE(given.model)
        examples = photographs(chosen, explainer.model, given.photographs, given.boxes)
    measure(given.step, explainer, examples, results[given.step])


if __name__ == "__main__":
    main()
