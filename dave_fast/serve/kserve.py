"""KServe's v2 inference protocol, for clients of Triton or KServe.

The input `image` is BYTES with the base64 of an image file, UINT8 (H, W, 3), or normalised FP32 (1, 3, H, W). Options
are parameters of the request. The outputs are `maps` FP32 (K, H, W), `targets` INT64 (K,) and `error_bounds` FP32 (K,)
with −1 for an unknown bound; K is the number of explained classes. Of L depths maps are (K, L, H, W) and bounds (K, L).
"""

from __future__ import annotations

import base64
import binascii
import time
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from dave_fast._version import __version__
from dave_fast.errors import InputError
from dave_fast.serve.api import Api
from dave_fast.serve.models import ServedModel
from dave_fast.serve.schemas import Options, describe_errors, finite, problems

_TYPES = {"UINT8": np.uint8, "FP32": np.float32, "INT64": np.int64}


class Tensor(BaseModel):
    """A tensor, its data flat in C order."""

    name: Annotated[str, Field(max_length=100)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**20)]], Field(max_length=8)]
    datatype: Literal["BYTES", "UINT8", "FP32", "INT64"]
    data: list[Any]


class InferRequest(BaseModel):
    """An image and its options."""

    id: Annotated[str | None, Field(max_length=100)] = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=1)]
    parameters: dict[str, Any] = {}


class InferResponse(BaseModel):
    """Maps, their classes and error bounds."""

    model_name: str
    id: str | None = None
    parameters: dict[str, Any]
    outputs: list[Tensor]


class Live(BaseModel):
    """Whether the server is alive."""

    live: bool


class Ready(BaseModel):
    """Whether the server or a model is ready."""

    ready: bool


class ServerMetadata(BaseModel):
    """The metadata of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor without its data; −1: any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The metadata of a model."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def router(api: Api, dependencies: list[Any]) -> APIRouter:
    """Return the routes below /v2.

    Args:
        api: the functions of the server.
        dependencies: FastAPI dependencies of the routes about models, such as the check of API keys.
    """
    made = APIRouter(prefix="/v2", tags=["KServe v2"])

    @made.get("")
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata(name="dave-fast", version=__version__, extensions=[])

    @made.get("/health/live")
    async def live() -> Live:
        return Live(live=True)

    @made.get("/health/ready", responses={503: {"model": Ready, "description": "Not ready."}})
    async def ready() -> Any:
        return _ready(api)

    @made.get("/models/{model}", dependencies=dependencies, responses=problems(401, 404))
    async def model_metadata(model: str) -> ModelMetadata:
        height, width = api.model(model).prepare.size
        named = [("maps", "FP32", [-1, height, width]), ("targets", "INT64", [-1]), ("error_bounds", "FP32", [-1])]
        outputs = [TensorMetadata(name=name, datatype=kind, shape=shape) for name, kind, shape in named]
        image = TensorMetadata(name="image", datatype="BYTES", shape=[1])
        return ModelMetadata(name=model, platform="dave_fast", inputs=[image], outputs=outputs)

    @made.get(
        "/models/{model}/ready",
        dependencies=dependencies,
        responses={**problems(401, 404), 503: {"model": Ready, "description": "Not ready."}},
    )
    async def model_ready(model: str) -> Any:
        api.model(model)
        return _ready(api)

    @made.post(
        "/models/{model}/infer",
        dependencies=dependencies,
        responses=problems(400, 401, 404, 413, 422, 429, 500, 503, 504),
    )
    async def infer(request: Request, model: str, body: InferRequest) -> InferResponse:
        return await _infer(api, request, api.model(model), body)

    return made


def _ready(api: Api) -> Any:
    ready = api.service.why_not_ready() is None
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _infer(api: Api, request: Request, model: ServedModel, body: InferRequest) -> InferResponse:
    try:
        options = Options.model_validate({**body.parameters, "model": model.name})
    except ValidationError as error:
        raise HTTPException(422, f"parameters: {describe_errors(error.errors())}") from error
    if options.image is not None:
        raise HTTPException(422, "parameters: image is given; send the image as the input.")
    image, notes = await run_in_threadpool(_image, api, model, body.inputs[0])
    ask = api.make_ask(model, image, options, time.monotonic(), refined=False, notes=notes)
    ended = await api.end(request, model, ask)
    refined = ended.refined
    bounds = [-1.0 if finite(bound) is None else bound for bound in refined.bounds]
    outputs = [
        _output("maps", "FP32", refined.maps.numpy()),
        _output("targets", "INT64", np.array(ended.predicted.targets)),
        _output("error_bounds", "FP32", np.array(bounds, np.float32).reshape(refined.maps.shape[:-2])),
    ]
    parameters: dict[str, Any] = {"samples": refined.samples, "seed": ask.seed, "cut_short": ended.cut_short}
    parameters |= {"shrink": refined.shrink, "depth": ",".join(map(str, ask.depths))}
    parameters |= {"notes": " ".join(notes)} if notes else {}
    return InferResponse(model_name=model.name, id=body.id, parameters=parameters, outputs=outputs)


def _output(name: str, kind: Any, values: np.ndarray) -> Tensor:
    return Tensor(name=name, shape=list(values.shape), datatype=kind, data=values.ravel().tolist())


def _content(given: Tensor) -> bytes:
    """Return the image file in a BYTES input."""
    if len(given.data) != 1 or not isinstance(given.data[0], str):
        raise InputError(f"the BYTES input has {len(given.data)} elements; expected one, an image file in base64.")
    try:
        return base64.b64decode(given.data[0], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the BYTES input is not base64; expected an image file in base64.") from error


def _image(api: Api, model: ServedModel, given: Tensor) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the model's input, (3, H, W) float32, and what had to be assumed about an image file.

    Raises:
        InputError: the tensor has a wrong type, shape or value, or the image cannot be read.
    """
    height, width = model.prepare.size
    if given.datatype == "BYTES":
        return api.prepared(model, _content(given))
    try:
        values = np.array(given.data, _TYPES[given.datatype]).reshape(given.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"the data are not {given.datatype} numbers of the shape {given.shape}.") from error
    if given.datatype == "UINT8" and values.ndim == 3 and values.shape[2] == 3 and values.size:
        if values.shape[0] * values.shape[1] > api.limits.pixels:
            raise InputError(f"the image has more than {api.limits.pixels} pixels.")
        return model.prepare.transform(Image.fromarray(values)), ()
    if given.datatype == "FP32" and values.shape == (1, 3, height, width) and np.isfinite(values).all():
        return torch.from_numpy(values)[0], ()
    raise InputError(
        f"the input is {given.datatype} {given.shape}; expected BYTES, UINT8 (H, W, 3) or finite FP32 "
        f"(1, 3, {height}, {width})."
    )
