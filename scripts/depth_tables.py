"""What the scored files of `scripts/depth.py` say: means, paired differences and losses, as JSON and as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.depth_evidence import FEW
from benchmarks.depth_forms import FORMS, GROUPS, MAIN, METRICS, SIZES
from benchmarks.depth_rules import RULES, SHARES, Measured, measured
from scripts.depth_models import LEVELS

PAGE = Path(__file__).parents[1] / "docs" / "depth.md"
# of the names of runs on copies with fewer blocks, which are for the choice of the block only
SHORTENED = " blocks"
# fewer images say nothing
FEWEST = 4
SHOWN = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)


def folders(evidence: Path) -> Iterator[Path]:
    """Yield the folders of runs with enough scored files."""
    for folder in sorted(evidence.glob("*/alpha-*")):
        if len(list(folder.glob("scores-*.npz"))) >= FEWEST:
            yield folder


def summary(folder: Path) -> dict[str, Any]:
    """Return means and differences of one run at one noise level, over its images."""
    files = [dict(np.load(path)) for path in sorted(folder.glob("scores-*.npz"))]
    blocks = np.stack([file["blocks"] for file in files])
    size = _size(blocks)
    made: dict[str, Any] = {
        "run": folder.parent.name.replace("-", " "),
        "noise_alpha": float(folder.name.removeprefix("alpha-")),
        "images": len(files),
        "pixels": {
            form: round(float(np.mean([file["pixels"][at, 0, 0] for file in files])), 4)
            for at, form in enumerate(("paper", "shrunk"))
        },
        # of each image, the mean over the blocks and the pixels' map, of the main form
        "of each": _rounded(blocks[:, 0, size, :, 0].mean(1)),
        "of each, pixels": [round(float(file["pixels"][1, 0, 0]), 4) for file in files],
        "forms": {},
        "depth": _choices(measured(folder, size), SIZES[size]),
    }
    groups = [np.load(path)["groups"] for path in sorted(folder.glob("groups-*.npz"))]
    if len(groups) == len(files):
        made["groups"] = dict(zip(GROUPS, _rounded(np.mean(groups, 0)), strict=True))
    for at, form in enumerate(FORMS):
        for which, samples in enumerate(SIZES):
            scores, reference = blocks[:, at, which], blocks[:, 0, which]
            if not np.isnan(scores[..., 0]).any():
                made["forms"][f"{form}, S = {samples}"] = _compared(scores, reference)
    return made


def _size(blocks: np.ndarray) -> int:
    """Return the position in `SIZES` of the most samples up to `FEW` that all images have."""
    there = [at for at, size in enumerate(SIZES) if size <= FEW and not np.isnan(blocks[:, 0, at, :, 0]).any()]
    return there[-1]


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, 4).tolist()


def _compared(scores: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Return each metric's mean over the blocks, and the difference from the main form with its standard error."""
    found: dict[str, Any] = {}
    for at, metric in enumerate(METRICS):
        if not np.isnan(scores[..., at]).any():
            less = (scores - reference)[..., at].mean(1)
            found[metric] = _rounded(
                np.array([scores[..., at].mean(), less.mean(), less.std(ddof=1) / len(less) ** 0.5])
            )
    return found


def _choices(run: Measured, samples: int) -> dict[str, Any]:
    """Return the scores of all blocks, and the block and loss of each share and each rule."""
    rules = {name: run.chosen(name) for name in RULES}
    return {
        "samples": samples,
        "by block": _rounded(run.inside.mean(0)),
        "best": run.best,
        "shares": {str(s): [run.share(s), *_rounded(np.array(run.lost(run.share(s))))] for s in SHARES},
        "rules": {name: [at, *_rounded(np.array([*run.lost(at), stable]))] for name, (at, stable) in rules.items()},
    }


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def forms_table(runs: list[dict[str, Any]]) -> list[str]:
    """Return Markdown: a row a run and a form, mean over the blocks, and differences from the main form."""
    lines = _head("images, α", "form", *(f"S = {size}" for size in SIZES))
    for run in (run for run in runs if SHORTENED not in run["run"]):
        for form in FORMS:
            cells = [_cell(run["forms"].get(f"{form}, S = {size}"), form) for size in SIZES]
            if any(cells):
                lines.append(_row(_title(run), form, *cells))
    return lines


