"""Measure attribution methods on photographs with boxes and a trained ViT, and write the section of docs/quality.md.

    python scripts/quality_photographs.py choose  --out DIR --model FOLDER --boxes PATH --photographs DIR --classes DIR
    python scripts/quality_photographs.py measure --out DIR --model FOLDER --boxes PATH --photographs DIR --classes DIR
    python scripts/quality_photographs.py write   --out DIR

`--boxes` takes what `dave-fast evaluate --boxes` takes, for the files of `--photographs`; `--classes` is a folder of
further classes' folders, named by class or WordNet id. Of each folder's files in their order every second one, from the
first, is the half on which `choose` fits probes and chooses settings (`benchmarks/results/quality_photographs_settings
.json`, to be committed); `measure` scores the others. Both go on where they were stopped, and a head or a part may be
named, so that two processes share the work (`choose --head "class token"`, `measure photographs`).
Packages that cannot be installed together: `choose` needs LXT (AttnLRP's γ); run `measure` again in the other
environment, and it adds what is absent. Trials (`--limit`, `--chosen-on`) leave the files of a whole measurement alone.

Measured on two Zen 4 cores, a process of one thread each, in minutes of one core:

    choose        24 to 28 for each of three heads, most of it AttnLRP with every γ and the four classes of a mosaic
    photographs   37 under class means (S up to 256, path methods at their own steps), 13 under each other head
    mosaics-2x2   18 under class means, 38 under each probe
    mosaics-3x3   2 for a family of two mosaics
    the rest      behaviour 40, randomised 15, facts 2
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.evaluate import items, metrics, probes, rows
from dave_fast.evaluate.annotations import Annotations, Noted, class_of, read_boxes
from dave_fast.evaluate.methods import MethodSettings
from dave_fast.evaluate.mosaics import resized
from dave_fast.evaluate.sources import Examples, ImageFiles
from dave_fast.evaluate.twin import NotTakenError
from dave_fast.explain.explainer import DAVE
from dave_fast.files import atomically
from dave_fast.images import preprocessing
from dave_fast.images.finding import is_image
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import labels_of
from dave_fast.ops.shrink import MEAN_SIGMA, POWER_SIGMA
from dave_fast.run.identity import weights_hash

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import keep_to  # noqa: E402
from scripts.quality_section import write_section  # noqa: E402

SETTINGS = ROOT / "benchmarks" / "results" / "quality_photographs_settings.json"
SEED = 20261128
OWN_HEAD = "class means"
HEADS = (OWN_HEAD, *probes.POOLS)
ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5)
GAMMAS = tuple((embedding, linear) for embedding in (0.1, 0.25, 1.0, 100.0) for linear in (0.0, 0.05, 0.25, 1.0))
PATHS = ("integrated gradients", "SmoothGrad")
OWN_STEPS, STANDARD, MOSAIC_VIEWS = 50, 32, 24
ONE_PASS = ("frozen gradient", "input × gradient", "Libra FullGrad+", "LeGrad", "uniform")


@dataclass(frozen=True)
class Part:
    """A part of the measurement.

    Attributes:
        kind: "photographs", "mosaics", "behaviour" or "randomised".
        count: how many photographs or mosaics.
        sizes: numbers of samples of DAVE at its default α, by head.
        full: whether contrasts and the best α are run.
        grid: of mosaics.
    """

    kind: str
    count: int
    sizes: dict[str, tuple[int, ...]]
    full: bool = True
    grid: int = 1


PARTS = {
    "photographs": Part("photographs", 27, {OWN_HEAD: (16, 32, 64, 256)} | dict.fromkeys(probes.POOLS, (16, 32, 64))),
    "mosaics-2x2": Part("mosaics", 6, dict.fromkeys(HEADS, (16, 32)), grid=2),
    "mosaics-3x3": Part("mosaics", 2, {"class token": (16,)}, full=False, grid=3),
    "behaviour": Part("behaviour", 8, {"class token": (32,)}, full=False),
    "randomised": Part("randomised", 2, {"class token": (32,)}, full=False),
}

# kind -> how many items the choices are made on, cells along each side, by which metric, samples of DAVE
CHOICES = {"photographs": (12, 1, "EnergyPG", STANDARD), "mosaics": (3, 2, "GridPG 2x2", 16)}
Make = Callable[[nn.Module], rows.Family]


class Subject:
    """The model, its heads and the photographs of one half."""

    def __init__(self, args: argparse.Namespace, chosen_on: bool) -> None:
        self.model: nn.Module = load_model(f"hf:{args.model}")[0].requires_grad_(False)
        self.out, self.args = args.out, args
        self.labels = labels_of(self.model)
        self.prepare = preprocessing(self.model)
        self.fitted_on = self._read(True)
        held_out = self._read(False)
        self.examples = self.fitted_on if chosen_on else held_out
        names = [*self.fitted_on.names, *held_out.names]
        # the probes and the scores of another model, of other photographs or of another form are not gone on with
        made_with = {"weights": weights_hash(self.model), "photographs": names, "seed": SEED}
        keep_to(self.out / "made_with.json", made_with | {"windows of shrink": (MEAN_SIGMA, POWER_SIGMA)})

    def _read(self, chosen_on: bool) -> Examples:
        noted = read_boxes(self.args.boxes)
        folders = {path.parent for path in self.args.photographs.rglob("*") if is_image(path.name)}
        if not folders:
            raise SystemExit(f"there are no photographs in {self.args.photographs}")
        others = {path for path in self.args.classes.iterdir() if path.is_dir()}
        files = []
        for folder in (*sorted(folders), *sorted(others)):
            there = sorted(path for path in folder.iterdir() if is_image(path.name))
            if not there:
                raise SystemExit(f"there are no photographs in {folder}: expected a folder for each class")
            files += there[0 if chosen_on else 1 :: 2]
            for path in there if folder in others else ():
                noted[path.stem] = Noted((), self._class_name(folder.name))
        source = ImageFiles(files, self.prepare, Annotations(self.labels, noted))
        found = source.read(0, len(files))
        if found is None or source.skipped or (found.labels < 0).any():
            raise SystemExit(f"these photographs cannot be read or have no class: {source.skipped or found}")
        return found

    def _class_name(self, folder: str) -> str:
        """Return the model's name for a folder of a class or a WordNet id."""
        from timm.data.imagenet_info import ImageNetInfo

        imagenet = ImageNetInfo("imagenet-1k")
        words = [folder]
        if folder in imagenet.label_names():
            words = [word.strip() for word in imagenet.label_name_to_description(folder).split(",")]
        known = [each for word in words if (each := class_of(word, self.labels)) is not None]
        if not known:
            raise SystemExit(f"the model has no class of the folder {folder}: expected one of {self.labels.names}")
        return self.labels.name(known[0])

    @cached_property
    def heads(self) -> dict[str, nn.Module]:
        """The model under each head; probes are fitted once for a folder `--out`."""
        path = self.out / "probes.pt"
        if not path.exists():
            views = probes.views_of(self.fitted_on.images, self.fitted_on.labels, self.labels.count, MOSAIC_VIEWS, SEED)
            read = [probes.features(self.at_size(self.model, each.images), each.images) for each in views]
            targets = torch.cat([each.targets for each in views])
            fits = {pool: probes.fit(torch.cat([each[pool] for each in read]), targets) for pool in probes.POOLS}
            torch.save(fits, path)
        fits = torch.load(path, weights_only=True)
        made = {pool: probes.with_head(self.model, *fit, pool, self.labels.names) for pool, fit in fits.items()}
        return {OWN_HEAD: self.model} | made

    @staticmethod
    def at_size(model: nn.Module, images: Tensor) -> nn.Module:
        """Return the model, or a copy for images of this size."""
        found = resized(model, (images.shape[-2], images.shape[-1]))
        if found is None:
            raise SystemExit("the model's image size cannot be changed: give a timm VisionTransformer")
        return found


