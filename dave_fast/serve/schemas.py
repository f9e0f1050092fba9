"""Requests and answers over HTTP as pydantic models, from which the OpenAPI document is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import InputError
from dave_fast.explain.depth import PIXELS, Depth, check_depth, parse_depth
from dave_fast.numbers import parse_number, parse_whole
from dave_fast.serve.models import Asking

MOST_CLASSES = 100
MOST_DEPTHS = 100
MOST_SAMPLES = 65_536

# Of a target.
MOST_LETTERS = 400
Encoding = Literal["float32", "uint8"]
# A depth in an answer: "pixels", the number of a block, a range of blocks such as "5-9".
Place = str | int


def _listed(given: Any) -> Any:
    """Return one depth, as a form or JSON may have it, as a list."""
    return [given] if isinstance(given, str | int | float) else given


def _parsed(parse: Callable[[object, str], float]) -> BeforeValidator:
    """Return a validator that takes a number, or the text of one, by the rules of `dave_fast.numbers`."""
    return BeforeValidator(lambda given: given if given is None else parse(given, "the value"))


# Without it pydantic takes 10.0, True, 1_0 and other scripts' digits for whole numbers.
_Whole = Annotated[int, _parsed(parse_whole)]
_Number = Annotated[float, _parsed(parse_number)]


class Options(BaseModel):
    """Options of an explanation."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str | None, Field(max_length=200, description="A served model; by default the first.")] = None
    image: Annotated[
        str | None,
        Field(max_length=64, description="Instead of a body, the id of an image that was sent to /v1/images."),
    ] = None
    target: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MOST_LETTERS)]],
        Field(
            max_length=MOST_CLASSES,
            description="Classes, by index or name; differences and sums such as 'tiger-lion'; 'text:a cat', "
            "'patch:3,5', 'segment:cat@120,80', 'box:cat@20,40,180,200' of models that can answer them. Several share "
            "their forward passes.",
        ),
    ] = []
    top_k: Annotated[
        _Whole | None, Field(ge=1, le=MOST_CLASSES, description="Instead of targets, the k most probable classes (1).")
    ] = None
    n_samples: Annotated[_Whole, Field(ge=1, le=MOST_SAMPLES, description="The most samples.")] = DEFAULT_SAMPLES
    depth: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)] | StrictInt | StrictFloat],
        BeforeValidator(_listed),
        Field(
            max_length=MOST_DEPTHS,
            description="Where evidence is told: 'pixels', the number of a block, a range such as '5-9', a share of "
            "the depth such as 0.5, 'auto', or several, repeated or with commas between; several share their walks.",
        ),
    ] = [PIXELS]
    seed: Annotated[_Whole, Field(ge=-(2**63), lt=2**63, description="Equal seeds give equal maps.")] = 0
    shrink: Annotated[
        bool | None,
        Field(description="Whether maps are shrunk by the noise left in them; by default as the server was started."),
    ] = None
    tolerance: Annotated[
        _Number | None,
        Field(gt=0, le=10, description="Stop when the relative error of the map is below this, nine times in ten."),
    ] = None
    deadline_ms: Annotated[
        _Whole | None,
        Field(ge=1, le=3_600_000, description="Answer within this time, with the samples done by then."),
    ] = None
    signed: Annotated[
        bool, Field(description="Whether JSON and events have signed maps, too: what speaks for and what against.")
    ] = False
    view: Annotated[
        Literal["overlay", "map", "signed"],
        Field(description="The picture in a PNG: the map over the image, alone, or what speaks for and against."),
    ] = "overlay"
    encoding: Annotated[
        Encoding,
        Field(
            description="Values of a map in JSON and events: in [0, 1], or times 255; of a signed map in [-1, 1], or "
            "times 32767 as int16."
        ),
    ] = "float32"

    @property
    def depths(self) -> tuple[Depth, ...]:
        """The depths that are asked for; raises InputError for what is none, and for too many."""
        found: list[Depth] = []
        for given in self.depth:
            parsed = parse_depth(given) if isinstance(given, str) else given
            found += parsed if isinstance(parsed, list) else [parsed]
        if len(found) > MOST_DEPTHS:
            raise InputError(f"{len(found)} depths are requested; at most {MOST_DEPTHS} are explained at once.")
        return check_depth(found)


class Array(BaseModel):
    """An array: base64 of its bytes, little-endian, in C order."""

    dtype: Encoding | Literal["int16"]
    shape: list[int]
    data: str


class ClassProbability(BaseModel):
    """A class and the model's probability for the unperturbed image (null: the model has no probabilities).

    Of another question target is -1, class_name the question in words, and probability null.
    """

    target: int
    class_name: str
    probability: float | None


