"""KServe's v2 inference protocol, for clients of Triton or KServe.

The input `image` is BYTES with the base64 of an image file, UINT8 (H, W, 3), or normalised FP32 (1, 3, H, W). Options
are parameters of the request. The outputs are `maps` FP32 (K, H, W), `targets` INT64 (K,) and `error_bounds` FP32 (K,)
with −1 for an unknown bound; K is the number of explained classes, −1 in `targets` for another question. Of L depths
maps are (K, L, H, W) and bounds (K, L). With the parameter `signed`, `signed` has signed maps in [−1, 1], as maps.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from dave_fast._version import __version__
from dave_fast.errors import InputError
from dave_fast.serve.api import Api, deadline_of
from dave_fast.serve.formats import signed_maps
from dave_fast.serve.jobs import Ask, Ended
from dave_fast.serve.models import ServedModel
from dave_fast.serve.schemas import Options, describe_errors, finite, problems
from dave_fast.serve.untrusted import TYPES

# Numbers that are written at a time.
_PIECE = 4096
# of a normalised pixel; numbers far beyond overflow in models, whose fault it is not
_LARGEST = 1e6


class Input(BaseModel):
    """A tensor without its data."""

    name: Annotated[str, Field(max_length=100)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**20)]], Field(max_length=8)]
    datatype: Literal["BYTES", "UINT8", "FP32"]


class Tensor(Input):
    """A tensor, its data flat in C order."""

    datatype: Literal["BYTES", "UINT8", "FP32", "INT64"]  # type: ignore[assignment]
    data: list[Any]


class InferRequest(BaseModel):
    """An image and its options."""

    id: Annotated[str | None, Field(max_length=100)] = None
    inputs: Annotated[list[Input], Field(min_length=1, max_length=1)]
    parameters: dict[str, Any] = {}


# Its schema: here the tensor has its data, which is no longer there when the rest is validated.
_REQUEST = InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
_REQUEST.pop("$defs")
_REQUEST["properties"]["inputs"]["items"] = {"$ref": "#/components/schemas/Tensor"}


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
        responses={200: {"model": InferResponse}, **problems(400, 401, 404, 413, 422, 429, 500, 503, 504)},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _REQUEST}}}},
    )
    async def infer(request: Request, model: str) -> Response:
        return await _infer(api, request, api.model(model))

    return made


def _ready(api: Api) -> Any:
    ready = api.service.why_not_ready() is None
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _infer(api: Api, request: Request, model: ServedModel) -> Response:
    share = request.state.share
    told, data = await api.workshop.run("infer", await request.body(), share)
    try:
        body = InferRequest.model_validate(told["request"])
        options = Options.model_validate({**body.parameters, "model": model.name})
    except ValidationError as error:
        raise HTTPException(422, describe_errors(error.errors())) from error
    if options.image is not None:
        raise HTTPException(422, "parameters: image is given; send the image as the input.")
    read = partial(_image, api, request, model, body.inputs[0], data, options)
    ask = await api.make_ask(request, model, read, options, refined=False)
    ended = await api.end(request, model, ask)
    return Response(await run_in_threadpool(_response, model, ask, ended, body.id), media_type="application/json")


def _response(model: ServedModel, ask: Ask, ended: Ended, name: str | None) -> bytes:
    """Return the answer as JSON. Numbers are written in pieces, between which other threads have their turn."""
    refined = ended.refined
    bounds = [-1.0 if finite(bound) is None else bound for bound in refined.bounds]
    parameters: dict[str, Any] = {"samples": refined.samples, "seed": ask.seed, "cut_short": ended.cut_short}
    parameters |= {"shrink": refined.shrink, "depth": ",".join(map(str, ask.depths))}
    parameters |= {"notes": " ".join(ask.notes)} if ask.notes else {}
    signed = [_output("signed", "FP32", signed_maps(refined).numpy())] if ask.signed else []
    outputs = [
        _output("maps", "FP32", refined.maps.numpy()),
        _output("targets", "INT64", np.array(ended.predicted.indices)),
        _output("error_bounds", "FP32", np.array(bounds, np.float32).reshape(refined.maps.shape[:-2])),
        *signed,
    ]
    head = {"model_name": model.name, "id": name, "parameters": parameters}
    return b'%s,"outputs":[%s]}' % (json.dumps(head).encode()[:-1], b",".join(outputs))


def _output(name: str, kind: str, values: np.ndarray) -> bytes:
    """Return a tensor as JSON."""
    head = json.dumps({"name": name, "shape": values.shape, "datatype": kind}).encode()
    flat = values.ravel()
    pieces = (json.dumps(flat[start : start + _PIECE].tolist())[1:-1].encode() for start in range(0, len(flat), _PIECE))
    return b'%s,"data":[%s]}' % (head[:-1], b",".join(pieces))


async def _image(
    api: Api, request: Request, model: ServedModel, given: Input, data: bytes, options: Options
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the model's input, (3, H, W) float32, and what had to be assumed about an image file.

    Raises:
        InputError: the tensor has a wrong type, shape or value, or the image cannot be read.
    """
    height, width = model.prepare.size
    if given.datatype == "BYTES":
        return await api.prepared(request, model, data, deadline_of(request, options))
    values = np.frombuffer(bytearray(data), TYPES[given.datatype]).reshape(given.shape)
    if given.datatype == "UINT8" and values.ndim == 3 and values.shape[2] == 3 and values.size:
        if values.shape[0] * values.shape[1] > api.limits.pixels:
            raise InputError(f"the image has more than {api.limits.pixels} pixels.")
        size, most = (values.shape[1], values.shape[0]), api.limits.pixels
        request.state.share.hold(2 * values.size + model.prepare.geometry.resizing_bytes(*size, most))
        crop = await run_in_threadpool(model.prepare.crop, Image.fromarray(values), max_pixels=most)
        return model.prepare.normalised(crop), ()
    # NaN is above no bound and below none
    if given.datatype == "FP32" and values.shape == (1, 3, height, width) and (np.abs(values) <= _LARGEST).all():
        return torch.from_numpy(values)[0], ()
    raise InputError(
        f"the input is {given.datatype} {given.shape}; expected BYTES, UINT8 (H, W, 3) or FP32 "
        f"(1, 3, {height}, {width}) within ±{_LARGEST:g}."
    )