def setup_of(subject: Subject) -> MethodSettings:
    """Return the settings of the baselines: captum's steps, and the range of a normalised pixel."""
    return MethodSettings(OWN_STEPS, {"noise_alpha": 0.0}, 1 / min(subject.prepare.std))


def families(part: Part, head: str, chosen: dict[str, Any], setup: MethodSettings) -> dict[str, Make]:
    """Return the families of a part by name."""
    sizes, passes = part.sizes[head], chosen["passes"]
    best = chosen[head]["mosaics" if part.kind == "mosaics" else "photographs"]
    default = chosen[head]["default noise_alpha"]
    made: dict[str, Make] = {"DAVE": partial(rows.dave, title="DAVE", sizes=sizes, seed=SEED, alpha=default)}
    made |= {name: partial(rows.single, name=name, setup=setup, seed=SEED) for name in ONE_PASS}
    # passes of the path methods are what takes longest: each kind under the head that tells most there, none in 3×3,
    # where the nine classes of a mosaic take ten minutes
    in_time = part.grid < 3 and (part.kind != "mosaics" or head != OWN_HEAD)
    own_steps = part.kind in ("behaviour", "randomised") or (part.kind == "photographs" and head == OWN_HEAD)
    for name in PATHS:
        short = MethodSettings(passes[name], spread=setup.spread)
        title = f"{name}, in DAVE's time"
        if in_time:
            made[title] = partial(rows.single, name=name, setup=short, seed=SEED, row=title, autocast=True)
        if own_steps:
            made[name] = partial(rows.single, name=name, setup=setup, seed=SEED)
    made["AttnLRP"] = partial(rows.attnlrp_with, gammas=tuple(best["gammas"]), seed=SEED)
    if part.full:
        few = STANDARD if part.grid == 1 else sizes[0]
        common = {"seed": SEED, "alpha": best["noise_alpha"]}
        made["best α"] = partial(rows.dave, title="DAVE, best α", sizes=(few,), **common)
        made["log p"] = partial(rows.dave_score, title="DAVE, log p, best α", size=few, score=rows.log_p, **common)
        # the rows of a fitted probe sum to 0 over the classes: less the mean of the others its logits are themselves
        if head == OWN_HEAD:
            made["contrast"] = partial(rows.dave_contrast, title="DAVE, contrast, best α", size=few, **common)
        elif part.kind == "mosaics":
            common, asked = {"seed": SEED, "alpha": default}, "DAVE, against the mosaic's others"
            made["others"] = partial(rows.dave_score, title=asked, size=few, score=rows.against_others, **common)
    return made


