"""Measure DAVE at depth beside other methods at the same blocks, and write the section "At depth" of docs/quality.md.

    python scripts/quality_depth.py measure --out DIR --model FOLDER --boxes PATH --photographs DIR --classes DIR
    python scripts/quality_depth.py measure digits --out DIR
    python scripts/quality_depth.py time    --out DIR --model FOLDER --boxes PATH --photographs DIR --classes DIR
    python scripts/quality_depth.py write   --out DIR

The photographs, heads, γ and the held-out half are those of `scripts/quality_photographs.py`, in whose `--out` this one
goes on: what methods at pixels scored on the photographs is taken from there. Everything that was chosen was chosen on
the other half: the block of "auto" and the form of the average (docs/depth.md), γ. Digits are scenes of the embedded
model; nothing was chosen on those of this seed.

`measure` adds what is absent, item by item, so a part, a head and families may be named to share the work between
processes; AttnLRP needs an environment with LXT. `time` wants a machine of its own.

A process of one thread on two Zen 4 cores, with one or two others beside it, took in minutes: mosaics-2x2 20 to 24 a
head, mosaics-3x3 17, behaviour 16, photographs 5 a head, all others together 10.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import keep_to  # noqa: E402
from dave_fast.engine.levels import Place  # noqa: E402
from dave_fast.evaluate import deep, items, rows  # noqa: E402
from dave_fast.evaluate.methods import MethodSettings  # noqa: E402
from dave_fast.evaluate.packages import GAMMAS  # noqa: E402
from dave_fast.evaluate.sources import DemoScenes, Examples  # noqa: E402
from dave_fast.evaluate.twin import NotTakenError  # noqa: E402
from dave_fast.explain.depth import AUTO  # noqa: E402
from dave_fast.explain.explainer import DAVE  # noqa: E402
from dave_fast.models.demo import load_demo_model  # noqa: E402
from scripts.quality_depth_section import DIGITS, NO_NOISE, write_section  # noqa: E402
from scripts.quality_photographs import (  # noqa: E402
    HEADS,
    SEED,
    SETTINGS,
    Part,
    Subject,
    scorer,
    scores_of,
    whole_lines,
    write_json,
)

DIGITS_SEED = 20261129
TIMES = "depth-times.json"
PARTS = {
    "photographs": Part("photographs", 27, dict.fromkeys(HEADS, (16, 32))),
    "mosaics-2x2": Part("mosaics", 12, dict.fromkeys(HEADS, (16,)), grid=2),
    "mosaics-3x3": Part("mosaics", 2, {"class token": (16,)}, grid=3),
    "behaviour": Part("behaviour", 8, {"class token": (32,)}),
    "randomised": Part("randomised", 2, {"class token": (32,)}),
    "digits": Part("photographs", 100, {DIGITS: (16, 32)}),
    "digits-2x2": Part("mosaics", 12, {DIGITS: (16,)}, grid=2),
    "digits-3x3": Part("mosaics", 5, {DIGITS: (16,)}, grid=3),
}
PEERS = ("frozen gradient", "Libra FullGrad+", "LeGrad", "uniform")
LINEAR = ("frozen gradient", "Libra FullGrad+")
ROUNDS = 5
Make = Callable[[nn.Module], rows.Family]


class Digits:
    """The embedded model and scenes of one digit: some with the digit's pixels, and further ones for mosaics."""

    def __init__(self) -> None:
        self.heads = {DIGITS: load_demo_model().requires_grad_(False)}
        self.at_size = Subject.at_size

    def examples(self, part: Part) -> Examples:
        """Return scenes for a part."""
        source = DemoScenes(part.count, DIGITS_SEED)
        found = source.read(0, part.count) if part.grid == 1 else source.pool(200).read(0, 200)
        assert found is not None
        return found


def items_of(subject: Subject | Digits, part: Part) -> list[items.Item]:
    """Return the items of a part."""
    examples = subject.examples(part) if isinstance(subject, Digits) else subject.examples
    if part.kind == "mosaics":
        return items.mosaics(examples, part.grid, part.count, SEED)
    if part.kind == "photographs":
        return items.photographs(examples, part.count)
    return items.of_all_classes(examples, part.count, SEED)


def families(part: Part, head: str, gammas: tuple[float, float], places: tuple[Place, ...]) -> dict[str, Make]:
    """Return the families of a part by name.

    Args:
        part: of the measurement.
        head: of the model.
        gammas: of AttnLRP.
        places: blocks, of every method.
    """
    contrast = part.grid > 1
    dave = partial(deep.dave, sizes=part.sizes[head], seed=SEED, places=places, contrast=contrast)
    made: dict[str, Make] = {
        "DAVE at depth": partial(dave, title="DAVE"),
        "DAVE at depth, no noise": partial(dave, title=NO_NOISE, alpha=0.0),
        "one frozen sample": partial(deep.frozen, places=places, contrast=contrast),
        "activations": partial(deep.activations, places=places, contrast=contrast),
        "AttnLRP at tokens": partial(deep.attnlrp, places=places, gammas=gammas, contrast=contrast),
    }
    if contrast or head == DIGITS:
        setup = MethodSettings(50, {"noise_alpha": 0.0})
        names = (*PEERS, "integrated gradients") if head == DIGITS and part.grid < 3 else PEERS
        made |= {name: partial(rows.single, name=name, setup=setup, seed=SEED) for name in names}
        for name in LINEAR:
            made[name] = lambda model, make=made[name]: deep.with_contrasts(make(model))
    return made


