"""The README's figure: a photograph, and beside it the map of each target over it.

    python scripts/photograph.py PHOTO --model MODEL --target raccoon --target "raccoon-lesser panda"

MODEL and the targets are those that `dave-fast explain` takes; `hf:./folder` is a fine-tuned model.
"""

import argparse
from pathlib import Path

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from dave_fast.explain.subject import Subject
from dave_fast.files import atomically
from dave_fast.images import drawing, read_image
from dave_fast.targets.text import describe_target, parse_target

FIGURE = Path(__file__).resolve().parents[1] / "docs/figures/photograph.jpg"
# pixels
HEADING, GAP, POINTS = 34, 8, 22
QUALITY = 88


def strip(panels: dict[str, Image.Image]) -> Image.Image:
    """Return pictures of one size side by side, each under its name."""
    width, height = next(iter(panels.values())).size
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, HEADING + height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(findfont("DejaVu Sans"), POINTS)
    for column, (name, picture) in enumerate(panels.items()):
        left = column * (width + GAP)
        sheet.paste(picture, (left, HEADING))
        draw.text((left + width // 2, HEADING // 2), name, fill="black", font=font, anchor="mm")
    return sheet


def main() -> None:
    """Explain the photograph and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--n-samples", type=int, default=200)
    parser.add_argument("--noise-alpha", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=FIGURE)
    given = parser.parse_args()
    explainer, prepare, labels = Subject.load(given.model, precision="fp32", noise_alpha=given.noise_alpha)
    targets = [parse_target(text, labels) for text in given.target]
    image, crop = prepare(read_image(given.photo))
    found = explainer.explain(image, targets=targets, n_samples=given.n_samples)
    panels = {"photograph": Image.fromarray(drawing.photograph_of(crop))}
    for target, heat, probability in zip(targets, found.maps[0].numpy(), found.probability[0].tolist(), strict=True):
        name = describe_target(target, labels)
        print(f"{name}: probability {probability:.3f}")
        panels[name] = drawing.overlay(crop, heat)
    with atomically(given.out) as file:
        strip(panels).save(file, format="JPEG", quality=QUALITY, optimize=True)
    print(f"{given.out}: {given.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