def items_of(examples: Examples, part: Part, limit: int | None) -> list[items.Item]:
    """Return the items of a part, at most `limit`."""
    count = min(part.count, limit or part.count)
    if part.kind == "mosaics":
        return items.mosaics(examples, part.grid, count, SEED)
    if part.kind == "photographs":
        return items.photographs(examples, count)
    return items.of_all_classes(examples, count, SEED)


def measure(subject: Subject, part_name: str, head: str, limit: int | None, wanted: list[str] | None) -> None:
    """Score what of a part is not yet scored, a line of JSON for each item and family."""
    part, chosen = PARTS[part_name], json.loads(settings_of(subject.args).read_text())
    # the scores of other choices neither
    keep_to(results_of(subject.args) / "chosen.json", {"part sizes": {n: p.sizes for n, p in PARTS.items()}, **chosen})
    every = items_of(subject.examples, part, limit)
    model = subject.at_size(subject.heads[head], every[0].image)
    path = scores_of(subject.args, part_name, head)
    done = {(one["item"], one["family"]) for one in whole_lines(path)}
    for name, make in families(part, head, chosen, setup_of(subject)).items():
        if wanted is not None and name not in wanted:
            continue
        left = [item for item in every if (item.name, name) not in done]
        try:
            score = scorer(part, model, make) if left else None
        except NotTakenError as error:
            print(f"{part_name}, {head}: {name} is not run: {error}", flush=True)
            continue
        for item in left:
            line = {"head": head, "item": item.name, "family": name, "scores": score(item)}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{part_name}, {head}: {name}, {item.name}", flush=True)


def scorer(part: Part, model: nn.Module, make: Make) -> Callable[[items.Item], items.Scores]:
    """Return how a part scores an item under a family."""
    family = make(model)
    if part.kind == "behaviour":
        return lambda item: items.behave(model, item, family)
    if part.kind == "randomised":
        changed = [make(each) for each in items.randomised(model, SEED)]
        return lambda item: items.resemble(changed, item, family)
    return lambda item: items.localise(item, family)


def facts(subject: Subject, limit: int | None) -> None:
    """Store what the probes are worth: accuracy, and how much blanking a cell lowers its class's logit."""
    count = min(PARTS["mosaics-2x2"].count, limit or 99)
    chosen = probes.draw_mosaics(subject.examples.labels, 2, count, SEED + 2)
    images, labels = metrics.build_mosaics(subject.examples.images[chosen]), subject.examples.labels[chosen]
    found: dict[str, Any] = {}
    for head, model in subject.heads.items():
        with torch.no_grad():
            named = torch.cat([model(some).argmax(1) for some in subject.examples.images.split(8)])
        own, other, most = probes.blanking(subject.at_size(model, images), images, labels)
        found[head] = {
            "accuracy": (named == subject.examples.labels).double().mean().item(),
            "photographs": len(named),
            "blanked itself": own.mean().item(),
            "blanked another": other.mean().item(),
            "cells": len(own),
            "cells where its own is most": (own > most).double().mean().item(),
        }
    area = [mask.double().mean().item() for mask in subject.examples.masks if mask.any()]
    write_json(results_of(subject.args) / "facts.json", {"heads": found, "object area": sum(area) / len(area)})


def choose(subject: Subject, head: str | None, limit: int | None) -> None:
    """Choose α, γ and the passes of equal time on the half for it, and store all candidates' scores.

    What a head's candidates scored is kept in `--out`; with a head named, only that is made.
    """
    paths = {name: choices_of(subject.out, name, limit) for name in HEADS}
    for name in HEADS if head is None else (head,):
        if not paths[name].exists():
            write_json(paths[name], candidates(subject, name, limit))
    if not all(path.exists() for path in paths.values()):
        return
    found = {name: json.loads(path.read_text()) for name, path in paths.items()}
    image, model, setup = subject.examples.images[:1], subject.model, setup_of(subject)
    dave = rows.dave(model, "DAVE", (STANDARD,), SEED)
    found["passes"] = {
        name: rows.passes_in_the_time_of(
            dave,
            lambda passes, name=name: rows.single(
                model, name, MethodSettings(passes, spread=setup.spread), SEED, autocast=True
            ),
            image,
            subject.examples.labels[:1],
        )
        for name in PATHS
    }
    write_json(settings_of(subject.args), found)


