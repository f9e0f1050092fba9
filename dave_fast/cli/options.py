"""The options that several commands have: the model, its sampling, the machine.

An option is an annotated type: a parameter of that type is given the option's name, help and panel by typer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dave_fast.defaults import DEFAULT_MODEL, DEFAULT_SAMPLES, DEFAULT_SHRINK
from dave_fast.errors import InputError

if TYPE_CHECKING:
    from dave_fast.cli.config import Config
    from dave_fast.explain import depth as explain_depth
    from dave_fast.models.spec import ModelSpec

MODEL, METHOD, MACHINE = "Model", "Method", "Machine"
NAMES = "timm's name, 'demo', hf:ORG/NAME, hf:FOLDER, torchvision:NAME, open_clip:NAME:TAG or MODULE:FUNCTION."

DEMO_ALONE = "no images are given: the embedded scenes, and the embedded model"

Model = Annotated[
    str | None, typer.Option("--model", help=NAMES, show_default=DEFAULT_MODEL, rich_help_panel=MODEL, metavar="NAME")
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="A state dict, saved as safetensors or by torch.save.", rich_help_panel=MODEL),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        "--num-classes",
        min=1,
        help="Number of classes of --weights.",
        show_default="the architecture's",
        rich_help_panel=MODEL,
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="Class names: a file with one a line, or JSON.", show_default="its own", rich_help_panel=MODEL
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        min=1,
        help="Pixels a side, for timm's and transformers' models.",
        show_default="the model's",
        rich_help_panel=MODEL,
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        "--link",
        metavar="softmax|sigmoid|none",
        help="How logits become probabilities; sigmoid for several labels.",
        show_default="the model's",
        rich_help_panel=MODEL,
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Fresh weights, to try speed and pictures of an architecture: the maps mean nothing.",
        rich_help_panel=MODEL,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A file of settings from `dave-fast tune`.", rich_help_panel=MODEL)
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--n-samples",
        min=1,
        help="Perturbed samples an image.",
        show_default=str(DEFAULT_SAMPLES),
        rich_help_panel=METHOD,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Seed of the perturbations; equal seeds give equal maps.", rich_help_panel=METHOD),
]
NoiseAlpha = Annotated[
    float | None,
    typer.Option("--noise-alpha", help="The highest noise level.", show_default="by model", rich_help_panel=METHOD),
]
Shrink = Annotated[
    bool | None,
    typer.Option(
        "--shrink/--no-shrink",
        help="Whether maps are shrunk by the noise left in them; without, they are the paper's.",
        show_default="shrink" if DEFAULT_SHRINK else "no-shrink",
        rich_help_panel=METHOD,
    ),
]
Schedule = Annotated[
    str,
    typer.Option("--schedule", metavar="sequence|paper", help="How noise levels are spread.", rich_help_panel=METHOD),
]
_DEPTH = "Where in the model evidence is told: at the pixels, or at the tokens that enter a block or lie at a share"
Depth = Annotated[
    str,
    typer.Option("--depth", metavar="pixels|auto|6|5-9|0.5", help=f"{_DEPTH} of its depth.", rich_help_panel=METHOD),
]
Depths = Annotated[
    str,
    typer.Option(
        "--depth",
        metavar="pixels|auto|6|5-9|0.5|…,…",
        help=f"{_DEPTH} of its depth; several with commas between.",
        rich_help_panel=METHOD,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda|...", show_default="best there is", rich_help_panel=MACHINE),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="fp64|fp32|bf16|fp8|int8",
        help="`dave-fast info` says which this device has.",
        show_default="by device",
        rich_help_panel=MACHINE,
    ),
]
Backend = Annotated[str, typer.Option("--backend", help="See `dave-fast info`.", rich_help_panel=MACHINE)]
Route = Annotated[str, typer.Option("--route", metavar="auto|engine|frozen", rich_help_panel=MACHINE)]
InternalBatchSize = Annotated[
    int | None,
    typer.Option(
        "--internal-batch-size",
        min=1,
        help="Rows of a micro-batch.",
        show_default="what fits",
        rich_help_panel=MACHINE,
    ),
]
MaxMegabytes = Annotated[
    float,
    typer.Option(
        "--max-megabytes", min=0.001, help="Of an image's file; a larger one is an error.", rich_help_panel=MACHINE
    ),
]
MaxMegapixels = Annotated[
    float,
    typer.Option("--max-megapixels", min=0.001, help="Of an image; a larger one is an error.", rich_help_panel=MACHINE),
]


def one_depth(text: str) -> explain_depth.Depth:
    """Return the depth of --depth for a command that takes one.

    Raises:
        InputError: the text names none, or several.
    """
    from dave_fast.explain.depth import parse_depth

    depth = parse_depth(text)
    if isinstance(depth, list):
        raise InputError(f"--depth is {text!r}: expected one depth here; run the command once for each of them.")
    return depth


def read_config(path: Path | None) -> Config:
    """Read the file of --config; without one, nothing is set."""
    from dave_fast.cli.config import Config, load_config

    return Config() if path is None else load_config(path)


def method(
    n_samples: int | None, noise_alpha: float | None, shrink: bool | None, *, config: Config
) -> tuple[int, dict[str, Any]]:
    """Return the number of samples, and the keywords of `DAVE` for noise level and shrinkage.

    The command line comes before the configuration. A noise level of None leaves the choice to the model.
    """
    settings = {
        "noise_alpha": config.noise_alpha if noise_alpha is None else noise_alpha,
        "shrink": next(given for given in (shrink, config.shrink, DEFAULT_SHRINK) if given is not None),
    }
    return n_samples or config.n_samples or DEFAULT_SAMPLES, settings


@dataclass(frozen=True)
class ModelOptions:
    """The options that name a model; a command that has a parameter of this type has all of them.

    Attributes:
        model: of --model.
        weights: of --weights.
        num_classes: of --num-classes.
        labels: of --labels.
        image_size: of --image-size.
        link: of --link.
    """

    model: Model = None
    weights: Weights = None
    num_classes: NumClasses = None
    labels: ClassNames = None
    image_size: ImageSize = None
    link: Link = None

    def spec(
        self, config: Config | None = None, *, default: str = DEFAULT_MODEL, random_weights: bool = False
    ) -> ModelSpec:
        """Return the model that the options and a configuration name; the command line comes before the configuration.

        The configuration's weights, classes, size and link belong to its own model: where another is named they are
        ignored.

        Args:
            config: the configuration, or None.
            default: the model where neither names one.
            random_weights: whether the weights are random; those of the configuration are ignored then.

        Raises:
            InputError: there is no such file, or the options contradict each other.
        """
        from dave_fast.cli.config import Config
        from dave_fast.models.spec import ModelSpec

        known = config if config is not None and self.model in (None, config.model) else Config()
        for option, path in (("--weights", self.weights), ("--labels", self.labels)):
            if path is not None and not path.is_file():
                raise InputError(f"{option}: there is no file {path}.")
        # Workers may have other working directories.
        file = str(self.weights.resolve()) if self.weights else None if random_weights else known.weights
        names = str(self.labels.resolve()) if self.labels else known.labels
        classes, size = self.num_classes or known.num_classes, self.image_size or known.image_size
        link = self.link or known.link
        return ModelSpec(self.model or known.model or default, file, classes, names, size, random_weights, link)
