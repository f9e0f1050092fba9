"""dave-fast against the plain way (and the authors' code), side by side in one run.

    python -m benchmarks.side_by_side [--model vit_base_patch16_224] [--samples 8] [--repeats 5] [--authors PATH]

Times the whole pipeline, from one normalised image to its map, in turns: each repeat runs every contestant once, with
the machine's own matrix-product rates measured in between, because both move from minute to minute. All compute the
same thing from equal numbers of samples; what their maps have in common is measured in the same run, on the demo
model, whose weights are trained. A ratio to the plain way counts only where that reaches 85 % of the rate of the
library it runs on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import authors, machine, plain
from benchmarks.gemm import Ceiling, ceiling, engine_gigaflops
from dave_fast import DAVE
from dave_fast.demo import draw_scenes, load_demo_model
from dave_fast.metrics import correlation
from dave_fast.sampling import Sampling, draw, normal

NOISE_ALPHA = 0.5
PIXEL_OPS = ("perturb", "pull_back", "robust_mean", "smooth")
PLAIN_MUST_REACH = 0.85
MAPS_MUST_AGREE = 0.999
CEILINGS = ("mkl-fp32 (one sample)", "mkl-fp32", "packed-fp32", "packed-bf16")
# the rate that each contestant is held against
CEILING_OF = {"plain": CEILINGS[0], "authors": CEILINGS[0], "fp32": "packed-fp32", "bf16": "packed-bf16"}


class Clock:
    """Adds up the seconds that wrapped functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def make_contestants(
    model: Any, image: Tensor, samples: int, checkout: Path | None, clocks: dict[str, Clock]
) -> dict[str, Callable[[], Any]]:
    """What is timed: name to a call that makes one image's map."""
    _, height, width = image.shape
    draws = draw(samples, height=height, width=width, sampling=Sampling(noise_alpha=NOISE_ALPHA))
    contestants: dict[str, Callable[[], Any]] = {"plain": partial(plain.explain_plain, model, image, 0, draws)}
    if checkout is not None:
        theirs = authors.load_explainer(checkout, copy.deepcopy(model), NOISE_ALPHA)
        contestants["authors"] = partial(theirs.explain, image[None], torch.tensor([0]), samples)
    for precision in ("fp32", "bf16"):
        explainer = DAVE(model, precision=precision, noise_alpha=NOISE_ALPHA)
        clocks[precision] = Clock()
        for op in PIXEL_OPS:
            setattr(explainer, f"_{op}", clocks[precision].wrap(getattr(explainer, f"_{op}")))
        contestants[precision] = partial(explainer.explain, image[None], 0, samples)
    return contestants


def make_ceilings(model: Any, rows: int) -> dict[str, Ceiling]:
    """The machine's rates at the model's shapes; `rows` samples at a time but for the first."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    shape = (model.embed_dim, model.blocks[0].mlp.fc1.out_features)
    many = {kind: ceiling(kind, rows * tokens, *shape) for kind in CEILINGS[1:]}
    return {CEILINGS[0]: ceiling("mkl-fp32", tokens, *shape), **many}


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call in every repeat, after one run of each that is not counted."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for repeat in range(repeats):
        # nobody always runs behind the same neighbour
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, Any]:
    """Median, lowest, highest and all values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": [round(v, 6) for v in values],
    }


def agreement(samples: int, n_images: int) -> dict[str, float]:
    """How alike the maps are on the demo model: lowest Pearson correlation over its scenes, equal draws."""
    model = load_demo_model()
    scenes = draw_scenes(n_images, seed=7, split="test")
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    labels = torch.from_numpy(scenes.labels)
    sampling = Sampling(noise_alpha=NOISE_ALPHA)
    maps = {
        precision: DAVE(model, precision=precision, noise_alpha=NOISE_ALPHA).explain(images, labels, samples).maps
        for precision in ("fp32", "bf16")
    }
    _, channels, height, width = images.shape
    draws = draw(samples, height=height, width=width, sampling=sampling)
    noise = normal(draws.keys, draws.samples, channels * height * width).view(samples, channels, height, width)
    by_plain = torch.stack(
        [
            plain.explain_plain(model, image, int(label), draws, noise)[1]
            for image, label in zip(images, labels, strict=True)
        ]
    )
    return {
        "bf16 to fp32": correlation(maps["bf16"], maps["fp32"]).min().item(),
        "plain to fp32": correlation(by_plain, maps["fp32"]).min().item(),
        "images": n_images,
        "samples": samples,
    }


