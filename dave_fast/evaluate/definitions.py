"""A sentence for each metric, shared by the page, the Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Collection

from dave_fast.evaluate.methods import AT_PIXELS, SMOOTHGRAD_SHARE, MethodSettings
from dave_fast.evaluate.packages import GAMMAS
from dave_fast.evaluate.settings import EvaluationSettings
from dave_fast.explain.depth import PIXELS, name_of

SHORT = {
    "EnergyPG": "share of the positive attribution inside the object",
    "pointing game": "share of images whose maximum lies inside the object",
    "GridPG 2x2": "share of the positive attribution in the right cell of a 2×2 mosaic; chance is 0.25",
    "GridPG 3x3": "the same for 3×3; chance is 0.111",
    "GridPG 2x2-rescaled": "2×2, tiles shrunk so that the mosaic has the model's size; chance is 0.25",
    "GridPG 3x3-rescaled": "3×3, tiles shrunk; chance is 0.111",
    "two objects": "two objects in an image: share on the explained one",
    "wrong object": "share on the same object when the other one is explained; low for maps that follow their class",
    "stability": "correlation of the map with that of the image under small noise, same seed",
    "class similarity": "correlation with the map of the likeliest other class; low where maps follow their class",
    "random model": "mean rank correlation with the maps of ever more randomised copies of the model; should be low",
    "border excess": "how much stronger |attribution| is beside borders between patches than elsewhere; 0: no grid",
    "dave curve": "probability while the least important pixels are blurred away, up to 90 %: should stay high",
    "rise-deletion curve": "probability while the most important pixels are removed: should fall fast",
    "rise-insertion curve": "probability while the most important pixels come back into a blur: should rise fast",
    "quantus curve": "probability while the most important channel values become the image's minimum: should fall",
}


PACKAGES = {
    "Libra FullGrad+": "input × frozen gradient of every block and of every bias, a map of patches, enlarged",
    "LeGrad": "torchcam's, of all blocks, its map of patches enlarged bilinearly; positive, and not ⊙ input",
    "AttnLRP": f"LXT's rules for ViT, attention probabilities constant, with γ = {GAMMAS[0]:g} on the patch embedding "
    f"and {GAMMAS[1]:g} on linear layers, not tuned; without γ it is the frozen gradient",
}


def definitions(settings: EvaluationSettings, setup: MethodSettings, ran: Collection[str]) -> list[tuple[str, str]]:
    """Return pairs (term, explanation) for a run with these settings, `ran` being the methods that ran."""
    spread = SMOOTHGRAD_SHARE * setup.spread
    shrunk = setup.explainer.get("shrink")
    where = f"the tokens that enter {name_of(setup.depth)}"
    deep = "" if setup.depth == PIXELS else f", of {where}; “{AT_PIXELS}” is its map of the pixels"
    alike = "; DAVE's map is shrunk first, no other is" if shrunk else ", alike for every method"
    return [
        ("explained", "the label of an image, or the predicted class where no label is known"),
        (
            "methods",
            f"DAVE with S = {setup.n_samples}{', shrunk' if shrunk else ''}{deep}. The frozen gradient is a single "
            f"unperturbed sample of it. Integrated gradients ({setup.n_samples} steps from 0) and SmoothGrad "
            f"({setup.n_samples} samples, σ = {spread:.3g}, 15 % of the input's range) are captum's, as is input × "
            "gradient. All are ⊙ input. |x| and uniform are controls.",
        ),
        *((name, text) for name, text in PACKAGES.items() if name in ran),
        (
            "maps",
            f"as it is: the signed sum over channels; smoothed: behind DAVE's own post-processing{alike}. Only "
            "positive values count in the pointing games; curves rank signed values.",
        ),
        (
            "GridPG",
            f"mosaics of images of different classes that the model names rightly with p ≥ {settings.confident:g}, "
            "explained for every cell's class; tiles keep their pixels and the position embedding is resampled, unless "
            "rescaled; an interval draws whole mosaics",
        ),
        (
            "curves",
            f"the first {settings.probes} images that the model names rightly (where labels are known) with "
            f"p ≥ {settings.confident:g}; about {settings.curve_steps} points; the number is the mean along the curve",
        ),
        (
            "stability",
            f"noise of σ = {settings.stability_sigma:g} on the normalised image",
        ),
        (
            "randomisation",
            f"cascading from the head to the patch embedding; each parameter gets normal values of its own mean and "
            f"standard deviation; the first {settings.randomised} images",
        ),
        (
            "undefined",
            "a map without positive values scores 0 in pointing games; images without object are left out",
        ),
        ("ties", "several maxima count by the share of them inside; equal values change in a fixed scattered order"),
    ]
