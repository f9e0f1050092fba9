"""The report: one HTML page without outside assets, the same as Markdown, and the numbers as JSON and CSV."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from dave_fast.evaluate import plots
from dave_fast.evaluate.definitions import SHORT, definitions
from dave_fast.evaluate.methods import AT_PIXELS, CONTROLS, METHODS, MethodSettings
from dave_fast.evaluate.settings import METRICS, SECTIONS, VARIANTS, EvaluationSettings, Results
from dave_fast.evaluate.summary import Summary, as_csv, as_json, summarise
from dave_fast.explain.depth import PIXELS, name_of
from dave_fast.files import atomically
from dave_fast.images import Preprocessing
from dave_fast.images.drawing import SHORTEST_SIDE, percent, plain_map, save_picture
from dave_fast.models.labels import Labels

WAYS = {True: "more is better", False: "less is better", None: "to be read beside another"}
_OUTLINE = (255, 255, 255)


@dataclass(frozen=True)
class About:
    """The context of the results.

    Attributes:
        model: its name.
        source: description of the images.
        settings: of the evaluation.
        setup: of the methods.
        labels: the model's class names.
        prepare: the model's preprocessing.
        environment: versions and the device.
        command: the command that repeats the run.
        skipped: files left out -> the reason.
    """

    model: str
    source: str
    settings: EvaluationSettings
    setup: MethodSettings
    labels: Labels
    prepare: Preprocessing
    environment: dict[str, Any]
    command: str
    skipped: dict[str, str]


def write(out: Path, results: Results, about: About) -> Summary:
    """Write report.html, report.md, results.json, scores.csv and examples.png into a folder."""
    from jinja2 import Environment

    summary = summarise(results)
    # First the numbers, then what is drawn of them.
    keys = ("model", "source", "settings", "setup", "environment", "command", "skipped")
    content = as_json(results, summary, {key: getattr(about, key) for key in keys})
    _write(out / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _write(out / "scores.csv", as_csv(results))
    shown = ["input", *(name for name in results.scores if name not in CONTROLS)]
    pictures = [_pictures(one, shown[1:], about) for one in results.examples]
    examples = [
        (one["name"], f"{about.labels.name(one['class'])}, {percent(one['probability'])}", list(map(_data, row)))
        for one, row in zip(results.examples, pictures, strict=True)
    ]
    context = _context(results, summary, about) | {"columns": shown, "examples": examples}
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    _write(out / "report.html", Environment(autoescape=True).from_string(template).render(context))
    if pictures:
        save_picture(_sheet(shown, pictures), out / "examples.png")
    _write(out / "report.md", markdown(context))
    return summary


def _write(path: Path, text: str) -> None:
    with atomically(path) as file:
        # A file's name may be no UTF-8: Python has such a byte as half a surrogate pair, which JSON can hold as \udcff.
        file.write(text.encode(errors="backslashreplace"))


def _context(results: Results, summary: Summary, about: About) -> dict[str, Any]:
    """Return the values that the page's template and the Markdown are filled with."""
    return {
        "title": "Attribution quality",
        "subtitle": f"{about.model} on {about.source}",
        "facts": _facts(results, about),
        "note": VERDICTS,
        "verdicts": [
            (metric, variant, summary.verdicts[variant][metric])
            for metric in summary.metrics
            for variant in VARIANTS
            if metric in summary.verdicts[variant]
        ],
        "shrunk": ", DAVE's shrunk before it" if about.setup.explainer.get("shrink") else "",
        "outlined": any(one["mask"].any() for one in results.examples),
        "sections": [_section(title, summary, metrics) for title, metrics in SECTIONS.items()],
        "curves": _curve_cards(results),
        "keys": {name: colour(name) for name in results.scores},
        "seeds": [
            (name, variant, ", ".join(f"{mean:.4f}" for mean in results.seeds[name][variant]), interval.text(4))
            for variant, row in summary.seeds.items()
            for name, interval in row.items()
        ],
        "probes": min(about.settings.probes, results.facts.get("images", 0)),
        "tables": [(variant, *_table(summary, variant)) for variant in VARIANTS],
        "absent": results.absent,
        "skipped": about.skipped,
        "definitions": [(m, SHORT[m]) for m in summary.metrics]
        + definitions(about.settings, about.setup, results.scores),
        "settings": _settings(about),
    }


