"""The section of docs/quality.md on photographs: tables and sentences of stored scores."""

import json
from collections import defaultdict
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from dave_fast.evaluate import statistics
from dave_fast.evaluate.report import table
from dave_fast.evaluate.settings import METRICS, VARIANTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "benchmarks" / "results" / "quality_photographs.json"
HEADING = "## On photographs, by a trained model"
SMOOTHED = VARIANTS[1]
DEFAULT, PAPERS = "DAVE, S = 32", "DAVE, S = 256, paper's"
CONTROL = "uniform"

# head -> row -> metric -> item -> score, of the smoothed maps
Scores = dict[str, dict[str, dict[str, dict[str, float]]]]

INTRODUCTION = """\
The same question of a trained model and photographs: DINOv2 ViT-S/14 (eleven blocks, 224 px) under three linear
heads, {boxes} photographs of raccoons with boxes, and mosaics of them with photographs of six other classes. *class
means* is the classifier as it came: a row of its head is the mean of a class's features. *class token* and *patch
average* are logistic regressions on that output of the backbone, fitted to the other half of the photographs, their
flips, crops and mosaics. Every second photograph of each folder, from the first, was used for the probes, the best α,
γ of AttnLRP and the passes of equal time (`benchmarks/results/quality_photographs_settings.json`); the scores below
are of the others, and those settings were written down before any of them was computed. One was chosen again later, on
the same half, in AttnLRP's favour: the largest γ of the patch embedding, 1, had been the best, and 100 is better.

Maps of all methods are smoothed alike; DAVE's are shrunk first, those called "paper's" are not. "best α" was chosen by
EnergyPG for photographs, by GridPG for mosaics; so was γ. *contrast* explains the logit minus the mean of the other
logits (not under a probe: its weights sum to 0 over the classes, so that the contrast is the logit itself), *against
the mosaic's others* the logit minus the mean of the logits of the other cells' classes, *log p* the logarithm of the
probability. "in DAVE's time": as many passes, in bfloat16, as took the time of DAVE with S = 32."""

PAPER = """\
The paper's own figures (its Table 1, ImageNet, other models; per cent, GridPG / EnergyPG): ViT-B 60.19 / –, DeiT-B
63.52 / 82.23, DeiT-III-B 65.76 / 82.43, DINO-B 51.33 / 83.38. They are not comparable with those above in height:
other models, photographs, boxes (raccoons fill {area:.0%} of an image here) and mosaics."""

AGAIN = """\
Again: `python scripts/quality_photographs.py measure` with the folders that its help names, then `write`. Every
interval: `benchmarks/results/quality_photographs.json`."""


def collected(parts: dict[str, list[dict[str, Any]]]) -> Scores:
    """Return the scores of all parts by head, row, metric and item."""
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for part, lines in parts.items():
        for line in lines:
            for row, scored in line["scores"].items():
                for metric, variants in scored.items():
                    found[line["head"]][row][metric][f"{part}: {line['item']}"] = variants[SMOOTHED]
    return {head: {row: dict(scored) for row, scored in rows.items()} for head, rows in found.items()}


def interval(scores: dict[str, float]) -> statistics.Interval:
    """Return the mean over items and its interval."""
    return statistics.over_images(list(scores.values()))


def paired(scores: Scores, head: str, metric: str, one: str, other: str) -> statistics.Interval | None:
    """Return the difference of two rows on the items that both scored, positive where the first is better."""
    first, second = (scores.get(head, {}).get(row, {}).get(metric, {}) for row in (one, other))
    common = [item for item in first if item in second]
    if not common:
        return None
    sign = 1 if METRICS[metric] else -1
    return statistics.paired(*(sign * np.array([each[item] for item in common]) for each in (first, second)))


