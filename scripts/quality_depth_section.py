"""The section "At depth" of docs/quality.md: tables and sentences of stored scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from dave_fast.evaluate import statistics
from dave_fast.evaluate.deep import CONTRAST
from dave_fast.evaluate.report import table
from dave_fast.evaluate.settings import METRICS
from dave_fast.explain.depth import AUTO, depth_of, name_of, place_of
from scripts.quality_section import CONTROL, PAGE, Scores, collected, interval, paired, with_section

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "quality_depth.json"
HEADING = "## At depth, beside others there"
DIGITS, NO_NOISE = "digits", "DAVE, no noise"
# blocks of the model under each head: DINOv2 ViT-S/14 without its last block, and the embedded model
COUNTS = {"class means": 11, "class token": 11, "patch average": 11, DIGITS: 5}
LOCAL = ("GridPG 2x2", "GridPG 3x3", "EnergyPG", "pointing game")
# what is compared with others: metrics, and whether of the contrast
COMPARED = (("GridPG 2x2", False), ("GridPG 2x2", True), *((metric, False) for metric in LOCAL[1:]))
FEW = 16
# in the order of the tables
METHODS = ("DAVE", NO_NOISE, "one frozen sample", "gradient × activation", "Grad-CAM", "AttnLRP at tokens")
AT_PIXELS = {
    "DAVE": "DAVE, S = 16",
    NO_NOISE: f"{NO_NOISE}, S = 16",
    "one frozen sample": "frozen gradient",
    "gradient × activation": "input × gradient",
    "AttnLRP at tokens": "AttnLRP",
}

INTRODUCTION = """\
Evidence of the tokens that enter blocks, in place of pixels (`depth=`, [guide](guide.md)), of the same trained model,
heads and held-out photographs as above, of mosaics of these photographs, twice as many of 2×2, and of scenes and
mosaics of the embedded model, of a seed of their own; n says how many. "auto" is the mean over {autos}. It, the form
of the average and γ were chosen on the other half, γ by what it does at pixels; on digits γ is the package's own.
DAVE has S = 16 unless it is said otherwise, shrinkage, and the noise of the default, 0.1 of these models and 0.023 of
the embedded one; *DAVE, no noise* has its transformations alone. All rows of either are of the same samples.

*one frozen sample* is Σ_channels X_l ⊙ ∂f/∂X_l of the unperturbed image with every operator held constant,
*gradient × activation* the same with the true gradient, *Grad-CAM* ReLU(Σ_c X_lc · mean over the patches of ∂f/∂X_lc),
there and at its usual place in a ViT, behind the last block's norm1, *AttnLRP at tokens* X_l ⊙ LXT's gradient with γ
(without γ it is the frozen sample: a test says so). All of these are patches, enlarged bilinearly, and smoothed as
every map is. Over several blocks each of these is their mean; Grad-CAM, which is no sum, has none. *against the
others* explains, in a mosaic, the logit of a cell's class minus the mean logit of the other cells' classes: the same
contrast of gradients for every method, and of each sample for DAVE."""

AGAIN = """\
Again: `python scripts/quality_depth.py measure` with the folders that its help names, then `write`. Every interval:
`benchmarks/results/quality_depth.json`."""


def auto(head: str) -> str:
    """Return the name of the blocks of "auto" under a head, such as "blocks 5-9"."""
    return name_of(depth_of(place_of(AUTO, (None,) * COUNTS[head])))


def own(head: str, title: str = "DAVE", *, contrast: bool = False, size: int = FEW) -> str:
    """Return the row of DAVE at the blocks of "auto"; title: that of its rows, "DAVE" or NO_NOISE."""
    return f"{title}, {auto(head)}{CONTRAST if contrast else ''}, S = {size}"


def rivals(rows: dict[str, Any], head: str, *, contrast: bool) -> list[str]:
    """Return the rows of other methods: those at pixels and at the same blocks, and Grad-CAM at its usual place."""
    found = [row for row in rows if not row.startswith("DAVE") and row != CONTROL and (CONTRAST in row) == contrast]
    return [row for row in found if not re.search(r", blocks? \d", row) or f", {auto(head)}" in row]


def section(scores: Scores, times: dict[str, float]) -> str:
    """Return the section as Markdown."""
    blocks: dict[str, list[str]] = {}
    for head in scores:
        blocks.setdefault(auto(head), []).append(head)
    autos = ", ".join(f"{block} of {COUNTS[heads[0]]} ({', '.join(heads)})" for block, heads in blocks.items())
    parts = [HEADING, fill_each(INTRODUCTION.format(autos=autos)), "### Who is ahead there?"]
    parts += [*verdicts(scores), "### What depth, samples and the question do", differences(scores)]
    parts += ["### Block by block", by_block(scores)]
    if any("stability" in row for row in scores.get("class token", {}).values()):
        parts += ["### How the maps behave", behaviour(scores["class token"])]
    if times:
        parts += ["### Time", seconds(times)]
    return "\n\n".join([*parts, fill_each(AGAIN)]) + "\n"


def fill_each(text: str) -> str:
    """Return paragraphs wrapped at the page's width."""
    return "\n\n".join(fill(paragraph, 120) for paragraph in text.split("\n\n"))