def colour(name: str) -> int:
    """Return the colour of a method, the same in every chart."""
    return plots.OTHER_DAVE if name == AT_PIXELS else list(METHODS).index(name) % plots.COLOURS


def _facts(results: Results, about: About) -> list[tuple[str, str]]:
    facts = results.facts
    found = [(f"{facts['images']}", "images")]
    if facts["labelled"]:
        found.append((f"{facts['accuracy']:.1%}", "named rightly by the model"))
    if facts.get("object area") is not None:
        found.append((f"{facts['object area']:.1%}", "of an image is the object: a blind map's EnergyPG"))
    for kind, count in facts.get("mosaics", {}).items():
        found.append((f"{count}", f"mosaics {kind}"))
    found.append((f"{about.setup.n_samples}", "samples an image"))
    if about.setup.depth != PIXELS:
        found.append((name_of(about.setup.depth), "depth of DAVE's maps"))
    alpha = about.setup.explainer.get("noise_alpha")
    if alpha is not None:
        found.append((f"{alpha:g}", "noise_alpha"))
    return found


def _settings(about: About) -> list[tuple[str, str]]:
    named = {"command": about.command, **asdict(about.settings), **about.setup.explainer}
    named |= {"depth": about.setup.depth, **about.environment}
    return [(name, str(value)) for name, value in named.items() if value is not None]


def _section(title: str, summary: Summary, metrics: Iterable[str]) -> dict[str, Any]:
    cards = []
    for metric in (each for each in metrics if each in summary.metrics):
        for variant in VARIANTS:
            row = summary.intervals[variant]
            rows = [(name, colour(name), row[name][metric]) for name in row if metric in row[name]]
            if rows and (variant == VARIANTS[1] or metric == "border excess"):
                way = WAYS[METRICS[metric]]
                svg = plots.forest(rows, summary.best(variant, metric))
                cards.append({"title": metric, "text": f"{SHORT[metric]} ({way}; maps {variant}).", "svg": svg})
    text = "Mean over images and its 95 % bootstrap interval; the best method is bold, controls left out."
    return {"title": title, "text": text, "cards": cards}


def _curve_cards(results: Results) -> list[dict[str, str]]:
    cards = []

    def add(title: str, text: str, x: Sequence[float], rows: dict[str, dict[str, Tensor]], **axes: Any) -> None:
        drawn = [
            plots.Line(name, colour(name), x, row[VARIANTS[1]].nanmean(0).tolist(), name in CONTROLS)
            for name, row in rows.items()
        ]
        cards.append({"title": title, "text": text, "svg": plots.lines(drawn, **axes)})

    for protocol, (changed, rows) in results.curves.items():
        images = len(next(iter(rows.values()))[VARIANTS[1]])
        text = f"{SHORT[f'{protocol} curve'].capitalize()}. Mean of {images} images, maps smoothed."
        add(protocol, text, changed.tolist(), rows, x_title="changed share", y_title="probability")
    stages, rows = results.randomised
    if stages:
        text = "Rank correlation with the trained model's map while parameters are randomised from the head down."
        axes = {"x_title": "randomised down to", "y_title": "rank correlation"}
        names = _thinned([name.removeprefix("blocks.") for name in stages])
        add("parameter randomisation", text, range(len(stages)), rows, **axes, x_names=names)
    return cards


