"""The time of k targets of one image in one call, compared with k calls; their maps are compared, too.

    python -m benchmarks.cotangents [--models demo vit_small_patch16_224] [--samples 50 2] [--repeats 3]

The model of the time: a call takes f + k·v, where f is for the perturbed images and their forward walks, and v for a
VJP walk with its pull-back, robust mean and smoothing. So one call with k targets takes (f + k·v) / (k·(f + v)) of k
calls, at best v/(f + v). Both run in turns; f and v are fitted to the medians. The maps of the largest k are compared
bit by bit with those of single calls.

Targets of the embedded model are its ten classes, then differences of two; of others, with random weights, their first
k classes.
Writes benchmarks/results/<device>/cotangents.json and docs/figures/cotangents.png.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import dave_fast
from benchmarks import machine
from dave_fast.bench.timing import in_turns, spread
from dave_fast.images.figures import save_figure
from dave_fast.targets import Contrast, Target

COUNTS = (1, 2, 5, 10, 50)
# more single calls are made only once, for their maps
IN_TURNS = 10
FIGURE = "docs/figures/cotangents.png"


def subject(name: str) -> tuple[dave_fast.DAVE, Tensor, list[Target]]:
    """Return an explainer, one image and the largest number of targets."""
    most = max(COUNTS)
    if name == "demo":
        from dave_fast.images import preprocessing
        from dave_fast.models.demo import demo_scene

        explainer = dave_fast.DAVE("demo", precision="fp32")
        image = preprocessing(explainer.model)(demo_scene().image)[0]
        pairs = [Contrast(a, b) for a, b in combinations(range(10), 2)]
        return explainer, image[None], [*range(10), *pairs][:most]
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    explainer = dave_fast.DAVE(model, precision="fp32", noise_alpha=0.5)
    size = model.patch_embed.img_size
    return explainer, torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)), list(range(most))


def measure(name: str, samples: int, repeats: int) -> dict[str, Any]:
    """Measure the seconds of both ways for every k, and count the maps that equal those of single calls."""
    explainer, image, targets = subject(name)

    def shared(k: int) -> dave_fast.Explanation:
        return explainer.explain(image, targets=targets[:k], n_samples=samples)

    def separate(k: int) -> list[dave_fast.Explanation]:
        return [explainer.explain(image, target, n_samples=samples) for target in targets[:k]]

    own = separate(len(targets))
    together = shared(len(targets))
    equal = sum(
        torch.equal(together.raw[:, i], one.raw) and torch.equal(together.maps[:, i], one.maps)
        for i, one in enumerate(own)
    )
    apart = max(float((together.raw[:, i] - one.raw).abs().max()) for i, one in enumerate(own))
    contestants: dict[str, list[Any]] = {f"shared {k}": [lambda k=k: shared(k)] for k in COUNTS}
    contestants |= {f"separate {k}": [lambda k=k: separate(k)] for k in COUNTS if k <= IN_TURNS}
    seconds = in_turns(contestants, repeats, warmup=0)
    medians = [float(np.median(seconds[f"shared {k}"])) for k in COUNTS]
    # weights, so that relative errors count equally at every k
    weights = 1 / np.array(medians)
    system = np.stack([np.ones(len(COUNTS)), np.array(COUNTS, float)], axis=1) * weights[:, None]
    (forward, back), *_ = np.linalg.lstsq(system, np.array(medians) * weights, rcond=None)
    return {
        "model": name,
        "samples": samples,
        "precision": explainer.precision,
        "route": explainer.route,
        "size": list(image.shape[2:]),
        "counts": list(COUNTS),
        "forward": float(forward),
        "back": float(back),
        "maps": len(own),
        "maps_bit_equal": equal,
        "largest_difference": apart,
        "seconds": {one: spread(times) for one, times in seconds.items()},
    }


def tell(screen: Console, result: dict[str, Any]) -> None:
    """Print a line for each k."""
    seconds = result["seconds"]
    one = seconds["separate 1"]["median"]
    screen.print(
        f"{result['model']}, S = {result['samples']}, {result['precision']}: f = {result['forward']:.3f} s, "
        f"v = {result['back']:.3f} s; {result['maps_bit_equal']} of {result['maps']} maps bit-equal to their own "
        f"call's (largest difference {result['largest_difference']:.1e})"
    )
    for k in result["counts"]:
        mine = seconds[f"shared {k}"]
        other = seconds.get(f"separate {k}", {"median": k * one})["median"]
        way = "measured" if f"separate {k}" in seconds else "k times one call"
        screen.print(
            f"  k = {k:2}: {mine['median']:.3f} s ({mine['min']:.3f} to {mine['max']:.3f}); "
            f"{other / mine['median']:.2f} times faster than {k} calls ({way})"
        )


def draw(results: Sequence[dict[str, Any]]) -> None:
    """Draw seconds against k for every model: points for both ways, and the fitted line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results), 2.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        seconds, counts = result["seconds"], np.array(result["counts"])
        own = [k for k in counts if f"separate {k}" in seconds]
        axes.plot(counts, counts * seconds["separate 1"]["median"], color="0.75", lw=1)
        axes.plot(counts, result["forward"] + counts * result["back"], color="#b3382c", lw=1)
        axes.plot(own, [seconds[f"separate {k}"]["median"] for k in own], "s", color="0.5", ms=4, label="k calls")
        axes.plot(
            counts,
            [seconds[f"shared {k}"]["median"] for k in counts],
            "o",
            color="#b3382c",
            ms=4,
            label="one call, k questions",
        )
        axes.set(xscale="log", yscale="log", xlabel="questions k", title=f"{result['model']}, S = {result['samples']}")
        axes.set_xticks(counts, counts)
        low, high = axes.get_ylim()
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
        axes.set_yticks(ticks, map("{:g}".format, ticks))
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, FIGURE)


def main() -> None:
    """Measure, print and store the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "vit_small_patch16_224"])
    parser.add_argument("--samples", nargs="+", type=int, default=[50, 2], help="one a model")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    screen, results = Console(), []
    warnings.simplefilter("ignore")
    for name, samples in zip(given.models, given.samples, strict=True):
        results.append(measure(name, samples, given.repeats))
        tell(screen, results[-1])
    path = machine.results_path("cotangents")
    machine.write_json(path, {"environment": machine.environment(), "settings": vars(given), "results": results})
    draw(results)
    screen.print(f"{path}")


if __name__ == "__main__":
    main()