def verdicts(scores: Scores) -> list[str]:
    """Return the comparison of DAVE at "auto" with its strongest rival, in words and as a table."""
    rows, said = [], []
    for title in ("DAVE", NO_NOISE):
        words: dict[str, list[str]] = {"ahead": [], "even": [], "behind": []}
        for metric, contrast in COMPARED:
            for head, by_row in scores.items():
                found = verdict(by_row, head, title, metric, contrast=contrast)
                if found is None:
                    continue
                what = f"{metric}{CONTRAST if contrast else ''}"
                figures = found.dave.text(), found.rival.replace(CONTRAST, ""), found.other.text()
                rows.append((title, what, head, *figures, found.difference.signed(), found.difference.n, found.words))
                # the table has what is of too few images to tell, and no sentence says it of them
                if not found.words.startswith("too few"):
                    words[found.tone].append(f"{what} ({head})")
        tones = {"ahead": "ahead of every other method", "even": "not told apart from one", "behind": "behind one"}
        said += [f"- **{title}, {tones[tone]}**: {'; '.join(each)}." for tone, each in words.items() if each]
    head = ("", "metric", "head", 'at "auto"', "rival", "of the rival", "difference, paired", "n", "verdict")
    note = (
        'Rivals: every method that scored these images at pixels or at the blocks of "auto", and Grad-CAM behind the '
        "last norm1. The strongest is the one that is furthest ahead of DAVE, or else the nearest behind. Methods of "
        "many passes are left out of mosaics of photographs here; the section above has them."
    )
    return ["\n".join(said), table(head, rows), fill_each(note)]


def verdict(
    by_row: dict[str, dict[str, dict[str, float]]], head: str, title: str, metric: str, *, contrast: bool
) -> statistics.Verdict | None:
    """Compare DAVE at "auto" with its strongest rival in a metric; None where either has no score."""
    ours = by_row.get(own(head, title, contrast=contrast), {}).get(metric)
    others = {row: by_row[row][metric] for row in rivals(by_row, head, contrast=contrast) if metric in by_row[row]}
    if not ours or not others:
        return None
    values = {row: [each.get(item, np.nan) for item in ours] for row, each in others.items()}
    return statistics.verdict({statistics.DAVE: list(ours.values()), **values}, bool(METRICS[metric]))


def differences(scores: Scores) -> str:
    """Return paired differences of settings of DAVE, and of DAVE and one sample."""
    rows = [
        (what, metric, head, found.signed(), found.n)
        for head in scores
        for what, one, other in (
            ("at depth against pixels, S = 16", own(head), "DAVE, S = 16"),
            ("S = 32 against S = 16, at depth", own(head, size=32), own(head)),
            ("S = 16 against one frozen sample, at depth", own(head), f"one frozen sample, {auto(head)}"),
            ("no noise against the default's, at depth", own(head, NO_NOISE), own(head)),
            ("no noise against the default's, pixels", f"{NO_NOISE}, S = {FEW}", f"DAVE, S = {FEW}"),
            ("against the others, at depth", own(head, contrast=True), own(head)),
        )
        for metric in LOCAL
        if (found := paired(scores, head, metric, one, other)) is not None
    ]
    return table(("what", "metric", "head", "difference, paired", "n"), rows)


