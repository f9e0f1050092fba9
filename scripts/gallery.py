"""A gallery of one image: several classes, contrasts, patches, numbers of samples, noise levels and resolutions.

    python scripts/gallery.py                                              the embedded scene and model
    python scripts/gallery.py photo.jpg --model deit3_base_patch16_224.fb_in1k --out gallery/
    python scripts/gallery.py --page docs/gallery-image.md --out docs/figures    that of the documentation

It writes the figures under --out, and a page that describes them and the correlations of their maps. A model is any
that `dave_fast.DAVE` takes by name; resolutions need one whose position embeddings timm can resample.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import os
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import dave_fast
from dave_fast.errors import InputError
from dave_fast.evaluate.metrics import correlation
from dave_fast.files import atomically
from dave_fast.images import Preprocessing, figures, preprocessing, read_image
from dave_fast.images.drawing import percent
from dave_fast.images.figures import Panel
from dave_fast.models.labels import Labels, labels_of
from dave_fast.models.meaning import probabilities
from dave_fast.targets import Contrast, Patch, Sum, Target, tokens_of

CLASSES = 4
SAMPLES = (1, 4, 16, 50, 200)
ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.9)
# sides of the image, as shares of the model's own
RESOLUTIONS = (0.75, 1.0, 1.5, 2.0)
DPI = 120
# letters of a line of the page
WIDTH = 140
COLOURS = 256


@dataclass(frozen=True)
class GalleryFigure:
    """One figure of the gallery.

    Attributes:
        name: of its file.
        title: its heading.
        text: Markdown below it.
        picture: the figure.
    """

    name: str
    title: str
    text: str
    picture: Image.Image


@dataclass(frozen=True)
class GallerySubject:
    """The image and the model of a gallery.

    Attributes:
        explainer: of the model.
        image: the photograph.
        n_samples: of every map.
        converged: samples of the map that others are compared with.
    """

    explainer: dave_fast.DAVE
    image: Image.Image
    n_samples: int
    converged: int

    @cached_property
    def prepare(self) -> Preprocessing:
        """The model's preprocessing."""
        return preprocessing(self.explainer.model)

    @cached_property
    def seen(self) -> tuple[Tensor, np.ndarray]:
        """The model's input (3, H, W), and its pixels (H, W, 3)."""
        return self.prepare(self.image)

    @cached_property
    def labels(self) -> Labels:
        """The model's class names."""
        return labels_of(self.explainer.model)

    @cached_property
    def ranked(self) -> list[int]:
        """The most probable classes."""
        logits = self.explainer.predict(self.seen[0][None])[0]
        return [int(index) for index in logits.topk(min(max(CLASSES, 5), len(logits))).indices]

    @property
    def first(self) -> int:
        """The predicted class."""
        return self.ranked[0]

    def maps(self, targets: list[Target], n_samples: int | None = None) -> Tensor:
        """Return maps (targets, H, W)."""
        return self.explainer.explain(self.seen[0], targets=targets, n_samples=n_samples or self.n_samples).maps[0]

    def name(self, index: int) -> str:
        """Return the name of a class."""
        return self.labels.name(index)


def classes(subject: GallerySubject) -> GalleryFigure:
    """Draw the most probable classes of one image, from one call."""
    shown = subject.ranked[:CLASSES]
    found = subject.explainer.explain(subject.seen[0], targets=list(shown), n_samples=subject.n_samples)
    panels = [
        Panel(heat.numpy(), subject.name(index), float(probability))
        for heat, index, probability in zip(found.maps[0].cpu(), shown, found.probability[0], strict=True)
    ]
    chances = probabilities(subject.explainer.model, found.output)[0].tolist()
    bars = [(subject.name(index), chances[index]) for index in subject.ranked[:5]]
    text = (
        f"The {len(shown)} most probable classes, explained in one call that walks the perturbed images forward "
        "once. Each map is "
        "divided by its own maximum: a class that the model hardly believes in has a bright map too, of what "
        "little speaks for it."
    )
    return GalleryFigure("classes", "Several classes", text, drawn(subject, panels, bars))