def gammas_of(part: Part, head: str) -> tuple[float, float]:
    """Return γ of AttnLRP: chosen for pixels on the half for choices; on digits the package's own, not tuned."""
    if head == DIGITS:
        return GAMMAS
    embedding, linear = json.loads(SETTINGS.read_text())[head]["mosaics" if part.grid > 1 else "photographs"]["gammas"]
    return embedding, linear


def measure(subject: Subject | Digits, out: Path, part_name: str, head: str, wanted: list[str] | None) -> None:
    """Score what of a part is not yet scored, a line of JSON for each item and family."""
    part = PARTS[part_name]
    gammas = gammas_of(part, head)
    every = items_of(subject, part)
    model = subject.at_size(subject.heads[head], every[0].image)
    path = lines_of(out, part_name, head)
    # scores with other settings are not gone on with
    keep_to(path.with_suffix(".settings.json"), {"sizes": part.sizes[head], "gammas": gammas, "seed": SEED})
    done = {(one["item"], one["family"]) for one in whole_lines(path)}
    depths = deep.DEPTHS if part.kind in ("photographs", "mosaics") else (AUTO, 1.0)
    makes = families(part, head, gammas, deep.places_at(model, depths))
    scores: dict[str, Callable[[items.Item], items.Scores]] = {}
    # item by item, so that a part that is stopped has scored the same items by every method
    for item, name in ((item, name) for item in every for name in makes if wanted is None or name in wanted):
        if (item.name, name) in done:
            continue
        try:
            scores[name] = scores.get(name) or scorer(part, model, makes[name])
        except NotTakenError as error:
            print(f"{part_name}, {head}: {name} is not run: {error}", flush=True)
            continue
        line = {"head": head, "item": item.name, "family": name, "scores": scores[name](item)}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{part_name}, {head}: {name}, {item.name}", flush=True)


def lines_of(out: Path, part: str, head: str) -> Path:
    """Return the file of a part's scores under a head: one process at a time writes it."""
    return out / f"depth-{part}-{head.replace(' ', '-')}.jsonl"


def clock(subject: Subject, out: Path) -> None:
    """Store the seconds of one map of a photograph by each method, the least of some rounds in turns."""
    head = "class token"
    model, part = subject.heads[head], PARTS["photographs"]
    item, places = items_of(subject, part)[0], deep.places_at(subject.model, (AUTO,))
    setup = MethodSettings(50, {"noise_alpha": 0.0}, 1 / min(subject.prepare.std))
    explainer = DAVE(model)
    runs: dict[str, Callable[[], Any]] = {}
    for size in part.sizes[head]:
        for name, depth in {"pixels": "pixels", "auto": AUTO, "pixels and every block": ["pixels", *range(11)]}.items():
            runs[f"DAVE, {name}, S = {size}"] = partial(explainer.explain, item.image, item.classes, size, depth=depth)
    made = {
        "one frozen sample": deep.frozen(model, places),
        "gradient × activation and Grad-CAM": deep.activations(model, places),
        "AttnLRP": deep.attnlrp(model, places, gammas_of(part, head)),
    }
    made |= {name: rows.single(model, name, setup, SEED) for name in (*PEERS[1:3], "integrated gradients")}
    runs |= {name: partial(family, item.image, item.classes, 0) for name, family in made.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, one in runs.items():
            start = time.perf_counter()
            one()
            found[name].append(time.perf_counter() - start)
    write_json(out / TIMES, {name: min(each) for name, each in found.items()})


def write(out: Path) -> None:
    """Write the section of the scores in a folder."""
    parts = {}
    for name, part in PARTS.items():
        of_pixels = [scores_at_pixels(out, name, head) for head in part.sizes]
        files = [*of_pixels, *(lines_of(out, name, head) for head in part.sizes)]
        parts[name] = [line for path in files for line in whole_lines(path)]
    times = out / TIMES
    write_section(parts, json.loads(times.read_text()) if times.exists() else {})


def scores_at_pixels(out: Path, part: str, head: str) -> Path:
    """Return the file of `scripts/quality_photographs.py` for a part and a head."""
    return scores_of(argparse.Namespace(out=out, chosen_on=False, limit=None), part, head)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "time", "write"))
    parser.add_argument("part", nargs="?", choices=tuple(PARTS), help="without it, all in turn")
    parser.add_argument("--out", type=Path, required=True)
    for name in ("model", "boxes", "photographs", "classes"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--head", choices=(*HEADS, DIGITS))
    parser.add_argument("--family", nargs="*", help="only these")
    args = parser.parse_args()
    args.chosen_on, args.limit = False, None
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step == "write":
        write(args.out)
        return
    every = [(name, head) for name, part in PARTS.items() for head in part.sizes]
    chosen = [(name, head) for name, head in every if args.part in (None, name) and args.head in (None, head)]
    of_photographs = args.step == "time" or any(head != DIGITS for _, head in chosen)
    if of_photographs and None in (args.model, args.boxes, args.photographs, args.classes):
        parser.error("without a part of digits it needs --model, --boxes, --photographs and --classes")
    photographs = Subject(args, chosen_on=False) if of_photographs else None
    if args.step == "time":
        clock(photographs, args.out)
        return
    for name, head in chosen:
        measure(Digits() if head == DIGITS else photographs, args.out, name, head, args.family)


if __name__ == "__main__":
    main()
