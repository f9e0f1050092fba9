"""The time of a call with `depth=`, compared with that of a call at the pixels; their maps are compared, too.

    python -m benchmarks.depth_cost [--model vit_base_patch16_224] [--samples 32] [--repeats 15]

The model of the time: a walk back to block l of L costs (L − l)/L of that to the pixels, and what the depths account
for takes one more row, forward and back. So one block at the half is expected to take about a sixth less than the
pixels, the first block as much, and the pixels with every block 1/S + 1 % more, in which the products of streams and
cotangents are the 1 %. All run in turns, and ratios are taken turn by turn.

Random weights. Writes benchmarks/results/<device>/depth_cost.json.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import timm
import torch

import dave_fast
from benchmarks import machine
from benchmarks.time_to_quality import median_ratio
from dave_fast.bench.timing import in_turns, spread


def forms_of(blocks: int) -> dict[str, Any]:
    """Return the depths that are timed, by their names."""
    half = blocks // 2
    return {
        "pixels": "pixels",
        "block 0": 0,
        f"block {half}": half,
        f"block {blocks - 1}": blocks - 1,
        "pixels and the default": ["pixels", "auto"],
        "pixels and every block": ["pixels", *range(blocks)],
    }


def measure(name: str, samples: int, repeats: int, precision: str | None) -> dict[str, Any]:
    """Time a call at each form, and compare each map of several depths with that of its own call."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    explainer = dave_fast.DAVE(model, precision=precision, noise_alpha=0.1)
    image = torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    forms = forms_of(len(explainer.blocks(image)))

    def explain(depth: Any) -> dave_fast.Explanation:
        return explainer.explain(image, 0, n_samples=samples, depth=depth)

    together = explain(forms["pixels and every block"])
    alone = {depth: explain(depth) for depth in forms.values() if not isinstance(depth, list)}
    equal = {
        depth: torch.equal(together.maps[:, together.depth.index(depth)], one.maps) for depth, one in alone.items()
    }
    seconds = in_turns({one: [partial(explain, depth)] for one, depth in forms.items()}, repeats)
    base = seconds["pixels"]
    ratios = {
        one: median_ratio([own / pixels for own, pixels in zip(times, base, strict=True)])
        for one, times in seconds.items()
        if one != "pixels"
    }
    return {
        "model": name,
        "samples": samples,
        "precision": explainer.precision,
        "maps_bit_equal": equal,
        "of_pixels": ratios,
        "seconds": {one: spread(times) for one, times in seconds.items()},
    }


def main() -> None:
    """Measure, print and store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    result = measure(given.model, given.samples, given.repeats, given.precision)
    print(f"{result['model']}, S = {result['samples']}, {result['precision']}; bit-equal: {result['maps_bit_equal']}")
    for one, ratio in result["of_pixels"].items():
        median = result["seconds"][one]["median"]
        print(f"  {one:24} {median:.3f} s, {ratio['median']:.3f} of pixels ({ratio['low']:.3f} to {ratio['high']:.3f})")
    path = machine.results_path("depth_cost")
    machine.write_json(path, {"environment": machine.environment(), "settings": vars(given), "result": result})
    print(path)


if __name__ == "__main__":
    main()