def contrast(subject: GallerySubject) -> GalleryFigure:
    """Draw two classes, their sum and their differences."""
    a, b = subject.ranked[:2]
    one, other = subject.name(a), subject.name(b)
    asked: dict[str, Target] = {
        one: a,
        other: b,
        f"{one} + {other}": Sum(a, b),
        f"{one} − {other}": Contrast(a, b),
        f"{other} − {one}": Contrast(b, a),
    }
    maps = subject.maps(list(asked.values())).cpu()
    panels = [Panel(heat.numpy(), name) for heat, name in zip(maps, asked, strict=True)]
    alike = correlation(maps[0][None], maps[3][None]).item()
    text = (
        f"“Why {one}?”, “why {other}?”, either, and “why {one} and not {other}?” with its reverse. In a difference "
        "pixels that speak "
        "for both cancel, and those that speak against the second class speak for the first. Here the maps of "
        f"“{one}” and of "
        f"“{one} − {other}” correlate {alike:.2f}."
    )
    return GalleryFigure("contrast", "Why this and not that", text, drawn(subject, panels))


def patches(subject: GallerySubject) -> GalleryFigure | None:
    """Draw the patches with most of the maps of two classes; None for a model whose tokens are not known."""
    try:
        model = tokens_of(subject.explainer.model)
    except InputError:
        return None
    side = model.patch_embed.patch_size
    maps = F.avg_pool2d(subject.maps(list(subject.ranked[:2])), side)
    places = [divmod(int(one.argmax()), one.shape[1]) for one in maps]
    asked = [Patch(*place) for place in dict.fromkeys(places)]
    settings = dict(precision=subject.explainer.precision, noise_alpha=subject.explainer.sampling.noise_alpha)
    explainer = dave_fast.DAVE(model, **settings)
    found = explainer.explain(subject.seen[0], targets=list(asked), n_samples=subject.n_samples).maps[0].cpu()
    panels = []
    for question, heat in zip(asked, found, strict=True):
        crop = subject.seen[1].copy()
        framed(crop[question.row * side[0] :][: side[0], question.column * side[1] :][:, : side[1]])
        panels.append(Panel(heat.numpy(), f"row {question.row}, column {question.column}", crop=crop))
    text = (
        "What makes a token what it is? Framed patches, each explained by its own feature in the unperturbed image; "
        "the question follows the patch through every rotation, shift and flip. With a linear probe's weights it asks "
        "why the patch gets its label."
    )
    return GalleryFigure("patches", "A token of the output", text, drawn(subject, panels))


def framed(pixels: np.ndarray) -> None:
    """Draw a white frame along the border of pixels (h, w, 3), in place."""
    pixels[[0, -1]] = 255
    pixels[:, [0, -1]] = 255


def samples(subject: GallerySubject) -> GalleryFigure:
    """Draw maps of one perturbed sample to many."""
    most = subject.converged
    counts = [count for count in SAMPLES if count < most]
    found = {count: subject.maps([subject.first], count) for count in (*counts, most)}
    alike = [f"{correlation(found[count], found[most]).item():.2f} at S = {count}" for count in counts]
    panels = [Panel(found[count][0].cpu().numpy(), f"S = {count}") for count in counts]
    text = (
        f"The predicted class with more and more perturbed samples. Correlation with the map at S = {most:,}: "
        f"{', '.join(alike)}. The first 4 samples of 16 are the 4 of 4, so a map can be refined."
    )
    return GalleryFigure("samples", "How many samples", text, drawn(subject, panels))


def alphas(subject: GallerySubject) -> GalleryFigure:
    """Draw maps at several noise levels, that of the subject among them."""
    own, maps = subject.explainer.sampling.noise_alpha, {}
    for alpha in sorted({*ALPHAS, own}):
        with_alpha = dave_fast.DAVE(subject.explainer.model, precision=subject.explainer.precision, noise_alpha=alpha)
        maps[alpha] = GallerySubject(with_alpha, subject.image, subject.n_samples, subject.converged).maps(
            [subject.first]
        )
    panels = [Panel(heat[0].cpu().numpy(), f"α = {alpha}") for alpha, heat in maps.items()]
    told = ", ".join(
        f"{correlation(heat, maps[own]).item():.2f} at {alpha}" for alpha, heat in maps.items() if alpha != own
    )
    text = (
        "The predicted class at several highest noise levels, `noise_alpha`. Correlation with the map at "
        f"α = {own}: {told}. How much it matters depends on the model; `dave-fast tune` chooses it for one."
    )
    return GalleryFigure("alpha", "The noise level α", text, drawn(subject, panels))


