"""The formats of an answer: JSON, server-sent events, pictures and arrays."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from dave_fast.explain.arrays import arrays_of
from dave_fast.explain.convergence import Refined
from dave_fast.explain.pictures import Scored
from dave_fast.images import drawing
from dave_fast.ops.smooth import signed_map
from dave_fast.serve.jobs import Ask, Ended, Predicted
from dave_fast.serve.models import ServedModel
from dave_fast.serve.schemas import (
    Account,
    Answer,
    Array,
    ClassMap,
    ClassProbability,
    DepthMap,
    Encoding,
    Maps,
    Prediction,
    finite,
)
from dave_fast.targets import Question
from dave_fast.targets.text import describe_target

JSON, PNG, NPY, NPZ = "application/json", "image/png", "application/x-npy", "application/x-npz"
TYPES = (JSON, PNG, NPY, NPZ)
# How many of the most probable classes are in every answer.
TOP = 5


def negotiate(accept: str | None) -> str | None:
    """Return the media type of the answer by the Accept header; JSON if any type is accepted, None if no type fits."""
    best, weight = None, 0.0
    for item in (accept or "*/*").split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        found = JSON if name in ("*/*", "application/*") else PNG if name == "image/*" else name
        quality = next((_number(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if found in TYPES and quality > weight:
            best, weight = found, quality
    return best


def _number(text: str) -> float:
    """Return a weight as a number, 0 if it is malformed."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def array(values: Tensor, encoding: Encoding, *, signed: bool = False) -> Array:
    """Return a map (H, W) in [0, 1] for JSON, or a signed one in [−1, 1]."""
    numbers, kind = values.numpy().astype("<f4"), "int16" if signed and encoding == "uint8" else encoding
    if kind != "float32":
        numbers = np.rint(numbers * (255 if kind == "uint8" else 32767)).astype(np.dtype(kind).newbyteorder("<"))
    return Array(dtype=kind, shape=list(values.shape), data=base64.b64encode(numbers.tobytes()).decode())


def signed_maps(refined: Refined) -> Tensor:
    """Return maps with two signs, of the shape of maps, in [−1, 1]."""
    assert refined.signed is not None
    return signed_map(refined.signed)


def prediction(model: ServedModel, predicted: Predicted) -> Prediction:
    """Return the model's prediction for JSON."""
    names = [describe_target(target, model.labels) for target in predicted.targets]
    top, accounts = _top(model, predicted), _accounts(predicted)
    return Prediction(model=model.name, targets=predicted.indices, class_names=names, top=top, accounts=accounts)


def _accounts(predicted: Predicted) -> list[Account] | None:
    """Return what each depth accounts for, class by class."""
    told = predicted.accounts
    if told is None:
        return None
    columns = (told.score, told.pixels, told.patches, told.prefix, told.biases)
    rows = zip(predicted.indices, *(column.tolist() for column in columns), strict=True)
    return [Account(**dict(zip(Account.model_fields, row, strict=True))) for row in rows]


def _top(model: ServedModel, predicted: Predicted) -> list[ClassProbability]:
    top = predicted.scores.topk(min(TOP, model.classes)).indices.tolist()
    return [_probability(model, predicted, target) for target in top]


def _probability(model: ServedModel, predicted: Predicted, target: int | Question) -> ClassProbability:
    name = describe_target(target, model.labels)
    if not isinstance(target, int):
        return ClassProbability(target=-1, class_name=name, probability=None)
    return ClassProbability(target=target, class_name=name, probability=finite(float(predicted.probabilities[target])))


def _scored(found: Sequence[ClassProbability]) -> list[Scored]:
    """Return classes as `.npz` files hold them: without a probability it is NaN."""
    return [(one.target, one.class_name, math.nan if one.probability is None else one.probability) for one in found]


def maps(model: ServedModel, ask: Ask, predicted: Predicted, refined: Refined, encoding: Encoding) -> Maps:
    """Return maps and their errors for JSON."""
    each, signed = [], signed_maps(refined) if ask.signed else None
    for number, target in enumerate(predicted.targets):
        several = slice(number * len(ask.depths), (number + 1) * len(ask.depths))
        errors, bounds = refined.errors[several], refined.bounds[several]
        size = refined.maps.shape[-2:]
        arrays = [array(values, encoding) for values in refined.maps[number].view(-1, *size)]
        both: list[Array | None] = [None] * len(arrays)
        if signed is not None:
            both = [array(values, encoding, signed=True) for values in signed[number].view(-1, *size)]
        depths = [
            DepthMap(depth=depth, error=finite(error), error_bound=finite(bound), map=values, signed=two)
            for depth, error, bound, values, two in zip(ask.depths, errors, bounds, arrays, both, strict=True)
        ]
        each.append(
            ClassMap(
                **_probability(model, predicted, target).model_dump(),
                error=finite(max(errors)),
                error_bound=finite(max(bounds)),
                map=arrays[0] if len(depths) == 1 else None,
                signed=both[0] if len(depths) == 1 else None,
                depths=None if len(depths) == 1 else depths,
            )
        )
    return Maps(
        samples=refined.samples,
        n_samples=ask.n_samples,
        shrink=refined.shrink,
        depth=list(ask.depths) if len(ask.depths) > 1 else ask.depths[0],
        error=finite(max(refined.errors)),
        error_bound=finite(refined.bound),
        maps=each,
    )