def _title(run: dict[str, Any]) -> str:
    return f"{run['run']} ({run['images']}), {run['noise_alpha']:g}"


def _cell(found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return ""
    inside, like = found["inside"], found["correlation"]
    means = f"{inside[0]:.3f}, {like[0]:.3f}"
    return means if form == MAIN else f"{means} ({inside[1]:+.3f} ± {inside[2]:.3f})"


def depths_table(runs: list[dict[str, Any]]) -> list[str]:
    """Return Markdown: a row a run, the best block, and what shares, rules and means of blocks lose against it."""
    names = [*(f"{share:g}" for share in SHOWN), *RULES, *GROUPS]
    lines, lost = _head("images, α", "S", "pixels", "best block", *names), []
    for run in runs:
        of = run["depth"]
        most = max(of["by block"])
        choices = [*(of["shares"][str(share)] for share in SHOWN), *(of["rules"][name] for name in RULES)]
        groups = [most - run.get("groups", {}).get(name, np.nan) for name in GROUPS]
        lost.append([*(choice[1] for choice in choices), *groups])
        cells = [*(f"{choice[0]}: {choice[1]:.3f}" for choice in choices), *(f"{each:.3f}" for each in groups)]
        best = f"{of['best']} of {len(of['by block'])}: {most:.3f}"
        lines.append(_row(_title(run), str(of["samples"]), f"{run['pixels']['shrunk']:.3f}", best, *cells))
    counts = [len(run["depth"]["by block"]) for run in runs]
    for count in sorted(set(counts)):
        values = np.nanmean([row for row, has in zip(lost, counts, strict=True) if has == count], 0)
        lines.append(_row(f"mean lost, {count} blocks", "", "", "", *(f"{each:.3f}" for each in values)))
    return lines


def noise_table(runs: list[dict[str, Any]]) -> list[str]:
    """Return Markdown: what more or less noise than `LEVELS`' first changes, paired by image, with standard errors."""
    lines = _head("images", "α", "blocks, less α = 0.1", "pixels, less α = 0.1")
    reference = {run["run"]: run for run in runs if run["noise_alpha"] == LEVELS[0]}
    for run in runs:
        if run["noise_alpha"] != LEVELS[0] and run["run"] in reference:
            cells = [_paired(run[of], reference[run["run"]][of]) for of in ("of each", "of each, pixels")]
            lines.append(_row(f"{run['run']} ({run['images']})", f"{run['noise_alpha']:g}", *cells))
    return lines


def _paired(values: list[float], others: list[float]) -> str:
    """Return the mean difference over the images that both have, which are the first ones."""
    both = min(len(values), len(others))
    less = np.array(values[:both]) - np.array(others[:both])
    return f"{less.mean():+.3f} ± {less.std(ddof=1) / both**0.5:.3f}"


def stability_table(runs: list[dict[str, Any]]) -> list[str]:
    """Return Markdown: for what share of the images each rule chooses within one block of its choice for all."""
    rows = [[f"{run['depth']['rules'][name][3]:.2f}" for name in RULES] for run in runs]
    return _head("images, α", *RULES) + [_row(_title(run), *row) for run, row in zip(runs, rows, strict=True)]


TABLES = {"forms": forms_table, "noise": noise_table, "depths": depths_table, "stability": stability_table}


def write_page(runs: list[dict[str, Any]]) -> None:
    """Write the tables between the marks of the page."""
    text = PAGE.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- scripts/depth: {name} -->", "<!-- end -->"
        body = "\n".join([begin, "", *table(runs), "", end])
        text, count = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: body, text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{PAGE} has no place for the table: expected {begin} … {end}")
    PAGE.write_text(text)