def by_block(scores: Scores) -> str:
    """Return means by method and block for each metric and head; in mosaics also those of the contrast."""
    said = []
    for metric in ("GridPG 2x2", "EnergyPG", "pointing game"):
        for head, by_row in scores.items():
            found = {one[1] for row in by_row if (one := re.match(r"DAVE, (blocks? [\d-]+), S", row))}
            blocks = sorted(found, key=lambda name: (name == auto(head), int(re.findall(r"\d+", name)[0])))
            rows = [(method, *cells(by_row, metric, method, blocks)) for method in METHODS]
            places = ("pixels", *(f"{'auto: ' if name == auto(head) else ''}{name}" for name in blocks))
            said.append(f"{metric}, {head}:\n\n{table(('', *places), rows)}")
    usual = usual_places(scores)
    note = (
        'Means; in mosaics "the logit / against the others". Every pair that is compared above has the same items; a '
        "dash is a place that a method does not have."
    )
    return "\n\n".join([*said, f"{note} {usual}"])


def cells(by_row: dict[str, dict[str, dict[str, float]]], metric: str, method: str, blocks: list[str]) -> Iterator[str]:
    """Yield a method's mean at the pixels and at each block."""
    size = f", S = {FEW}" if method.startswith("DAVE") else ""
    for name in (AT_PIXELS.get(method, "").removesuffix(size), *(f"{method}, {block}" for block in blocks)):
        rows = f"{name}{size}", f"{name}{CONTRAST}{size}"
        means = [f"{interval(by_row[row][metric]).mean:.3f}" for row in rows if metric in by_row.get(row, {})]
        yield " / ".join(means) if means else "–"


def usual_places(scores: Scores) -> str:
    """Return the means of the methods that have one place of their own, as a sentence."""
    said = []
    for row in ("Grad-CAM, last norm1", "Libra FullGrad+", "LeGrad"):
        of_heads = [
            f"{head} {interval(by_row[row]['GridPG 2x2']).mean:.3f}"
            for head, by_row in scores.items()
            if "GridPG 2x2" in by_row.get(row, {})
        ]
        said.append(f"{row} ({', '.join(of_heads)})")
    return f"GridPG 2x2 of methods with a place of their own: {'; '.join(said)}."


def behaviour(by_row: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the behaviour of the rows at pixels and at "auto" under the class token."""
    metrics = [metric for metric in METRICS if metric not in LOCAL and any(metric in each for each in by_row.values())]
    head = "class token"
    named = [own(head, size=32), own(head, NO_NOISE, size=32), "DAVE, S = 32", *rivals(by_row, head, contrast=False)]
    rows = [
        (row, *(interval(by_row[row][metric]).text() if metric in by_row[row] else "–" for metric in metrics))
        for row in named
        if any(metric in by_row.get(row, {}) for metric in metrics)
    ]
    return table(("", *metrics), rows)


def seconds(times: dict[str, float]) -> str:
    """Return the time of each method."""
    return table(("method", "seconds an image"), [(name, f"{each:.2f}") for name, each in times.items()])


def write_section(parts: dict[str, list[dict[str, Any]]], times: dict[str, float]) -> None:
    """Write the section into docs/quality.md, in place of an earlier one, and the intervals into RESULTS."""
    scores = collected(parts)
    scores = {head: scores[head] for head in COUNTS if own(head) in scores.get(head, {})}
    PAGE.write_text(with_section(PAGE.read_text(), HEADING, section(scores, times)))
    intervals = {
        head: {row: {m: vars(interval(each)) for m, each in scored.items()} for row, scored in by_row.items()}
        for head, by_row in scores.items()
    }
    content = {"auto": {head: auto(head) for head in scores}, "seconds": times, "intervals": intervals}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
