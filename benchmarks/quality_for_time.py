"""Quality for time: how good maps of a trained model are, against the seconds that an image takes.

    python -m benchmarks.quality_for_time MODEL PHOTOS --boxes BOXES [--authors PATH] [--half held-out]
    python -m benchmarks.performance_page

MODEL is anything that `DAVE` takes by name, PHOTOS a folder of photographs of one class or one folder for each class,
BOXES what `dave-fast evaluate --boxes` takes. Of each folder's photographs, sorted by name, those at even positions are
the half on which settings are chosen; those at odd positions are held out.

Every method explains the same photographs for the same class. Its quality is EnergyPG, the share of the map inside the
object's box, and the correlation of the map with DAVE's limit: the paper's map of other draws at S = 640. All maps are
smoothed alike, and all forms of DAVE have the same noise_alpha. Times are of one call for one photograph, with all S of
all methods in turns. The maps of a smaller S are made of the samples of the largest, so that quality takes one pass.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.quality_forms import AUTHORS, OTHER_SAMPLES, OWN_SAMPLES, Form, authors_form, captum_forms, own_forms
from benchmarks.time_to_quality import Measured, compare, median_ratio
from dave_fast.bench.timing import in_turns, spread
from dave_fast.evaluate.annotations import Annotations, read_boxes
from dave_fast.evaluate.metrics import correlation, energy_pointing_game
from dave_fast.evaluate.sources import Examples, ImageFiles
from dave_fast.evaluate.statistics import over_images
from dave_fast.explain.subject import Subject
from dave_fast.images.finding import find_images

HALVES = {"chosen-on": 0, "held-out": 1}
SCORES = ("EnergyPG", "correlation")
# S whose quality is to be reached, that of the paper's experiments
PAPER_SAMPLES = 50
LIMIT_SAMPLES = 640
# added to a photograph's key for the draws of its limit
OTHER_DRAWS = 2**32
# S from which on a call is long enough to tell 1 % of its time
LONG_CALL = 16


def score(
    forms: list[Form], photos: Examples, limits: int, limit_samples: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the scores of all forms: score -> name -> S -> one number for each photograph.

    Args:
        forms: the second, the paper's map in the default precision, makes the limits.
        photos: with their classes.
        limits: number of photographs whose limit is computed; the others have no correlation.
        limit_samples: S of a limit.
        say: called with a line of progress.
    """
    found: dict[str, Any] = {kind: {form.name: {s: [] for s in form.samples} for form in forms} for kind in SCORES}
    # photographs of all parts of the list have a limit
    with_limit = set(np.linspace(0, len(photos) - 1, min(limits, len(photos))).round().astype(int).tolist())
    for row in range(len(photos)):
        part = slice(row, row + 1)
        image, label, key = photos.images[part], photos.labels[part], photos.keys[row]
        limit = None
        if row in with_limit:
            limit = forms[1].explain(image, label, limit_samples, key + OTHER_DRAWS)
        for form in forms:
            for samples, each in form.every(image, label, key).items():
                inside = energy_pointing_game(each, photos.masks[part]).item()
                found["EnergyPG"][form.name][samples].append(inside)
                near = math.nan if limit is None else correlation(each, limit).item()
                found["correlation"][form.name][samples].append(near)
        say(f"photograph {row + 1} of {len(photos)}: {photos.names[row]}")
    return found


def time_forms(forms: list[Form], photos: Examples, repeats: int, budget: float) -> dict[str, dict[int, list[float]]]:
    """Time one call of every form at each of its S for the first photograph; name -> S -> seconds of each round."""
    image, label = photos.images[:1], photos.labels[:1]
    calls: dict[str, Any] = {}
    # equal S follow one another, so that shrinkage and its absence are timed side by side
    for samples in sorted({s for form in forms for s in form.samples}):
        for form in forms:
            if samples in form.samples:
                calls[f"{form.name}|{samples}"] = [partial(form.explain, image, label, samples, 0)]
    timed = in_turns(calls, repeats, warmup=0, budget=budget)
    found: dict[str, dict[int, list[float]]] = {form.name: {} for form in forms}
    for called, seconds in timed.items():
        name, _, samples = called.partition("|")
        found[name][int(samples)] = seconds
    return found


def comparisons(
    scores: dict[str, Any], seconds: dict[str, dict[int, list[float]]], wanted: int
) -> list[dict[str, Any]]:
    """Return for each score and method its time to the authors' quality at S = wanted; none if they were not run."""
    if AUTHORS not in seconds:
        return []
    found = []
    for kind in SCORES:
        measured = {
            name: {s: Measured(np.array(scores[kind][name][s]), np.array(seconds[name][s])) for s in scores[kind][name]}
            for name in seconds
        }
        target = measured[AUTHORS][wanted]
        for name, form in measured.items():
            # an estimate of a limit that is not DAVE's has no time at which it comes near it
            if name != AUTHORS and not (kind == "correlation" and not name.startswith("dave-fast")):
                found.append({"score": kind, "name": name, "of": wanted, **compare(form, target).as_json()})
    return found


