"""The same app as a Ray Serve application, for more than one device or machine.

    serve run dave_fast.serve.cluster:application models=vit_base_patch16_224 gpus=1 max_replicas=8

Each replica is what `dave-fast serve` is on one machine: one service, whose scheduler fills micro-batches of samples
from all of its requests, with its own bounded queue that answers 429 with Retry-After. Ray Serve does what is above
that: it spreads requests, adds and removes replicas by the requests that each of them has, and drains those that it
removes. Images of /v1/images are kept by one small deployment beside, since the request that names one may go to any
replica. A map depends on its request alone, so that every replica answers the same.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dave_fast.serve.app import create_app
from dave_fast.serve.limits import Limits
from dave_fast.serve.middleware import UploadBudget
from dave_fast.serve.served import load_models
from dave_fast.serve.server import log_to_stderr
from dave_fast.serve.service import Service
from dave_fast.serve.uploads import MemoryStore

KEYS_VARIABLE = "DAVE_FAST_API_KEYS"
# requests that a replica takes beyond its queue: those for the page, for models, and the ones that it refuses itself
_BESIDES = 16
# requests that a proxy holds while it finds them a replica: bursts, since replicas refuse for themselves
_BURST = 256
# seconds between the latest answer of a replica that is removed and its end
_FLUSH = 15.0


class ClusterSettings(BaseModel):
    """What `serve run` and the args of a RayService may set; API keys come from DAVE_FAST_API_KEYS.

    models: as `serve` takes them, or one string with commas. weights, num_classes, labels, image_size: of a single
    model, files as every replica sees them. cpus, gpus: of a replica, as Ray counts them. target_requests: waiting or
    computed in each replica, what the autoscaler keeps to. Equal min_replicas and max_replicas do not scale.
    The rest is as for `dave-fast serve`.
    """

    model_config = ConfigDict(extra="forbid")

    models: list[str] = ["demo"]
    weights: str | None = None
    num_classes: int | None = None
    labels: str | None = None
    image_size: int | None = None
    precision: str | None = None
    noise_alpha: float | None = None
    internal_batch_size: int | None = None
    max_requests: Annotated[int, Field(ge=1)] = 64
    max_samples: Annotated[int, Field(ge=1)] = 1024
    answer_seconds: Annotated[float, Field(gt=0)] = 120.0
    cors_origins: list[str] = []
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_requests: Annotated[float, Field(gt=0)] = 8.0
    upscale_delay_s: Annotated[float, Field(ge=0)] = 15.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @field_validator("models", "cors_origins", mode="before")
    @classmethod
    def _separated(cls, given: Any) -> Any:
        """A command line has no lists."""
        return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given

    @property
    def limits(self) -> Limits:
        """Of each replica."""
        return Limits(requests=self.max_requests, samples=self.max_samples, answer_seconds=self.answer_seconds)


class Images:
    """The images of /v1/images for all replicas; what is kept is lost with the replica, and is then sent again."""

    def __init__(self, limits: Limits) -> None:
        self._store = MemoryStore(limits, UploadBudget(limits.held_bytes))

    async def put(self, content: bytes) -> str:
        """As `MemoryStore.put`."""
        return await self._store.put(content)

    async def get(self, name: str) -> bytes:
        """As `MemoryStore.get`."""
        return await self._store.get(name)


class RemoteStore:
    """A `MemoryStore` that asks the `Images` deployment."""

    def __init__(self, images: DeploymentHandle) -> None:
        self._images = images

    async def put(self, content: bytes) -> str:
        """As `MemoryStore.put`."""
        return str(await self._told(self._images.put.remote(content)))

    async def get(self, name: str) -> bytes:
        """As `MemoryStore.get`."""
        return bytes(await self._told(self._images.get.remote(name)))

    @staticmethod
    async def _told(answer: Any) -> Any:
        try:
            return await answer
        except RayTaskError as error:
            if isinstance(error.cause, HTTPException):
                raise error.cause from error
            raise


class ReplicaHeader:
    """Middleware that says in `x-dave-replica` who answered."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-dave-replica"] = self.name
            await send(message)

        await self.app(scope, receive, named)


class Explanations:
    """One replica: models on one device, and the app of `dave-fast serve` over them."""

    def __init__(self, settings: ClusterSettings, api_keys: list[str], images: DeploymentHandle) -> None:
        log_to_stderr()
        self._settings, self._api_keys, self._images = settings, api_keys, images
        names = {"precision", "noise_alpha", "internal_batch_size", "weights", "num_classes", "labels", "image_size"}
        loaded = load_models(settings.models, [None], **settings.model_dump(include=names))
        self._service = Service(loaded, settings.limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app; Ray runs its lifespan, which warms the engine before the replica takes requests."""
        app = create_app(
            self._service,
            self._settings.limits,
            api_keys=self._api_keys,
            cors_origins=self._settings.cors_origins,
            store=RemoteStore(self._images),
        )
        app.add_middleware(ReplicaHeader, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        reason = self._service.why_not_ready()
        if reason is not None:
            raise RuntimeError(reason)


def application(settings: ClusterSettings) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and a RayService's import_path."""
    limits = settings.limits
    options: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_requests,
                "upscale_delay_s": settings.upscale_delay_s,
                "downscale_delay_s": settings.downscale_delay_s,
            }
        }
    images = serve.deployment(Images, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    explanations = serve.deployment(
        serve.ingress()(Explanations),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=limits.requests + _BESIDES,
        # beyond that it is the proxy that refuses, with 503
        max_queued_requests=_BURST,
        # a replica that is removed gets nothing new, and every request that it has is answered by then
        graceful_shutdown_timeout_s=limits.answer_seconds + _FLUSH,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5.0,
        **options,
    )
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").replace(",", "\n").splitlines() if key.strip()]
    return explanations.bind(settings, keys, images.bind(limits))