def section(scores: Scores, facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return the section as Markdown."""
    boxes = max(len(each) for row in scores.values() for each in row[DEFAULT].values())
    parts = [HEADING, INTRODUCTION.format(boxes=boxes), "### What the heads follow", _heads(facts, settings)]
    parts += ["### Is DAVE ahead there?", _plain(scores, facts, settings), *_verdicts(scores)]
    parts += ["### What shrinkage, α and the question do", _settings(scores)]
    for head in scores:
        parts += [f"### All rows: {head}", _table(scores[head])]
    parts += [
        "Mean over photographs or mosaics and its 95 % bootstrap interval; **bold**: the best, the control left out."
    ]
    return "\n\n".join([*parts, PAPER.format(area=facts["object area"]), AGAIN]) + "\n"


def _heads(facts: dict[str, Any], settings: dict[str, Any]) -> str:
    head = (
        "head",
        "named rightly",
        "logit falls, own cell blanked",
        "another cell",
        "own is most",
        "α by default",
        "best α",
    )
    rows = [
        (
            name,
            f"{each['accuracy']:.0%} of {each['photographs']}",
            f"{each['blanked itself']:+.2f}",
            f"{each['blanked another']:+.2f}",
            f"{each['cells where its own is most']:.0%} of {each['cells']}",
            f"{settings[name]['default noise_alpha']:g}",
            " / ".join(f"{settings[name][kind]['noise_alpha']:g}" for kind in ("photographs", "mosaics")),
        )
        for name, each in facts["heads"].items()
    ]
    note = (
        "In 2×2 mosaics each cell in turn becomes grey. GridPG says something of a method only where the logit of a "
        "cell's class falls more with the cell than with another one. Best α: of photographs / mosaics."
    )
    return f"{table(head, rows)}\n\n{note}"


def _plain(scores: Scores, facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return what the tables mean, in words: the figures are those of the scores, the words are to be read again."""

    def mean(row: str, metric: str = "EnergyPG", head: str = "class means") -> str:
        found = scores.get(head, {}).get(row, {}).get(metric)
        return f"{interval(found).mean:.3f}" if found else "–"

    def tried(head: str, what: str) -> str:
        """Return the range of GridPG over the settings that were tried on the half for choices."""
        in_mosaics = settings[head]["mosaics"].items()
        (found,) = (each.values() for title, each in in_mosaics if title.startswith(f"GridPG 2x2 by {what}"))
        return f"{min(found):.3f} to {max(found):.3f}"

    def of_heads(row: str, metric: str) -> str:
        return ", ".join(mean(row, metric, head) for head in scores)

    token = "class token"
    said = f"""\
**Where DAVE is ahead.** On photographs of one animal it puts more of its evidence into the box than input × gradient,
integrated gradients and SmoothGrad, at their own settings or in its time, than one unperturbed sample of its own, and
than LeGrad, under every head: EnergyPG {mean(DEFAULT)} under *class means*, integrated gradients
{mean("integrated gradients")}, SmoothGrad {mean("SmoothGrad")}, the sample {mean("frozen gradient")}, LeGrad
{mean("LeGrad")} (a blind map: {mean(CONTROL)}). 16 samples with shrinkage have {mean("DAVE, S = 16")}, 256 without it
{mean(PAPERS)}.

**Where it is not.** Libra FullGrad+ and AttnLRP, one pass each, have about as much in the box ({", ".join(scores)}:
{of_heads("Libra FullGrad+", "EnergyPG")} and {of_heads("AttnLRP", "EnergyPG")}, DAVE {of_heads(DEFAULT, "EnergyPG")})
and more in the right cell of a mosaic, where a map has to tell classes apart
({of_heads("Libra FullGrad+", "GridPG 2x2")} and {of_heads("AttnLRP", "GridPG 2x2")}, DAVE
{of_heads(DEFAULT, "GridPG 2x2")}). Deletion and insertion are better by input × gradient, on
the few photographs that were asked (n below). Under *{token}* DAVE's maps of a photograph for two classes correlate by
{mean(DEFAULT, "class similarity", token)}, LeGrad's by {mean("LeGrad", "class similarity", token)}.

**Why mosaics are hard for it.** The model does look: under *{token}* the logit of a cell's class falls by
{facts["heads"][token]["blanked itself"]:.2f} when the cell is blanked, by
{facts["heads"][token]["blanked another"]:.2f} when another is. Nor is it α: over the α tried on the half for choices
GridPG of DAVE goes from {tried(token, "noise_alpha")}, over the γ that of AttnLRP from
{tried(token, "gammas")} (*class means*: {tried("class means", "noise_alpha")} and
{tried("class means", "gammas")}), the best γ of the patch embedding being the largest tried; and the α
that was best in three mosaics is worse than the default in others. Nor, between 16 and 32, the number of samples, nor
the question: *log p* and the contrast with the mosaic's other classes change little (below). A trial on the
three mosaics of the half for choices, under *{token}*: AttnLRP without γ has the frozen gradient's 0.285; a position
embedding repeated in every cell, in place of one resampled to the mosaic's size, gives DAVE (S = 16) 0.289 in place of
0.333 and AttnLRP with γ = 1 and 0.05 0.387 in place of 0.380; no noise at all gives DAVE 0.351. γ lets positive weights
through more than negative ones, FullGrad+ adds up the tokens of every block. Both leave the model's own linear operator
on pixels, which is what DAVE shows, and pixels tell classes apart less than tokens do."""
    return "\n\n".join(fill(paragraph, 120) for paragraph in said.split("\n\n"))


def _verdicts(scores: Scores) -> list[str]:
    """Return the comparison of DAVE's default with its strongest rival for every head and metric, and it in words."""
    rows, words = [], defaultdict(list)
    for head, by_row in scores.items():
        rivals = {row: each for row, each in by_row.items() if not row.startswith("DAVE") and row != CONTROL}
        for metric in METRICS:
            row = _default_row(by_row, metric)
            if row is None:
                continue
            own = by_row[row][metric]
            common = {row: each[metric] for row, each in rivals.items() if metric in each}
            if not common:
                continue
            names = list(own)
            values = {row: [each.get(name, np.nan) for name in names] for row, each in common.items()}
            found = statistics.verdict({statistics.DAVE: list(own.values()), **values}, bool(METRICS[metric]))
            if found is None:
                continue
            title = metric if row == DEFAULT else f"{metric}, {row}"
            rows.append(
                (
                    title,
                    head,
                    found.dave.text(),
                    found.rival,
                    found.other.text(),
                    found.difference.signed(),
                    found.difference.n,
                    found.words,
                )
            )
            words[found.tone].append(f"{title} ({head})")
    titles = {"ahead": "Ahead of every baseline", "behind": "Behind one", "even": "Not told apart from one"}
    said = [f"**{title}**: {', '.join(words[tone])}." for tone, title in titles.items() if words[tone]]
    head = ("metric", "head", DEFAULT, "rival", "of the rival", "difference, paired", "n", "verdict")
    return ["\n".join(f"- {one}" for one in said), table(head, rows)]


def _default_row(by_row: dict[str, dict[str, dict[str, float]]], metric: str) -> str | None:
    """Return the row of DAVE as it is by default; with the fewest samples where S = 32 was not measured; or None."""
    sizes = [row for row in by_row if row.startswith("DAVE, S = ") and "paper" not in row and metric in by_row[row]]
    if not sizes or DEFAULT in sizes:
        return DEFAULT if sizes else None
    return min(sizes, key=lambda row: int(row.rpartition(" ")[2]))


def _settings(scores: Scores) -> str:
    """Return paired differences of settings of DAVE."""
    best = "DAVE, best α, S = 32"
    pairs = [
        ("shrinkage at S = 32", DEFAULT, f"{DEFAULT}, paper's"),
        ("shrinkage at S = 32 against S = 256 without", DEFAULT, PAPERS),
        ("best α at S = 32", best, DEFAULT),
        ("contrast at S = 32", "DAVE, contrast, best α, S = 32", best),
        ("log p at S = 32", "DAVE, log p, best α, S = 32", best),
        ("best α at S = 16", "DAVE, best α, S = 16", "DAVE, S = 16"),
        ("contrast at S = 16", "DAVE, contrast, best α, S = 16", "DAVE, best α, S = 16"),
        ("against the mosaic's others at S = 16", "DAVE, against the mosaic's others, S = 16", "DAVE, S = 16"),
        ("log p at S = 16", "DAVE, log p, best α, S = 16", "DAVE, best α, S = 16"),
    ]
    rows = [
        (title, metric, head, found.signed(), found.n)
        for title, one, other in pairs
        for metric in ("EnergyPG", "pointing game", "GridPG 2x2")
        for head in scores
        if (found := paired(scores, head, metric, one, other)) is not None
    ]
    return table(("what", "metric", "head", "difference, paired", "n"), rows)


def _table(by_row: dict[str, dict[str, dict[str, float]]]) -> str:
    present = [metric for metric in METRICS if any(metric in each for each in by_row.values())]
    ordered = sorted(by_row.items(), key=lambda row: (not row[0].startswith("DAVE"), row[0] == CONTROL))
    means = {row: {m: interval(each[m]) for m in present if m in each} for row, each in ordered}
    best = {}
    for metric in present:
        known = {row: each[metric].mean for row, each in means.items() if metric in each and row != CONTROL}
        best[metric] = (max if METRICS[metric] else min)(known, key=lambda row: known[row])
    rows = [
        (row, *((f"**{each[m].text()}**" if best[m] == row else each[m].text()) if m in each else "–" for m in present))
        for row, each in means.items()
    ]
    return table(("", *present), rows)


def write_section(parts: dict[str, list[dict[str, Any]]], facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write the section into docs/quality.md, in place of an earlier one, and the intervals into RESULTS."""
    scores = collected(parts)
    PAGE.write_text(with_section(PAGE.read_text(), HEADING, section(scores, facts, settings)))
    content = {
        "facts": facts,
        "settings": settings,
        "intervals": {
            head: {row: {m: vars(interval(each)) for m, each in scored.items()} for row, scored in by_row.items()}
            for head, by_row in scores.items()
        },
    }
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def with_section(page: str, heading: str, text: str) -> str:
    """Return a page with a section in place of an earlier one of this heading, or at its end.

    Args:
        page: Markdown.
        heading: of the second level, such as "## At depth".
        text: the section, its heading included.
    """
    before, found, after = f"{page.rstrip()}\n".partition(f"\n{heading}\n")
    _, another, behind = after.partition("\n## ") if found else ("", "", "")
    return f"{before.rstrip()}\n\n{text.rstrip()}\n{another}{behind}"