def summarise(
    seconds: dict[str, list[float]], rates: dict[str, Ceiling], gigaflops: dict[str, float], samples: int
) -> dict[str, Any]:
    """Medians, shares of the ceilings (each against the same repeat's rate) and ratios to the plain way."""
    ceilings = {name: [rates[name].gigaflops / s for s in seconds[name]] for name in rates}
    contestants = {}
    for name in (name for name in seconds if name not in rates):
        per_sample = [s / samples for s in seconds[name]]
        bound = ceilings[CEILING_OF[name]]
        share = [gigaflops[name] / s / rate for s, rate in zip(per_sample, bound, strict=True)]
        contestants[name] = {
            "seconds an image": spread(seconds[name]),
            "seconds a sample": spread(per_sample),
            "gigaflops a sample": gigaflops[name],
            "share of ceiling": spread(share),
            "ceiling": CEILING_OF[name],
        }
        for other in ("plain", "authors"):
            if other in seconds and name not in ("plain", "authors"):
                ratios = [a / b for a, b in zip(seconds[other], seconds[name], strict=True)]
                contestants[name][f"times faster than {other}"] = spread(ratios)
    return {
        "ceilings in GFLOP/s": {name: spread(values) for name, values in ceilings.items()},
        "rows": contestants,
    }


def verdict(result: dict[str, Any]) -> list[str]:
    """Reasons why the ratios do not count; none where they do."""
    reasons = []
    reached = result["rows"]["plain"]["share of ceiling"]["median"]
    if reached < PLAIN_MUST_REACH:
        reasons.append(f"the plain way reaches {reached:.0%} of its library's rate, below {PLAIN_MUST_REACH:.0%}")
    reasons += [
        f"maps of {pair} correlate {result['agreement'][pair]:.5f}, below {MAPS_MUST_AGREE}"
        for pair in ("bf16 to fp32", "plain to fp32")
        if result["agreement"][pair] < MAPS_MUST_AGREE
    ]
    return reasons


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run: what is timed, what is agreed on, and where."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().requires_grad_(False)
    image = torch.randn(3, *model.patch_embed.img_size)
    clocks: dict[str, Clock] = {}
    contestants = make_contestants(model, image, args.samples, args.authors, clocks)
    rates = make_ceilings(model, args.samples)
    seconds = in_turns({**{k: v.run for k, v in rates.items()}, **contestants}, args.repeats)
    by_autograd = plain.gigaflops_a_sample(model, image)
    ours = engine_gigaflops(model)
    gigaflops = {"plain": by_autograd, "authors": by_autograd, "fp32": ours, "bf16": ours}
    result = {
        "model": args.model,
        "image": list(image.shape),
        "samples": args.samples,
        "repeats": args.repeats,
        "environment": machine.environment("kornia") if args.authors else machine.environment(),
        **summarise(seconds, rates, gigaflops, args.samples),
        "agreement": agreement(args.agreement_samples, args.agreement_images),
    }
    for name, clock in clocks.items():
        # the warm-up went through the clock as well
        whole = sum(seconds[name]) * (args.repeats + 1) / args.repeats
        result["rows"][name]["share of pixel ops"] = clock.seconds / whole
    if args.authors is None:
        result["rows"]["authors"] = "not measured (give --authors PATH)"
    result["does not count because"] = verdict(result)
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    title = (
        f"{result['model']}, S = {result['samples']}, {result['repeats']} repeats, {result['environment']['device']}"
    )
    table = Table(title=title)
    for heading in (
        "",
        "ms a sample",
        "min to max",
        "share",
        "of ceiling",
        "pixel ops",
        "× plain",
        "× authors",
    ):
        table.add_column(heading, justify="left" if heading in ("", "of ceiling") else "right", no_wrap=True)
    for name, row in result["rows"].items():
        if isinstance(row, str):
            table.add_row(name, row)
            continue
        times = row["seconds a sample"]
        ratios = [row.get(f"times faster than {other}") for other in ("plain", "authors")]
        table.add_row(
            name,
            f"{1e3 * times['median']:.0f}",
            f"{1e3 * times['min']:.0f} to {1e3 * times['max']:.0f}",
            f"{row['share of ceiling']['median']:.0%}",
            row["ceiling"],
            f"{row['share of pixel ops']:.1%}" if "share of pixel ops" in row else "",
            *(f"{ratio['median']:.2f}" if ratio else "" for ratio in ratios),
        )
    console.print(table)
    for name, rate in result["ceilings in GFLOP/s"].items():
        console.print(f"{name}: {rate['median']:.0f} GFLOP/s ({rate['min']:.0f} to {rate['max']:.0f})")
    for pair in ("bf16 to fp32", "plain to fp32"):
        console.print(f"final maps, {pair}: Pearson ≥ {result['agreement'][pair]:.6f}")
    for reason in result["does not count because"]:
        console.print(f"[bold red]The ratios do not count: {reason}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm VisionTransformer; random weights")
    parser.add_argument("--samples", type=int, default=8, help="S of the timed images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--authors", type=Path, help="a checkout of the authors' code, to be timed as well")
    parser.add_argument("--agreement-samples", type=int, default=50, help="S where maps are compared")
    parser.add_argument("--agreement-images", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON; by default benchmarks/results/<device>/side_by_side.json")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = measure(args)
    show(result, Console(width=120))
    out = args.out or machine.results_path("side_by_side")
    machine.write_json(out, result)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