def answer(model: ServedModel, ask: Ask, ended: Ended, encoding: Encoding) -> Answer:
    """Return an answer for JSON."""
    return Answer(
        **dict(maps(model, ask, ended.predicted, ended.refined, encoding)),
        model=model.name,
        seed=ask.seed,
        cut_short=ended.cut_short,  # type: ignore[arg-type]
        queue_ms=round(1000 * ended.queue_seconds, 3),
        total_ms=round(1000 * ended.seconds, 3),
        top=_top(model, ended.predicted),
        accounts=_accounts(ended.predicted),
        notes=list(ask.notes),
    )


def headers(model: ServedModel, ask: Ask, ended: Ended) -> dict[str, str]:
    """Return the numbers of an answer as headers, for formats that cannot hold them."""
    refined = ended.refined
    values = {
        "model": model.name,
        "targets": ",".join(map(str, ended.predicted.indices)),
        "samples": refined.samples,
        "n-samples": ask.n_samples,
        "seed": ask.seed,
        "shrink": str(refined.shrink).lower(),
        "depth": ",".join(map(str, ask.depths)),
        "error": f"{max(refined.errors):.6g}",
        "error-bound": f"{refined.bound:.6g}",
        "cut-short": ended.cut_short or "no",
        "queue-ms": f"{1000 * ended.queue_seconds:.3f}",
        "total-ms": f"{1000 * ended.seconds:.3f}",
    }
    values |= {"notes": " ".join(ask.notes)} if ask.notes else {}
    return {f"x-dave-{name}": str(value).encode("ascii", "replace").decode() for name, value in values.items()}


def picture(model: ServedModel, ask: Ask, refined: Refined, view: str) -> bytes:
    """Return a PNG of the classes side by side, of several depths one below the other.

    They are drawn over the crop if `view` is "overlay", in two colours if it is "signed", else as plain maps.
    """
    crop = model.prepare.pixels(ask.image).cpu().numpy()
    draw: dict[str, Callable[[np.ndarray], Image.Image]] = {
        "overlay": partial(drawing.overlay, crop),
        "signed": partial(drawing.overlay, crop, signed=True),
        "map": drawing.plain_map,
    }

    def drawn(heat: np.ndarray) -> np.ndarray:
        return np.asarray(draw[view](heat))

    maps = signed_maps(refined) if view == "signed" else refined.maps
    classes = maps.view(len(maps), -1, *maps.shape[-2:]).numpy()
    columns = [np.concatenate([drawn(heat) for heat in depths]) for depths in classes]
    return png(Image.fromarray(np.concatenate(columns, axis=1)))


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    return _written(partial(image.save, format="PNG"))


def _written(write: Callable[[IO[bytes]], object]) -> bytes:
    """Return what a function writes to a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _write_npz(file: IO[bytes], model: ServedModel, ask: Ask, ended: Ended) -> None:
    """Write the .npz file of an answer; its arrays are those of `dave_fast.explain.arrays`."""
    refined, predicted = ended.refined, ended.predicted
    errors, bounds = (np.reshape(each, refined.maps.shape[:-2]).tolist() for each in (refined.errors, refined.bounds))
    explained = [_probability(model, predicted, target) for target in predicted.targets]
    arrays = arrays_of(
        maps=refined.maps,
        raw=refined.raw,
        crop=model.prepare.pixels(ask.image).cpu().numpy(),
        targets=_scored(explained),
        top=_scored(_top(model, predicted)),
        samples=refined.samples,
        n_samples=ask.n_samples,
        seed=ask.seed,
        shrink=refined.shrink,
        model=model.name,
        precision=model.explainers[0].precision,
        noise_alpha=model.explainers[0].sampling.noise_alpha,
        depths=ask.depths,
        errors=errors,
        error_bounds=bounds,
    )
    np.savez_compressed(file, **arrays)


def encode(kind: str, model: ServedModel, ask: Ask, ended: Ended, view: str, encoding: Encoding) -> bytes:
    """Return an answer as the media type `kind`; `view` is for PNG and `encoding` for JSON."""
    if kind == PNG:
        return picture(model, ask, ended.refined, view)
    if kind == NPY:
        return _written(lambda file: np.save(file, ended.refined.maps.numpy()))
    if kind == NPZ:
        return _written(lambda file: _write_npz(file, model, ask, ended))
    return answer(model, ask, ended, encoding).model_dump_json().encode()


def event(name: str, content: BaseModel | Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    data = content.model_dump_json() if isinstance(content, BaseModel) else json.dumps(content)
    return f"event: {name}\ndata: {data}\n\n".encode()