def shrinkage_cost(forms: list[Form], seconds: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Return the time of a call with shrinkage over that without, side by side, in the default precision."""
    shrunk, plain = (seconds[form.name] for form in forms[:2])
    longest = max(shrunk)
    chosen = [s for s in shrunk if s >= min(LONG_CALL, longest)]
    return median_ratio([own / other for s in chosen for own, other in zip(shrunk[s], plain[s], strict=True)])


def read_photographs(subject: Subject, args: argparse.Namespace) -> Examples:
    """Return one half of the photographs; a class that is not given is the predicted one.

    Raises:
        SystemExit: no photograph can be read, or none has a box.
    """
    folders: dict[Path, list[Path]] = {}
    for path in find_images([args.photographs]):
        folders.setdefault(path.parent, []).append(path)
    files = [path for there in folders.values() for path in there[HALVES[args.half] :: 2]][: args.most]
    source = ImageFiles(files, subject.prepare, Annotations(subject.labels, read_boxes(args.boxes)))
    photos = source.read(0, len(files))
    if photos is None:
        raise SystemExit(f"none of the {len(files)} photographs can be read: {source.skipped}")
    if not photos.masks.any():
        raise SystemExit(f"{args.boxes} has no box for these photographs: {', '.join(photos.names)}")
    unknown = photos.labels < 0
    if unknown.any():
        photos.labels[unknown] = subject.explainer.predict(photos.images[unknown]).argmax(1).cpu()
    return photos


def known(value: float) -> float | None:
    """Return a score with five digits; None for NaN, which JSON does not have."""
    return None if np.isnan(value) else round(value, 5)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make one run and return its result."""
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {line}", flush=True)

    subject = Subject.load(args.model, **({} if args.noise_alpha is None else {"noise_alpha": args.noise_alpha}))
    photos = read_photographs(subject, args)
    alpha = subject.explainer.sampling.noise_alpha
    forms = own_forms(args.model, alpha, args.samples)
    absent = {}
    if args.authors is None:
        absent[AUTHORS] = "give --authors PATH, a checkout of github.com/a-vrobell/DAVE"
    else:
        forms.append(authors_form(args.authors, subject.explainer.model, alpha, args.samples))
    if find_spec("captum") is None:
        absent["integrated gradients, SmoothGrad"] = "captum is not installed"
    else:
        precision = subject.explainer.precision
        forms += captum_forms(subject.explainer.model, precision, min(subject.prepare.std), args.samples)
    say(f"{len(photos)} photographs, noise_alpha {alpha:g}: quality")
    scores = score(forms, photos, args.limits, args.limit_samples, say)
    say("times")
    seconds = time_forms(forms, photos, args.repeats, args.budget)
    say("done")
    wanted = min(PAPER_SAMPLES, args.samples)
    setting = {key: getattr(args, key) for key in ("title", "half", "limits", "limit_samples")} | {"of": wanted}
    return {
        "setting": setting | {"noise_alpha": alpha, "photographs": len(photos), "files": photos.names},
        "environment": machine.environment("kornia", "captum"),
        "seconds of the run": time.perf_counter() - began,
        "forms": [
            {
                "name": form.name,
                "samples": s,
                "seconds": spread(seconds[form.name][s]),
                **{kind: asdict(over_images(scores[kind][form.name][s])) for kind in SCORES},
                "each": {kind: [known(value) for value in scores[kind][form.name][s]] for kind in SCORES},
            }
            for form in forms
            for s in form.samples
        ],
        "not measured": absent,
        "time to quality": comparisons(scores, seconds, wanted),
        "shrinkage": shrinkage_cost(forms, seconds),
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="a classifier by name, such as hf:FOLDER; the authors' code takes timm's ViTs")
    made.add_argument("photographs", type=Path, help="a folder")
    made.add_argument("--boxes", type=Path, required=True, help="of the objects")
    made.add_argument("--title", help="the model and the photographs in words, for the page")
    made.add_argument("--half", choices=list(HALVES), default="held-out")
    made.add_argument("--most", type=int, help="photographs of the half, the first ones")
    made.add_argument("--noise-alpha", type=float, help="by default dave-fast's own choice for the model")
    made.add_argument("--samples", type=int, default=OWN_SAMPLES[-1], help="the largest S")
    made.add_argument("--limits", type=int, default=6, help="photographs whose limit is computed")
    made.add_argument("--limit-samples", type=int, default=LIMIT_SAMPLES)
    made.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    made.add_argument("--budget", type=float, default=300.0, help="seconds after which no further round begins")
    made.add_argument("--authors", type=Path, help="a checkout of the authors' code")
    made.add_argument("--out", type=Path, help="JSON; by default benchmarks/results/<device>/quality_for_time.json")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or the given arguments."""
    made = parser()
    args = made.parse_args(arguments)
    for name, least in (("samples", min(OTHER_SAMPLES)), ("limit-samples", 1), ("repeats", 1)):
        if getattr(args, name.replace("-", "_")) < least:
            made.error(f"--{name} is smaller than {least}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = measure(args)
    for row in result["time to quality"]:
        print(row)
    print(f"shrinkage: {result['shrinkage']}")
    out = args.out or machine.results_path("quality_for_time")
    machine.write_json(out, result)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
