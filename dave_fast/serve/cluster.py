"""The same app as a Ray Serve application, for more than one device or machine.

    serve run dave_fast.serve.cluster:application models=vit_base_patch16_224 gpus=1 max_replicas=8

Each replica is the server of `dave-fast serve`: one service, whose scheduler fills micro-batches from all of its
requests, with a bounded queue of its own that answers 429 with Retry-After. Ray Serve distributes requests, adds and
removes replicas by the number of requests of each, and drains those that it removes. The images of /v1/images are in
a deployment of their own, since a request that names one may go to any replica. A map depends on its request alone, so
that every replica gives the same answer.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from dave_fast.defaults import DEFAULT_MODEL, DEFAULT_SHRINK
from dave_fast.errors import needs
from dave_fast.serve.limits import Limits
from dave_fast.serve.logs import log_to_stderr
from dave_fast.serve.models import load_models

with needs("serve,ray", "serving on a cluster"):
    from fastapi import FastAPI
    from pydantic import BaseModel, ConfigDict, Field, field_validator
    from ray import serve
    from ray.exceptions import RayTaskError
    from ray.serve.handle import DeploymentHandle
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from dave_fast.serve.app import create_app
    from dave_fast.serve.service import Service
    from dave_fast.serve.uploads import MemoryImageStore

KEYS_VARIABLE = "DAVE_FAST_API_KEYS"
# Requests that a replica accepts beyond its queue: for the page, for the list of models, and those that it refuses.
_EXTRA = 16
# Requests that a proxy holds until a replica accepts them, for bursts; replicas refuse what exceeds their queue.
_BURST = 256
# Seconds between the latest answer of a replica that is removed and its end.
_FLUSH = 15.0


class ClusterSettings(BaseModel):
    """The settings of `serve run` and of the args of a RayService; API keys are in DAVE_FAST_API_KEYS.

    The attributes without a description are those of `dave-fast serve`.

    Attributes:
        models: as for `dave-fast serve`, or one string with commas.
        weights: of a single model; a file that every replica can read, as is `labels`.
        num_classes: of a single model.
        labels: of a single model.
        image_size: of a single model.
        link: of a single model.
        cpus: CPUs of a replica, as Ray counts them.
        gpus: GPUs of a replica, as Ray counts them.
        min_replicas: the least number of replicas.
        max_replicas: the most replicas; equal to `min_replicas`, their number is fixed.
        target_requests: open requests of each replica that the autoscaler aims at.
        upscale_delay_s: seconds before replicas are added.
        downscale_delay_s: seconds before replicas are removed.
    """

    model_config = ConfigDict(extra="forbid")

    models: list[str] = [DEFAULT_MODEL]
    weights: str | None = None
    num_classes: int | None = None
    labels: str | None = None
    image_size: int | None = None
    link: str | None = None
    precision: str | None = None
    noise_alpha: float | None = None
    shrink: bool = DEFAULT_SHRINK
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
        """Split text at commas: a command line has no lists."""
        return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given

    @property
    def limits(self) -> Limits:
        """The limits of each replica."""
        return Limits(requests=self.max_requests, samples=self.max_samples, answer_seconds=self.answer_seconds)


class RemoteImageStore:
    """The store of a replica: it calls the deployment of a `MemoryImageStore` for all replicas."""

    def __init__(self, images: DeploymentHandle) -> None:
        self._images = images

    async def put(self, content: bytes) -> str:
        """Store an image file and return its id."""
        return str(await self._result(self._images.put.remote(content)))

    async def get(self, name: str) -> bytes:
        """Return a stored image file."""
        return bytes(await self._result(self._images.get.remote(name)))

    @staticmethod
    async def _result(answer: Any) -> Any:
        """Return the result of a call; an HTTPException of the deployment is raised as such."""
        try:
            return await answer
        except RayTaskError as error:
            if isinstance(error.cause, HTTPException):
                raise error.cause from error
            raise


class ReplicaHeader:
    """Middleware that puts the replica's name into the header `x-dave-replica`."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an exchange; the arguments are those of ASGI."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-dave-replica"] = self.name
            await send(message)

        await self.app(scope, receive, send_named)


class Explanations:
    """One replica: models on one device, and the app of `dave-fast serve` over them."""

    def __init__(self, settings: ClusterSettings, api_keys: list[str], images: DeploymentHandle) -> None:
        log_to_stderr()
        self._settings, self._api_keys, self._images = settings, api_keys, images
        own = {"weights", "num_classes", "labels", "image_size", "link"}
        names = own | {"precision", "noise_alpha", "shrink", "internal_batch_size"}
        loaded = load_models(settings.models, [None], **settings.model_dump(include=names))
        self._service = Service(loaded, settings.limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app; Ray runs its lifespan, which starts the service before the replica accepts requests."""
        app = create_app(
            self._service,
            self._settings.limits,
            api_keys=self._api_keys,
            cors_origins=self._settings.cors_origins,
            store=RemoteImageStore(self._images),
        )
        app.add_middleware(ReplicaHeader, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Raise RuntimeError if the service is not ready; Ray then replaces the replica."""
        reason = self._service.why_not_ready()
        if reason is not None:
            raise RuntimeError(reason)


def application(settings: ClusterSettings) -> serve.Application:
    """Return the application for `serve run`, `serve deploy` and the import_path of a RayService."""
    limits = settings.limits
    options: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        # These settings have Ray's own names.
        scaling = settings.model_dump(include={"min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s"})
        options = {"autoscaling_config": scaling | {"target_ongoing_requests": settings.target_requests}}
    # A client sends its image again if this replica is lost.
    images = serve.deployment(
        MemoryImageStore, name="Images", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    explanations = serve.deployment(
        serve.ingress()(Explanations),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=limits.requests + _EXTRA,
        # Beyond that the proxy refuses, with 503.
        max_queued_requests=_BURST,
        # A replica that is removed gets no new requests, and has answered its own by then.
        graceful_shutdown_timeout_s=limits.answer_seconds + _FLUSH,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5.0,
        **options,
    )
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").replace(",", "\n").splitlines() if key.strip()]
    return explanations.bind(settings, keys, images.bind(limits))