class DepthMap(BaseModel):
    """A map in [0, 1] at one depth, its estimated relative error, and its bound nine times in ten (null: unknown).

    signed is what speaks for (above zero) and against, blended with its blur as the map is and divided by its largest
    magnitude; null where it was not asked for.
    """

    depth: Place
    error: float | None
    error_bound: float | None
    map: Array
    signed: Array | None


class ClassMap(ClassProbability):
    """A map in [0, 1], its estimated relative error, and the bound of the error nine times in ten (null: unknown).

    Of several depths map and signed are null, depths has them, and errors are the largest. signed as in DepthMap.
    """

    error: float | None
    error_bound: float | None
    map: Array | None
    signed: Array | None
    depths: list[DepthMap] | None = None


class Account(BaseModel):
    """What each depth accounts for of the score of a class, for its unperturbed image.

    The score is, for every block, patches + prefix + biases: the evidence of the patches that enter it, that of other
    tokens there, and what the biases behind contribute.
    """

    target: int
    score: float
    pixels: float
    patches: list[float]
    prefix: list[float]
    biases: list[float]


class Prediction(BaseModel):
    """The model's prediction: the event `prediction`. class_names are those of targets, of which -1 are no classes."""

    model: str
    targets: list[int]
    class_names: list[str]
    top: list[ClassProbability]
    accounts: list[Account] | None


class Maps(BaseModel):
    """Maps of the first samples: the event `maps`. shrink says whether they are shrunk by the noise left in them.

    depth is "pixels", the number of a block or a range of blocks, or for several depths a list of them.
    """

    samples: int
    n_samples: int
    shrink: bool
    depth: Place | list[Place]
    error: float | None
    error_bound: float | None
    maps: list[ClassMap]


class Answer(Maps):
    """An explanation: the JSON answer, and the event `done`.

    cut_short is null if all samples were used, else what ended it: tolerance, deadline or shutdown. notes say what had
    to be assumed about the image file, such as which of its samples is white.
    """

    model: str
    seed: int
    cut_short: Literal["tolerance", "deadline", "shutdown"] | None
    queue_ms: float
    total_ms: float
    top: list[ClassProbability]
    accounts: list[Account] | None
    notes: list[str]


class StoredImage(BaseModel):
    """An image that is stored for a limited time."""

    image: str
    width: int
    height: int
    expires_in_s: float


class ModelInfo(BaseModel):
    """A served model."""

    name: str
    height: int
    width: int
    classes: int
    class_names: list[str] | None
    questions: Annotated[list[Asking], Field(description="What may be asked: classes, texts, patches.")]
    grid: Annotated[list[int] | None, Field(description="Rows and columns of the patches that may be asked about.")]
    precision: Annotated[str, Field(description="fp64, fp32, bf16, fp8 or int8.")]
    route: str
    noise_alpha: float
    shrink: bool
    blocks: Annotated[int, Field(description="Blocks whose tokens can be explained; 0: pixels alone.")]


class Health(BaseModel):
    """Whether the server is alive or ready, and why it is not."""

    status: Literal["ok", "not ready"]
    reason: str | None = None


class Problem(BaseModel):
    """An error: what was wrong and what to do."""

    detail: str


def finite(value: float) -> float | None:
    """Return a number as JSON can express it: None if it is not finite."""
    return value if math.isfinite(value) else None


def describe_errors(errors: Sequence[Any], *, skip: int = 0) -> str:
    """Return pydantic's errors as text for a message, at most 1000 characters.

    Args:
        errors: what `ValidationError.errors()` returns.
        skip: how many parts of each location are left out: 1 for "query" or "body" of a request.
    """
    texts = [f"{'.'.join(map(str, e['loc'][skip:] or e['loc'])) or 'request'}: {e['msg']}" for e in errors]
    # JSON may name an option by half a surrogate pair, which no answer can be encoded with
    return "; ".join(texts)[:1000].encode("utf-8", "backslashreplace").decode()


_PROBLEMS = {
    400: "The image or form cannot be read.",
    401: "An API key is needed.",
    404: "No such model or stored image.",
    406: "No format in Accept is supported.",
    408: "The upload was too slow.",
    413: "Too large: the body, the image, or what the request needs.",
    415: "The body is not an image.",
    422: "An option is invalid.",
    429: "The queue is full; see Retry-After.",
    500: "The explanation failed.",
    503: "Shutting down, or too many uploads; see Retry-After.",
    504: "No sample was done at the deadline.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documented errors of a route."""
    return {status: {"model": Problem, "description": _PROBLEMS[status]} for status in statuses}
