"""Comparison of dave-fast with the plain way, the authors' code, compiled PyTorch and captum, in one run.

    python -m benchmarks.side_by_side [--model vit_base_patch16_224] [--samples 50] [--isa all] [--authors PATH]

The whole pipeline, from normalised images to their maps, is timed in turns, with the machine's own matrix-product rates
in between, because both vary from minute to minute. All have the same model, image and number of samples (captum its
own 50 passes), each the fastest of the same micro-batches, warmed up, compiled and captured beforehand. Before a
contestant is timed, its contributions are compared with float64 at equal draws; the authors' code takes no given draws,
and is compared in tests/explain/test_authors.py instead. The correlation of final maps is measured in the same run on
the demo model, whose weights are trained. A ratio to the plain way counts only if the plain way reaches 85 % of the
rate of its library. With --isa each instruction set of the CPU is measured in a process of its own, libraries too.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import contestants, machine
from benchmarks.peers import LADDER
from dave_fast import DAVE
from dave_fast.bench import isas, whole
from dave_fast.bench.report import engine_table
from dave_fast.bench.shapes import build_model, shapes_of
from dave_fast.evaluate import DemoScenes
from dave_fast.models.demo import load_demo_model
from dave_fast.models.spec import ModelSpec

PLAIN_MUST_REACH = 0.85
MAPS_MUST_AGREE = whole.MAPS_MUST_AGREE
RESULT = "benchmarks/results/<device>/side_by_side_<model>_<size>_<instruction set>.json"
GROUPS = ("ours", "plain", "authors", "peers", "captum")


def field(args: argparse.Namespace, model: Any, image: torch.Tensor, shapes: Any) -> list[whole.Contestant]:
    """Return the contestants of the chosen groups."""
    device = image.device.type
    found: list[whole.Contestant] = []
    plain = contestants.plain_way(model, image, args.samples, shapes)
    if "ours" in args.groups:
        found += contestants.ours(model, image, args.samples, shapes, device)
    if "plain" in args.groups:
        found.append(plain)
    if "authors" in args.groups:
        found += contestants.authors_code(args.authors, model, image, args.samples, plain.gigaflops)
    if "peers" in args.groups:
        found += contestants.peers(model, image, args.samples, shapes, tuple(args.steps))
    if "captum" in args.groups:
        found += contestants.captum_methods(model, image)
    return found


def agreement(samples: int, n_images: int, device: str) -> dict[str, Any]:
    """Return the lowest Pearson correlation of final maps with fp32's over scenes of the demo model, at equal draws."""
    model = load_demo_model()
    images = DemoScenes(n_images, seed=7).read(0, n_images).images
    found: dict[str, Any] = {"images": n_images, "samples": samples}
    exact = DAVE(model, precision="fp32", noise_alpha=whole.NOISE_ALPHA, device=device)
    for precision in MAPS_MUST_AGREE:
        if contestants.why_no(precision, device) is None:
            low = DAVE(model, precision=precision, noise_alpha=whole.NOISE_ALPHA, device=device)
            found[precision] = whole.map_agreement(low, exact, images, samples)
    return found


def ratios(rows: list[dict[str, Any]], other: str) -> None:
    """Store in each row of as many samples the ratio of its images a second to those of `other`, repeat by repeat."""
    base = next((row for row in rows if row["name"] == other and "images a second" in row), None)
    for row in rows:
        if base is not None and row is not base and "images a second" in row and row["samples"] == base["samples"]:
            pairs = zip(row["images a second"]["all"], base["images a second"]["all"], strict=True)
            row[f"times {other}"] = whole.spread([own / theirs for own, theirs in pairs])


