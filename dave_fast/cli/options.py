"""The options that commands share: which model, how it is sampled, where it is computed.

An option is an alias of an annotated type: a command's parameter of that type has its name, help and panel.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dave_fast.errors import InputError

if TYPE_CHECKING:
    from dave_fast.cli.config import Config
    from dave_fast.models.spec import ModelSpec

DEFAULT_MODEL = "deit3_base_patch16_224.fb_in1k"
MODEL, METHOD, MACHINE = "Model", "Method", "Machine"
NAMES = "timm's name, 'demo', hf:ORG/NAME, hf:FOLDER, torchvision:NAME, open_clip:NAME:TAG or MODULE:FUNCTION."

Model = Annotated[
    str | None, typer.Option("--model", help=NAMES, show_default=DEFAULT_MODEL, rich_help_panel=MODEL, metavar="NAME")
]
ModelOrDemo = Annotated[
    str | None, typer.Option("--model", help=NAMES, show_default="demo", rich_help_panel=MODEL, metavar="NAME")
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="A file of weights: safetensors, or torch's of tensors.", rich_help_panel=MODEL),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        "--num-classes", min=1, help="Of --weights.", show_default="the architecture's", rich_help_panel=MODEL
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
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Settings that `dave-fast tune` wrote.", rich_help_panel=MODEL)
]
Samples = Annotated[
    int | None,
    typer.Option("--n-samples", min=1, help="Perturbed samples an image.", show_default="50", rich_help_panel=METHOD),
]
Seed = Annotated[int, typer.Option("--seed", help="Equal seeds give equal maps.", rich_help_panel=METHOD)]
NoiseAlpha = Annotated[
    float | None,
    typer.Option("--noise-alpha", help="The highest noise level.", show_default="by model", rich_help_panel=METHOD),
]
Schedule = Annotated[
    str,
    typer.Option("--schedule", metavar="sequence|paper", help="How noise levels are spread.", rich_help_panel=METHOD),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda|...", show_default="best there is", rich_help_panel=MACHINE),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", metavar="fp64|fp32|bf16|fp8", show_default="by device", rich_help_panel=MACHINE),
]
Backend = Annotated[str, typer.Option("--backend", help="See `dave-fast info`.", rich_help_panel=MACHINE)]
Route = Annotated[str, typer.Option("--route", metavar="auto|engine|frozen", rich_help_panel=MACHINE)]
InternalBatchSize = Annotated[
    int | None,
    typer.Option(
        "--internal-batch-size", min=1, help="Samples at a time.", show_default="what fits", rich_help_panel=MACHINE
    ),
]


def model_spec(
    model: str | None,
    weights: Path | None,
    num_classes: int | None,
    labels: Path | None,
    image_size: int | None,
    *,
    config: Config | None = None,
    default: str = "demo",
    random_weights: bool = False,
) -> ModelSpec:
    """The model that the options and a configuration file name together; what is given comes before the file.

    What the file says of its model's weights and classes goes with that model alone. Raises InputError.
    """
    from dave_fast.models.spec import ModelSpec

    same = config is not None and model in (None, config.model)
    known = config if config is not None and same else None
    if weights is not None and not weights.is_file():
        raise InputError(f"--weights: there is no file {weights}.")
    if labels is not None and not labels.is_file():
        raise InputError(f"--labels: there is no file {labels}.")
    # workers may have other working directories
    file = str(weights.resolve()) if weights else known.weights if known and not random_weights else None
    names = str(labels.resolve()) if labels else known.labels if known else None
    classes = num_classes or (known.num_classes if known else None)
    size = image_size or (known.image_size if known else None)
    return ModelSpec(model or (known.model if known else None) or default, file, classes, names, size, random_weights)
