"""The functions of the routes: from an HTTP request to an `Ask`, and from its events to an answer.

Nothing here computes: the event loop reads, waits and writes, the service's threads compute, bodies are parsed and
decoded in processes of their own (`workshop`), and answers are encoded in a thread pool.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from dave_fast.errors import ImageError, InputError, NonFiniteError, RefusedError, TooLargeError, is_out_of_memory
from dave_fast.explain.convergence import Refined
from dave_fast.serve import formats
from dave_fast.serve.account import RETRY_AFTER
from dave_fast.serve.jobs import Ask, DeadlineError, Ended, Event, Failed, Predicted
from dave_fast.serve.limits import FORMATS, Limits
from dave_fast.serve.models import ServedModel
from dave_fast.serve.schemas import Health, ModelInfo, Options, StoredImage, describe_errors
from dave_fast.serve.service import Service
from dave_fast.serve.untrusted import Message
from dave_fast.serve.uploads import Body, ImageStore, MemoryImageStore, read_body
from dave_fast.serve.workshop import Workshop
from dave_fast.targets import Class, Question
from dave_fast.targets.text import parse_target

# Seconds without an event after which a comment is sent to keep the connection open.
KEEP_ALIVE = 10.0
# Events that wait for a client before newer maps replace older ones.
WAITING = 3
# Signs in a target: each adds a class or a text.
MOST_SIGNS = 3
# Most seconds between two looks at what a deadline leaves.
NEXT_LOOK = 0.1


class Api:
    """The functions of the routes, over one service.

    Args:
        service: the service.
        limits: limits of bodies and requests.
        store: the images of /v1/images; None: a store of this server's own.
    """

    def __init__(self, service: Service, limits: Limits, store: ImageStore | None = None) -> None:
        self.service = service
        self.limits = limits
        self.workshop = Workshop(limits)
        self.store: ImageStore = store or MemoryImageStore(limits, service.account)

    # From a request to an Ask.

    def model(self, name: str | None) -> ServedModel:
        """Return a served model, by default the first; HTTPException 404 for an unknown name."""
        models = self.service.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise HTTPException(404, f"the model {name[:100]!r} is not served; there are {', '.join(models)}.")
        return models[name]

    async def ask(self, request: Request, options: Options, *, refined: bool) -> tuple[ServedModel, Ask, Options]:
        """Read a request; all errors of the client are raised here.

        Args:
            request: the HTTP request, with an image as body unless `options` name a stored one.
            options: options of the address.
            refined: whether the client is sent a map at every checkpoint.

        Returns:
            The model, the request for the service, and the options with those of a form.
        """
        deadline = deadline_of(request, options)
        body = Body(b"") if request.method == "GET" else await read_body(request, self.workshop, deadline)
        if body.fields:
            options = merge_options(options, body.fields)
        model = self.model(options.model)
        if bool(body.content) == (options.image is not None):
            given = "both a body and an image id were" if body.content else "no image was"
            raise HTTPException(422, f"{given} given; send an image file, or image= with an id of /v1/images.")
        content = body.content or await self.store.get(options.image or "")
        read = partial(self.prepared, request, model, content, deadline_of(request, options))
        return model, await self.make_ask(request, model, read, options, refined=refined), options

    async def make_ask(
        self,
        request: Request,
        model: ServedModel,
        read: Callable[[], Awaitable[tuple[Tensor, tuple[str, ...]]]],
        options: Options,
        *,
        refined: bool,
    ) -> Ask:
        """Return the request for the service, and hold the memory of its answer.

        What can be refused without the image is refused before it is read.

        Args:
            request: the HTTP request.
            model: the served model.
            read: returns the model's input, (3, H, W), and what had to be assumed about the image.
            options: options of the client.
            refined: whether the client is sent a map at every checkpoint.

        Raises:
            HTTPException: 422, an option exceeds the limits or contradicts another.
            InputError: the model has no such class or block.
            RefusedError: there is no memory for the answer.
        """
        targets, places = await run_in_threadpool(self._targets, model, options), model.places(options.depths)
        count = len(targets or ()) or options.top_k or 1
        request.state.share.hold(model.answer_bytes(count, len(places), signed=options.signed))
        image, notes = await read()
        return Ask(
            image,
            targets=targets,
            top_k=options.top_k or 1,
            n_samples=options.n_samples,
            seed=options.seed,
            shrink=options.shrink,
            tolerance=options.tolerance,
            deadline=deadline_of(request, options),
            refined=refined,
            notes=notes,
            places=places,
            signed=options.signed,
        )

    def _targets(self, model: ServedModel, options: Options) -> tuple[int | Question, ...] | None:
        if options.target and options.top_k is not None:
            raise HTTPException(422, "target and top_k are both given: give one of them.")
        if options.n_samples > self.limits.samples:
            text = f"n_samples is {options.n_samples}; this server takes up to {self.limits.samples}."
            raise HTTPException(422, text)
        if not options.target and not model.classes:
            forms = {"texts": "text:PROMPT", "patches": "patch:ROW,COLUMN"}
            known = " or ".join(forms[kind] for kind in model.questions if kind in forms) or "segment:, box:"
            raise HTTPException(422, f"the model {model.name!r} has no classes to choose from: ask target={known}.")
        count = max(len(options.target), options.top_k or 1)
        most = self.limits.classes if options.target else min(self.limits.classes, model.classes)
        if count > most:
            raise HTTPException(422, f"{count} classes are requested; at most {most} are explained at once.")
        targets = tuple(_target(text, model) for text in options.target)
        if len(set(targets)) < len(targets):
            raise HTTPException(422, "target has a class twice: give each class once.")
        return targets or None

    async def prepared(
        self, request: Request, model: ServedModel, content: bytes, deadline: float | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Return a model's input, (3, H, W), and what had to be assumed about the image.

        Args:
            request: the HTTP request.
            model: the served model.
            content: an image file.
            deadline: by `time.monotonic`, or None.

        Raises:
            ImageError: it cannot be read.
            TooLargeError: it has too many pixels, or takes too long.
        """
        told, crop = await self._picture(request, content, deadline, dict(model.prepare.config))
        pixels = np.frombuffer(crop, np.uint8).reshape(told["shape"])
        return await run_in_threadpool(model.prepare.normalised, pixels), tuple(told["notes"])

    async def _picture(
        self, request: Request, content: bytes, deadline: float | None, config: dict[str, Any] | None
    ) -> Message:
        options = {"pixels": self.limits.pixels, "formats": FORMATS, "config": config}
        return await self.workshop.run("picture", content, request.state.share, deadline=deadline, **options)

    # From an Ask to an answer.

    @property
    def _most_seconds(self) -> float:
        """The seconds after which a request ends, whatever its maps take."""
        return 2 * self.limits.answer_seconds

    def submit(self, model: ServedModel, ask: Ask) -> tuple[asyncio.Queue[Event], Callable[[], None]]:
        """Start a job; return its events, and a function that ends it and its timer."""
        loop = asyncio.get_running_loop()
        events = Events()

        def listener(event: Event) -> None:
            # Nobody waits for events after the loop is closed.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.service.submit(model.name, ask, listener)
        # The draws are made while the unperturbed image is predicted.
        loop.run_in_executor(None, getattr, job, "draws")
        # The server's own bound is not in ask.deadline, so that it does not make the request urgent.
        deadline = time.monotonic() + self.limits.answer_seconds
        if ask.deadline is not None:
            deadline = min(deadline, ask.deadline)

        timer: asyncio.Handle

        def cut_in_time() -> None:
            nonlocal timer
            left = self.service.time_left(job, deadline)
            if left <= 0:
                self.service.cut(job, "deadline")
            elif not job.over:
                # More samples take longer to make maps of.
                timer = loop.call_later(min(left, NEXT_LOOK), cut_in_time)

        timer = loop.call_soon(cut_in_time)

        def leave() -> None:
            timer.cancel()
            self.service.cancel(job)

        return events, leave

    async def end(self, request: Request, model: ServedModel, ask: Ask) -> Ended:
        """Run a job to its answer; if the client goes away the job is cancelled."""
        events, leave = self.submit(model, ask)
        last, gone = asyncio.create_task(last_event(events)), asyncio.create_task(wait_for_disconnect(request))
        try:
            timeout = self._most_seconds
            await asyncio.wait((last, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not last.done():
                raise HTTPException(499, "the client went away.")
            if isinstance(event := last.result() if last.done() else late(timeout), Failed):
                # An HTTPException, since the framework closes the connection after any other error.
                raise HTTPException(*status_of(event.error))
            return event
        finally:
            last.cancel()
            gone.cancel()
            leave()

    async def explain(self, request: Request, options: Annotated[Options, Query()]) -> Response:
        """Explain an image: return maps of the pixels that speak for a class.

        The body is an image file, or a form with the file `image` and options as further fields; without a body,
        `image` is an id of /v1/images. By the Accept header the answer is JSON, a PNG, a .npy file of maps (K, H, W)
        float32, or a .npz file with all results; numbers are in its x-dave- headers too.
        """
        kind = formats.negotiate(request.headers.get("accept"))
        if kind is None:
            raise HTTPException(406, f"no format in Accept is supported; give one of {', '.join(formats.TYPES)}.")
        model, ask, options = await self.ask(request, options, refined=False)
        ended = await self.end(request, model, ask)
        content = await run_in_threadpool(formats.encode, kind, model, ask, ended, options.view, options.encoding)
        return Response(content, media_type=kind, headers=formats.headers(model, ask, ended))

    async def stream(self, request: Request, options: Annotated[Options, Query()]) -> Response:
        """Explain an image in server-sent events: `prediction`, `maps` as samples arrive, then `done` or `error`.

        With GET, `image` is an id of /v1/images.
        """
        model, ask, options = await self.ask(request, options, refined=True)
        events, leave = self.submit(model, ask)
        stream = event_stream(model, ask, options, events, self._most_seconds)
        return EventResponse(stream, leave, self._most_seconds + self.limits.upload_seconds)

    # Images and models.

    async def keep(self, request: Request) -> StoredImage:
        """Store an image for a limited time, for several requests or for GET."""
        body = await read_body(request, self.workshop)
        if not body.content:
            raise HTTPException(422, "no image was given; send an image file.")
        told, _ = await self._picture(request, body.content, None, None)
        name = await self.store.put(body.content)
        size = {"width": told["width"], "height": told["height"]}
        return StoredImage(image=name, **size, expires_in_s=self.limits.stored_seconds)

    async def crop(
        self, request: Request, image: str, model: Annotated[str | None, Query(max_length=200)] = None
    ) -> Response:
        """Return the crop of a stored image that a model is given, as PNG."""
        served = self.model(model)
        inputs, _ = await self.prepared(request, served, await self.store.get(image))

        def draw() -> bytes:
            return formats.png(Image.fromarray(served.prepare.pixels(inputs).cpu().numpy()))

        return Response(await run_in_threadpool(draw), media_type=formats.PNG)

    async def models(self) -> list[ModelInfo]:
        """List the served models."""
        return [
            ModelInfo(
                name=model.name,
                height=model.prepare.size[0],
                width=model.prepare.size[1],
                classes=model.classes,
                class_names=[model.labels.name(i) for i in range(model.classes)] if model.labels.names else None,
                precision=model.explainers[0].precision,
                route=model.explainers[0].route,
                noise_alpha=model.explainers[0].sampling.noise_alpha,
                shrink=model.explainers[0].shrink,
                blocks=len(model.blocks),
                questions=list(model.questions),
                grid=None if model.grid is None else list(model.grid),
            )
            for model in self.service.models.values()
        ]

    # Health.

    async def alive(self) -> Health:
        """Report that the process answers."""
        return Health(status="ok")

    async def ready(self, response: Response) -> Health:
        """Report whether explanations are accepted."""
        reason = self.service.why_not_ready()
        response.status_code = 200 if reason is None else 503
        return Health(status="ok" if reason is None else "not ready", reason=reason)

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        measures, scheduler = self.service.metrics, self.service.scheduler
        measures.queued_requests.set(scheduler.requests)
        measures.queued_rows.set(scheduler.rows)
        measures.queued_bytes.set(scheduler.bytes)
        measures.held_bytes.set(self.service.account.now)
        measures.most_bytes.set(self.service.account.most)
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)


class Events(asyncio.Queue[Event]):
    """The events of a job; while a client reads slowly, newer maps take the place of those that wait."""

    def _put(self, item: Event) -> None:
        waiting: deque[Event] = self._queue  # type: ignore[attr-defined]
        if isinstance(item, Refined) and len(waiting) >= WAITING and isinstance(waiting[-1], Refined):
            waiting.pop()
        super()._put(item)


class EventResponse(StreamingResponse):
    """A response of server-sent events; `leave` is called at its end, also after an error.

    A client that has not read them after `seconds` is disconnected.
    """

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None], seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._leave, self._seconds = leave, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; the arguments are those of ASGI."""
        try:
            async with asyncio.timeout(self._seconds) as time_limit:
                await super().__call__(scope, receive, send)
        except TimeoutError:
            connection = scope["state"].get("connection")
            if connection is None or not time_limit.expired():
                raise
            connection.transport.abort()
            # The server takes it for an error of ours if this ends before the connection has.
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._leave()


async def event_stream(
    model: ServedModel, ask: Ask, options: Options, events: asyncio.Queue[Event], seconds: float
) -> AsyncIterator[bytes]:
    """Yield the events of a job as server-sent events, with comments that keep an idle connection open.

    Args:
        model: the served model.
        ask: the request.
        options: options of the client.
        events: of the job.
        seconds: after which the job fails.
    """
    predicted: Predicted | None = None
    end = time.monotonic() + seconds
    while True:
        event: Event
        try:
            event = await asyncio.wait_for(events.get(), min(KEEP_ALIVE, end - time.monotonic()))
        except TimeoutError:
            if time.monotonic() < end:
                yield b": waiting\n\n"
                continue
            event = late(seconds)
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


def _target(text: str, model: ServedModel) -> int | Question:
    """Return the class, or another question, that a client asks; raises InputError."""
    question = parse_target(text, model.labels, files=False, most_signs=MOST_SIGNS)
    return question.index if isinstance(question, Class) and isinstance(question.index, int) else question


def late(seconds: float) -> Failed:
    """Return the end of a job whose maps were not made in time."""
    return Failed(DeadlineError(f"the maps were not made in {seconds:g} s; ask for fewer classes or depths."))


def deadline_of(request: Request, options: Options) -> float | None:
    """Return the deadline of a request by `time.monotonic`, counted from its first byte, or None."""
    began: float = request.state.began
    return None if options.deadline_ms is None else began + options.deadline_ms / 1000


def merge_options(options: Options, fields: dict[str, Any]) -> Options:
    """Return the options of the address and of the form; HTTPException 422 if one is unknown, wrong or in both."""
    given = options.model_dump(exclude_unset=True)
    twice = sorted(given.keys() & fields.keys())
    if twice:
        raise HTTPException(422, f"{', '.join(twice)} was given in the address and in the form.")
    try:
        return Options.model_validate({**given, **fields})
    except ValidationError as error:
        raise HTTPException(422, describe_errors(error.errors())) from error


# The status of each error that has a message for the client; the first match counts.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (ClientDisconnect, 499),
    (TooLargeError, 413),
    (ImageError, 400),
    (InputError, 422),
    (DeadlineError, 504),
    (NonFiniteError, 500),
)


def status_of(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Return the status, message and headers that answer an error."""
    if isinstance(error, RefusedError):
        status = {"full": 429, "draining": 503, "too large": 413}[error.kind]
        wait = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return status, f"{error}.", wait
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status, str(error), {}
    if is_out_of_memory(error):
        return 503, "memory ran out; try again later, with fewer samples or classes.", {"retry-after": str(RETRY_AFTER)}
    return 500, f"the explanation failed ({type(error).__name__}); the server's log says more.", {}


async def last_event(events: asyncio.Queue[Event]) -> Ended | Failed:
    """Return the event after which none comes."""
    while not isinstance(event := await events.get(), Ended | Failed):
        pass
    return event


async def wait_for_disconnect(request: Request) -> None:
    """Return once the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