def resolutions(subject: GallerySubject) -> GalleryFigure | None:
    """Draw the image at other sizes; None for a model whose position embeddings cannot be resampled."""
    model = subject.explainer.model
    if not hasattr(model, "set_input_size"):
        return None
    patch = model.patch_embed.patch_size
    panels, told = [], []
    for share in RESOLUTIONS:
        size = tuple(round(side * share / p) * p for side, p in zip(subject.prepare.size, patch, strict=True))
        resized = copy.deepcopy(model)
        resized.set_input_size(img_size=size)
        explainer = dave_fast.DAVE(
            resized, precision=subject.explainer.precision, noise_alpha=subject.explainer.sampling.noise_alpha
        )
        inputs, crop = preprocessing(resized, size)(subject.image)
        found = explainer.explain(inputs, subject.first, n_samples=subject.n_samples)
        panels.append(Panel(found.maps[0].cpu().numpy(), "×".join(map(str, size)), crop=crop))
        told.append(f"{percent(float(found.probability[0]))} at {panels[-1].name}")
    text = (
        "The same image at other sizes, position embeddings resampled: a map has the resolution of its input. What the "
        f"model believes changes with the size too, so look at both. Probability of “{subject.name(subject.first)}”: "
        f"{', '.join(told)}."
    )
    return GalleryFigure("resolution", "Resolution", text, drawn(subject, panels))


def drawn(subject: GallerySubject, panels: list[Panel], bars: list[tuple[str, float]] | None = None) -> Image.Image:
    """Draw a figure as a picture with few colours, so that its file is small."""
    buffer = io.BytesIO()
    figures.figure(subject.seen[1], panels, bars or []).savefig(buffer, format="png", dpi=DPI)
    return Image.open(buffer).convert("RGB").quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE)


def questions(subject: GallerySubject) -> Iterator[GalleryFigure]:
    """Yield the figures of the gallery."""
    for make in (classes, contrast, patches, samples, alphas, resolutions):
        made = make(subject)
        if made is not None:
            yield made


def page(subject: GallerySubject, made: list[tuple[GalleryFigure, Path]], target: Path, command: str) -> str:
    """Return the gallery as Markdown, with links relative to `target`."""
    about = (
        f"One image and the model `{subject.explainer.model_name}`; S = {subject.n_samples} and "
        f"α = {subject.explainer.sampling.noise_alpha} where nothing else is said. Above: the map over the image; "
        f"below: the map alone. Made by `{command}`, which takes your image and your model as well."
    )
    lines = ["# Gallery of one image", "", textwrap.fill(about, WIDTH)]
    for question, path in made:
        link = os.path.relpath(path, target.parent)
        lines += [
            "",
            f"## {question.title}",
            "",
            f"![{question.title}]({link})",
            "",
            textwrap.fill(question.text, WIDTH),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=Path, help="a photograph; the embedded scene")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--n-samples", type=int, default=50)
    parser.add_argument("--converged", type=int, default=800, help="samples of the map that others are compared with")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--page", type=Path, help="OUT/gallery.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("dave_fast").setLevel(logging.ERROR)
    if given.image is None:
        from dave_fast.models.demo import demo_scene

        image = demo_scene().image
    else:
        image = read_image(given.image)
    subject = GallerySubject(
        dave_fast.DAVE(given.model, precision=given.precision), image, given.n_samples, given.converged
    )
    made = []
    for question in questions(subject):
        path = given.out / f"gallery_{question.name}.png"
        with atomically(path) as file:
            question.picture.save(file, format="PNG", optimize=True)
        made.append((question, path))
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    target = given.page or given.out / "gallery.md"
    options = " ".join(f"--{name} {getattr(given, name)}" for name in ("model",) if getattr(given, name) != "demo")
    command = " ".join(filter(None, ["python scripts/gallery.py", str(given.image or ""), options]))
    with atomically(target) as file:
        file.write(page(subject, made, target, command).encode())
    print(target)


if __name__ == "__main__":
    main()