def candidates(subject: Subject, head: str, limit: int | None) -> dict[str, Any]:
    """Return the scores of every α and γ under a head, and the best of them."""
    model = subject.heads[head]
    found: dict[str, Any] = {"default noise_alpha": DAVE(model).sampling.noise_alpha}
    for kind, (count, grid, metric, samples) in CHOICES.items():
        part = Part(kind, count, {}, grid=grid)
        every = items_of(subject.examples, part, limit)
        sized = subject.at_size(model, every[0].image)
        # first, since LXT may be absent
        of_gammas = {}
        for gammas in GAMMAS:
            of_gammas[gammas] = _mean(rows.attnlrp_with(sized, gammas, SEED), every, metric)
            print(f"{head}, {kind}: gammas {gammas}, {metric} {of_gammas[gammas]:.4f}", flush=True)
        of_alpha = {}
        for alpha in ALPHAS:
            of_alpha[alpha] = _mean(rows.dave(sized, "DAVE", (samples,), SEED, alpha), every, metric)
            print(f"{head}, {kind}: noise_alpha {alpha}, {metric} {of_alpha[alpha]:.4f}", flush=True)
        found[kind] = {
            "noise_alpha": max(of_alpha, key=lambda alpha: of_alpha[alpha]),
            "gammas": max(of_gammas, key=lambda gammas: of_gammas[gammas]),
            "items": len(every),
            f"{metric} by noise_alpha, S = {samples}": of_alpha,
            f"{metric} by gammas": {str(gammas): score for gammas, score in of_gammas.items()},
        }
    return found


def choices_of(out: Path, head: str, limit: int | None) -> Path:
    """Return the file of what a head's candidates scored; that of a trial is another."""
    trial = "" if limit is None else f"-limit-{limit}"
    return out / f"choices-{head.replace(' ', '-')}{trial}.json"


def settings_of(args: argparse.Namespace) -> Path:
    """Return the file of the choices: the repository's, or for a trial one beside its scores."""
    return SETTINGS if args.limit is None else args.out / SETTINGS.name


def _mean(family: rows.Family, every: list[items.Item], metric: str) -> float:
    """Return the mean score of a family's first row, smoothed."""
    first = [next(iter(items.localise(item, family).values())) for item in every]
    return sum(one[metric]["smoothed"] for one in first) / len(first)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomically(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def results_of(args: argparse.Namespace) -> Path:
    """Return the folder of the scores: another one for a trial, whose mosaics have the names of the others."""
    trial = ["chosen-on"] * args.chosen_on + [f"limit-{args.limit}"] * (args.limit is not None)
    folder: Path = args.out / "-".join(trial)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scores_of(args: argparse.Namespace, part: str, head: str) -> Path:
    """Return the file of a part's scores under a head: one process at a time writes it."""
    return results_of(args) / f"{part}-{head.replace(' ', '-')}.jsonl"


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of scores, and cut off one that a process was writing when it was stopped."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("choose", "measure", "write"))
    parser.add_argument("part", nargs="?", choices=(*PARTS, "facts"), help="without it, all in turn")
    parser.add_argument("--out", type=Path, required=True)
    for name in ("model", "boxes", "photographs", "classes"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--head", choices=HEADS)
    parser.add_argument("--family", nargs="*", help="measure only these")
    parser.add_argument("--chosen-on", action="store_true", help="measure on the half of the choices, as a trial")
    parser.add_argument("--limit", type=int, help="at most so many photographs and mosaics, as a trial")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step == "write":
        scores = {
            name: [line for head in part.sizes for line in whole_lines(scores_of(args, name, head))]
            for name, part in PARTS.items()
        }
        facts_found = json.loads((results_of(args) / "facts.json").read_text())
        write_section(scores, facts_found, json.loads(settings_of(args).read_text()))
        return
    if None in (args.model, args.boxes, args.photographs, args.classes):
        parser.error("choose and measure need --model, --boxes, --photographs and --classes")
    subject = Subject(args, chosen_on=args.chosen_on or args.step == "choose")
    if args.step == "choose":
        choose(subject, args.head, args.limit)
        return
    if args.part in (None, "facts"):
        facts(subject, args.limit)
    for name, part in PARTS.items():
        for head in part.sizes if args.part in (None, name) else ():
            if args.head in (None, head):
                measure(subject, name, head, args.limit, args.family)


if __name__ == "__main__":
    main()
