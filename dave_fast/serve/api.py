"""What the routes do: from a request to an ask, from an ask to an answer.

Everything that computes is elsewhere: the event loop reads, waits and writes, the service's threads compute, decoding
and encoding go to worker threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from dave_fast.errors import ImageError, InputError, NonFiniteError, RefusedError, TooLargeError
from dave_fast.explain.convergence import Refined
from dave_fast.images import decode_image
from dave_fast.serve import formats
from dave_fast.serve.jobs import Ask, Ended, Event, Failed, Job, Predicted
from dave_fast.serve.limits import FORMATS, Limits
from dave_fast.serve.middleware import UploadBudget
from dave_fast.serve.schemas import Health, ModelInfo, Options, StoredImage
from dave_fast.serve.served import ServedModel
from dave_fast.serve.service import DeadlineError, Service
from dave_fast.serve.uploads import Body, ImageStore, MemoryStore, read_body

# seconds without an event after which a comment keeps the connection open
KEEP_ALIVE = 10.0


class Api:
    """The routes of one service."""

    def __init__(self, service: Service, limits: Limits, store: ImageStore | None = None) -> None:
        self.service = service
        self.limits = limits
        self.held = UploadBudget(limits.held_bytes)
        self.store: ImageStore = store or MemoryStore(limits, self.held)

    # ---- from a request to an ask ----

    def model(self, name: str | None) -> ServedModel:
        """A served model; 404 for others."""
        models = self.service.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise HTTPException(404, f"the model {name[:100]!r} is not served; there are {', '.join(models)}.")
        return models[name]

    async def ask(self, request: Request, options: Options, *, refined: bool) -> tuple[ServedModel, Ask, Options]:
        """Everything that a client may get wrong is found here."""
        began = self.service.clock()
        body = Body(b"") if request.method == "GET" else await read_body(request)
        if body.fields:
            options = merged(options, body.fields)
        model = self.model(options.model)
        if bool(body.content) == (options.image is not None):
            given = "both a body and an image id were" if body.content else "no image was"
            raise HTTPException(422, f"{given} given; send an image file, or image= with an id of /v1/images.")
        content = body.content or await self.store.get(options.image or "")
        image = await run_in_threadpool(self._prepared, model, content)
        return model, self.asked(model, image, options, began, refined=refined), options

    def asked(self, model: ServedModel, image: Any, options: Options, began: float, *, refined: bool) -> Ask:
        """What the service is told; HTTPException 422, InputError where an option cannot be met."""
        deadline = None if options.deadline_ms is None else began + options.deadline_ms / 1000
        return Ask(
            image,
            self._targets(model, options),
            options.top_k or 1,
            options.n_samples,
            options.seed,
            options.tolerance,
            deadline,
            refined,
        )

    def _targets(self, model: ServedModel, options: Options) -> tuple[int, ...] | None:
        if options.target and options.top_k is not None:
            raise HTTPException(422, "target names classes and top_k takes the most probable: give one of them.")
        if options.n_samples > self.limits.samples:
            raise HTTPException(
                422, f"n_samples is {options.n_samples}; this server takes up to {self.limits.samples}."
            )
        if max(len(options.target), options.top_k or 1) > min(self.limits.classes, model.classes):
            raise HTTPException(
                422, f"at most {min(self.limits.classes, model.classes)} classes are explained at once."
            )
        targets = tuple(model.labels.resolve(target) for target in options.target)
        if len(set(targets)) < len(targets):
            raise HTTPException(422, "a class is named twice.")
        return targets or None

    def _prepared(self, model: ServedModel, content: bytes) -> Any:
        image = decode_image(content, "the image", max_pixels=self.limits.pixels, formats=FORMATS)
        return model.prepare.transform(image)

    # ---- from an ask to an answer ----

    def submit(self, model: ServedModel, ask: Ask) -> tuple[Job, asyncio.Queue[Event], Callable[[], None]]:
        """The job, its events, and what ends its timer and the job itself where it is still open."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def listener(event: Event) -> None:
            # a loop that is closed has nobody who waits
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.service.submit(model.name, ask, listener)
        # drawn beside the engine, which needs them after the unperturbed image
        loop.run_in_executor(None, getattr, job, "draws")
        # what bounds every request is no deadline of its client's: it does not make it urgent
        until = self.service.clock() + self.limits.answer_seconds
        if ask.deadline is not None:
            until = min(until, ask.deadline)
        left = until - self.service.clock() - self.service.margin()
        timer = loop.call_later(max(0.0, left), self.service.cut, job, "deadline")

        def leave() -> None:
            timer.cancel()
            self.service.cancel(job)

        return job, events, leave

    async def end(self, request: Request, model: ServedModel, ask: Ask) -> Ended:
        """Wait for the answer; a client that goes away frees its rows."""
        _, events, leave = self.submit(model, ask)
        gone = asyncio.create_task(gone_away(request))
        try:
            while True:
                event = asyncio.create_task(events.get())
                await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise HTTPException(499, "the client went away.")
                if isinstance(told := event.result(), Failed):
                    # as HTTP's own: for what it does not expect, the framework would close the connection too
                    status, detail, headers = status_of(told.error)
                    raise HTTPException(status, detail, headers)
                if isinstance(told, Ended):
                    return told
        finally:
            gone.cancel()
            leave()

    async def explain(self, request: Request, options: Annotated[Options, Query()]) -> Response:
        """Which pixels of an image speak for a class.

        The body is an image file, or a form with the file `image` (and options as fields, if you like); or there is
        none, and `image` is an id of /v1/images. The answer is JSON, a PNG, a .npy file of maps (K, H, W) float32, or a
        .npz file with everything, by the Accept header; the numbers are in its x-dave- headers too.
        """
        kind = formats.negotiate(request.headers.get("accept"))
        if kind is None:
            raise HTTPException(406, f"give one of {', '.join(formats.TYPES)} in Accept.")
        model, ask, options = await self.ask(request, options, refined=False)
        ended = await self.end(request, model, ask)
        content = await run_in_threadpool(encoded, kind, model, ask, ended, options)
        return Response(content, media_type=kind, headers=formats.headers(model, ask, ended))

    async def stream(self, request: Request, options: Annotated[Options, Query()]) -> Response:
        """The same as server-sent events: `prediction`, `maps` again and again as samples come, `done` or `error`.

        With GET, `image` is an id of /v1/images.
        """
        model, ask, options = await self.ask(request, options, refined=True)
        _, events, leave = self.submit(model, ask)
        return EventResponse(told(model, ask, options, events), leave, self.limits.answer_seconds)

    # ---- images and models ----

    async def keep(self, request: Request) -> StoredImage:
        """Keep an image for a while, for several requests or for GET."""
        body = await read_body(request)
        if not body.content:
            raise HTTPException(422, "no image was given; send an image file.")
        decode = partial(decode_image, max_pixels=self.limits.pixels, formats=FORMATS)
        image = await run_in_threadpool(decode, body.content, "the image")
        name = await self.store.put(body.content)
        return StoredImage(image=name, width=image.width, height=image.height, expires_in_s=self.limits.stored_seconds)

    async def crop(self, image: str, model: Annotated[str | None, Query(max_length=200)] = None) -> Response:
        """What a model sees of a stored image: PNG."""
        served = self.model(model)
        content = await self.store.get(image)

        def draw() -> bytes:
            from PIL import Image

            return formats.png(Image.fromarray(served.prepare.pixels(self._prepared(served, content))))

        return Response(await run_in_threadpool(draw), media_type=formats.PNG)

    async def models(self) -> list[ModelInfo]:
        """The served models."""
        infos = []
        for model in self.service.models.values():
            explainer = model.explainers[0]
            (height, width), names = model.prepare.size, model.labels.names
            infos.append(
                ModelInfo(
                    name=model.name,
                    height=height,
                    width=width,
                    classes=model.classes,
                    class_names=None if names is None else [model.labels.name(i) for i in range(model.classes)],
                    precision=explainer.precision,
                    route=explainer.route,
                    noise_alpha=explainer.sampling.noise_alpha,
                )
            )
        return infos

    # ---- health ----

    async def alive(self) -> Health:
        """Whether the process answers at all."""
        return Health(status="ok")

    async def ready(self, response: Response) -> Health:
        """Whether explanations are taken; engines were warmed with a real one before the server listened."""
        reason = self.service.why_not_ready()
        response.status_code = 200 if reason is None else 503
        return Health(status="ok" if reason is None else "not ready", reason=reason)

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        measures, scheduler = self.service.metrics, self.service.scheduler
        measures.queued_requests.set(scheduler.requests)
        measures.queued_rows.set(scheduler.rows)
        measures.queued_bytes.set(scheduler.bytes)
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)