def verdict(result: dict[str, Any]) -> list[str]:
    """Return the reasons why the ratios do not count, if any."""
    reasons = []
    plain = next((row for row in result["engine"] if row["name"] == "plain" and "share of ceiling" in row), None)
    if plain is not None and plain["share of ceiling"]["median"] < PLAIN_MUST_REACH:
        reached = plain["share of ceiling"]["median"]
        reasons.append(f"the plain way reaches {reached:.0%} of its library's rate, below {PLAIN_MUST_REACH:.0%}")
    reasons += [
        f"maps in {precision} correlate {result['agreement'][precision]:.5f} with fp32's, below {least}"
        for precision, least in MAPS_MUST_AGREE.items()
        if result["agreement"].get(precision, 1.0) < least
    ]
    return reasons


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make one run and return its result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say = print if args.verbose else lambda _: None
    spec = ModelSpec(args.model, num_classes=args.num_classes, random_weights=True)
    model: Any = build_model(spec, args.size).to(device)
    shapes = shapes_of(model, args.samples, size=args.size)
    images = torch.randn(whole.CHECKED, *shapes.image, generator=torch.Generator().manual_seed(0)).to(device)
    say("float64 truth")
    precisions = [precision for precision in whole.PLAIN if contestants.why_no(precision, device) is None]
    truth = whole.find_truth(model, images, precisions, device)
    rows = whole.measure(
        field(args, model, images[0], shapes),
        truth,
        shapes=shapes,
        images=args.images,
        device=device,
        repeats=args.repeats,
        latencies=args.latencies,
        budget=args.budget,
        progress=say,
    )
    for other in ("plain", "the authors' code, fp32"):
        ratios(rows, other)
    setting = {"model": args.model, "image": "×".join(map(str, shapes.image)), "samples": args.samples}
    result: dict[str, Any] = {
        "setting": setting | {"images": args.images, "repeats": args.repeats, "device": device},
        "environment": machine.environment("kornia", "captum"),
        "engine": rows,
        "agreement": agreement(args.agreement_samples, args.agreement_images, device),
    }
    result["does not count because"] = verdict(result)
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, the ratios, and the reasons why they do not count."""
    console.print(engine_table(result))
    for row in result["engine"]:
        said = [
            f"{row[key]['median']:.2f} {key} ({row[key]['min']:.2f} to {row[key]['max']:.2f})"
            for key in row
            if key.startswith("times ")
        ]
        if said:
            console.print(f"{row['name']}: {'; '.join(said)}")
    for precision in MAPS_MUST_AGREE:
        if precision in result["agreement"]:
            console.print(f"final maps, {precision} to fp32: Pearson ≥ {result['agreement'][precision]:.6f}")
    for reason in result["does not count because"]:
        console.print(f"The ratios do not count: {reason}.", style="bold red")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="vit_base_patch16_224", help="a timm VisionTransformer; random weights")
    made.add_argument("--num-classes", type=int, help="of its head, where the model has none of its own, as DINOv2")
    made.add_argument("--size", type=int, help="pixels a side; the model's own by default")
    made.add_argument("--samples", type=int, default=50, help="S")
    made.add_argument("--images", type=int, default=1, help="at once, for throughput")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--latencies", type=int, default=5, help="runs of one image; 100 give a 99th percentile")
    made.add_argument("--budget", type=float, default=600.0, help="seconds of timing, for either")
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    made.add_argument("--steps", nargs="+", choices=list(LADDER), default=list(LADDER), help="of the PyTorch ladder")
    made.add_argument("--authors", type=Path, help="a checkout of the authors' code, to be timed as well")
    made.add_argument("--agreement-samples", type=int, default=50, help="S where maps are compared")
    made.add_argument("--agreement-images", type=int, default=8)
    made.add_argument("--isa", help="all, or instruction sets of this CPU with commas between; by default the best")
    made.add_argument("--out", type=Path, help=f"JSON; by default {RESULT}")
    made.add_argument("--verbose", action="store_true", help="say what is being done")
    return made


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Make one run without warnings of libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure(args)


def place_of(args: argparse.Namespace, isa: str | None) -> Path:
    """Return the file of the result of an instruction set, None on a GPU."""
    if args.out is not None:
        return isas.named(args.out, isa) if args.isa else args.out
    parts = ("side_by_side", args.model.replace("/", "_"), args.size, isa)
    return machine.results_path("_".join(str(part) for part in parts if part))


def main(given: list[str] | None = None) -> None:
    """Run the command line."""
    args = parser().parse_args(given)
    for isa in isas.chosen(args.isa) if args.isa else [None]:
        result = measured(args) if isa is None else isas.each([isa], measured, args)[isa]
        show(result, Console(width=160))
        out = place_of(args, result["environment"]["isa"] if result["setting"]["device"] == "cpu" else None)
        machine.write_json(out, result)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