def _thinned(names: Sequence[str]) -> list[str]:
    """Return the labels with most of them empty, so that those that are left do not overlap."""
    every = -(-len(names) // 9)
    return [name if i % every == 0 else "" for i, name in enumerate(names)]


def _table(summary: Summary, variant: str) -> tuple[list[str], dict[str, list[tuple[str, bool]]]]:
    """Return the metrics and, by method, a cell for each of them: its text and whether it is the best."""
    rows = summary.intervals[variant]
    metrics = [metric for metric in summary.metrics if any(metric in row for row in rows.values())]
    best = {metric: summary.best(variant, metric) for metric in metrics}
    return metrics, {
        name: [(row[metric].text() if metric in row else "–", best[metric] == name) for metric in metrics]
        for name, row in rows.items()
    }


def _pictures(one: dict[str, Any], shown: Sequence[str], about: About) -> list[Image.Image]:
    """Return the input and the map of each method, with the outline of the object if it is known."""
    mask = one["mask"].numpy()
    size = min(SHORTEST_SIDE // 2, 224)
    made = [Image.fromarray(about.prepare.pixels(one["image"]).cpu().numpy())]
    made += [plain_map(one["maps"][name].float().cpu().numpy()) for name in shown if name in one["maps"]]
    fitted = [ImageOps.scale(picture, size / min(picture.size), Image.Resampling.LANCZOS) for picture in made]
    return [_outlined(picture, mask) for picture in fitted]


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    if not mask.any():
        return picture
    large = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    inside = np.pad(large, 1, mode="edge")
    middle = inside[1:-1, 1:-1]
    neighbours = (inside[:-2, 1:-1], inside[2:, 1:-1], inside[1:-1, :-2], inside[1:-1, 2:])
    edge = middle & ~np.logical_and.reduce(neighbours)
    pixels = np.array(picture)
    pixels[edge] = (0.35 * pixels[edge] + 0.65 * np.array(_OUTLINE)).astype(np.uint8)
    return Image.fromarray(pixels)


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sheet(columns: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Return all examples in one picture, a row for each image, for the Markdown report."""
    import matplotlib
    from PIL import ImageDraw, ImageFont

    width, height = max(p.width for r in rows for p in r), max(p.height for r in rows for p in r)
    gap, head = 8, 28
    sheet = Image.new("RGB", ((width + gap) * len(columns) + gap, head + (height + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    # Pillow's own font lacks the multiplication sign
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 14)
    for column, name in enumerate(columns):
        middle = gap + column * (width + gap) + width // 2
        draw.text((middle, head // 2), name, fill=(60, 60, 60), font=font, anchor="mm")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), head + number * (height + gap)))
    return sheet


def markdown(context: dict[str, Any]) -> str:
    """Return the report as Markdown, without charts."""
    facts = "; ".join(f"{value} {name}" for value, name in context["facts"])
    parts = [f"# {context['title']}", f"{context['subtitle']}: {facts}."]
    if context["examples"]:
        note = " Outlined: the object." if context["outlined"] else ""
        parts += [
            "![The same images explained by every method](examples.png)",
            f"Maps behind the same post-processing{context['shrunk']}, each on its own scale.{note} The first images; "
            "none was chosen.",
        ]
    if context["verdicts"]:
        head = ("metric", "maps", "DAVE", "rival", "of the rival", "difference, paired", "n", "verdict")
        rows = [
            (metric, variant, v.dave.text(), v.rival, v.other.text(), v.difference.signed(), v.difference.n, v.words)
            for metric, variant, v in context["verdicts"]
        ]
        parts += ["## Is DAVE ahead?", VERDICTS, table(head, rows)]
    for variant, metrics, scored in context["tables"]:
        rows = [(name, *(f"**{text}**" if best else text for text, best in cells)) for name, cells in scored.items()]
        parts += [f"## Maps {variant}", table(("", *metrics), rows)]
    parts += ["Mean over images and its 95 % bootstrap interval. **Bold**: the best mean, controls left out."]
    if context["seeds"]:
        parts += ["## Other seeds", f"EnergyPG of the same {context['probes']} images under each seed."]
        parts += [table(("method", "maps", "a mean a seed", "over seeds"), context["seeds"])]
    for title, key in (("Not run", "absent"), ("Files left out", "skipped")):
        if context[key]:
            parts += [f"## {title}", "\n".join(f"- **{name}**: {why}" for name, why in context[key].items())]
    parts += ["## What was measured", "\n".join(f"- **{name}**: {text}" for name, text in context["definitions"])]
    parts += ["## Settings", "\n".join(f"- {name}: `{text}`" for name, text in context["settings"])]
    return "\n\n".join(parts) + "\n"


VERDICTS = (
    "Against the baseline that is ahead of DAVE or comes nearest. Differences are paired: on the same images, positive "
    "where DAVE is better. “Intervals apart”: DAVE's interval touches no baseline's."
)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; vertical bars in cells are escaped."""
    lines_ = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines_)