class EventResponse(StreamingResponse):
    """Server-sent events; however it ends, `leave` is called, and a client that reads no more is left."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None], seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._leave, self._seconds = leave, seconds

    async def __call__(self, *scope: Any) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(2 * self._seconds):
                await super().__call__(*scope)
        finally:
            self._leave()


async def told(model: ServedModel, ask: Ask, options: Options, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    """Events of a job as bytes, with comments that keep the connection open where nothing happens."""
    predicted: Predicted | None = None
    while True:
        try:
            event = await asyncio.wait_for(events.get(), KEEP_ALIVE)
        except TimeoutError:
            yield b": waiting\n\n"
            continue
        if isinstance(event, Predicted):
            predicted = event
            yield formats.event("prediction", formats.prediction(model, event))
        elif isinstance(event, Refined):
            assert predicted is not None
            maps = await run_in_threadpool(formats.maps, model, ask, predicted, event, options.encoding)
            yield formats.event("maps", maps)
        elif isinstance(event, Ended):
            answer = await run_in_threadpool(formats.answer, model, ask, event, options.encoding)
            yield formats.event("done", answer)
            return
        else:
            status, detail, _ = status_of(event.error)
            yield formats.event("error", {"status": status, "detail": detail})
            return


def encoded(kind: str, model: ServedModel, ask: Ask, ended: Ended, options: Options) -> bytes:
    """The answer in a format."""
    if kind == formats.PNG:
        return formats.picture(model, ask, ended.refined, options.view)
    if kind == formats.NPY:
        return formats.npy(ended.refined)
    if kind == formats.NPZ:
        return formats.npz(model, ask, ended)
    return formats.answer(model, ask, ended, options.encoding).model_dump_json().encode()


def merged(options: Options, fields: dict[str, Any]) -> Options:
    """Options of the query and of the form; 422 for what is none, or is given in both."""
    given = options.model_dump(exclude_unset=True)
    twice = sorted(given.keys() & fields.keys())
    if twice:
        raise HTTPException(422, f"{', '.join(twice)} was given in the address and in the form.")
    try:
        return Options.model_validate({**given, **fields})
    except ValidationError as error:
        raise HTTPException(422, in_words(error.errors())) from error


def in_words(errors: Sequence[Any]) -> str:
    said = [f"{'.'.join(map(str, e['loc'][1:] or e['loc'])) or 'request'}: {e['msg']}" for e in errors]
    return "; ".join(said)[:1000]


def status_of(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, message and headers of an error."""
    if isinstance(error, RefusedError):
        status = {"full": 429, "draining": 503, "too large": 413}[error.kind]
        wait = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return status, f"{error}.", wait
    if isinstance(error, TooLargeError):
        return 413, str(error), {}
    if isinstance(error, ImageError):
        return 400, str(error), {}
    if isinstance(error, InputError):
        return 422, str(error), {}
    if isinstance(error, DeadlineError):
        return 504, str(error), {}
    if isinstance(error, NonFiniteError):
        return 500, str(error), {}
    return 500, f"the explanation failed ({type(error).__name__}); the server's log says more.", {}


async def gone_away(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
