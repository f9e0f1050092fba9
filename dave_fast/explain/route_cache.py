"""The routes that an explainer takes through its model, and the calls that go over them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dave_fast.engine import free_memory
from dave_fast.engine.agreement import PlanDiffersError, can_run, disagreement, find_difference
from dave_fast.engine.bound_ops import PixelOps
from dave_fast.engine.checks import check_images
from dave_fast.engine.end_of_call import EndOfCall, WeightsChangedError
from dave_fast.engine.graphs import make_graphs
from dave_fast.engine.micro_batches import MicroBatches
from dave_fast.engine.route import Route, make_route
from dave_fast.errors import ModelError, is_out_of_memory, reason_of
from dave_fast.given.isolation import class_name, form_of
from dave_fast.given.own_forward import check_readable
from dave_fast.models.fingerprint import State
from dave_fast.ops.precision import DTYPES, own_arithmetic, statistics_dtype
from dave_fast.plan import families
from dave_fast.transfers import to_device

T = TypeVar("T")


class RouteCache:
    """The routes of one model on one device, a route for each size of images.

    A route is made for the first images of its size, and made again after the model has changed.

    Args:
        model: the model, which is only read.
        device: where to compute.
        precision: "fp64", "fp32", "bf16", "fp8" or "int8".
        backend: of the ops (see `dave_fast.ops._registry`).
        route: "auto", "engine" or "frozen".
        graphs: None where CUDA graphs are to be used if possible, True where they must, False where they must not.
        internal_batch_size: rows (image, sample) of a micro-batch; None takes what fits.
        reads_values: whether values of weights are compared at every call; needed where callers hold the module.

    Attributes:
        defers: whether a call checks its numbers at its end, so that the host does not wait for a GPU earlier (see
            `dave_fast.engine.end_of_call`).
        graphs: the captured graphs, or None.
        ops: between images and the walks.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        backend: str,
        route: str,
        graphs: bool | None,
        internal_batch_size: int | None,
        *,
        reads_values: bool,
    ) -> None:
        self.defers = device.type != "cpu"
        self.ops = PixelOps(backend, device)
        self.make_graphs = partial(make_graphs, device, graphs)
        self.graphs = self.make_graphs()
        self._model, self._device, self._precision, self._backend = model, device, precision, backend
        self._wanted, self._graphs_wanted, self._internal_batch_size = route, graphs, internal_batch_size
        self._reads_values = reads_values
        self._routes: dict[tuple[int, ...], Route] = {}
        self._state: State | None = None
        # why the engine does not serve the model in this state although it can be read
        self._no_plan: str | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The route that was used last, "engine" or "frozen"; before the first call the one that was asked for."""
        return next(reversed(self._routes.values())).name if self._routes else self._wanted

    def call(
        self,
        images: Any,
        work: Callable[[Tensor, MicroBatches, EndOfCall], T],
        rows: int | None = None,
        samples: int | None = None,
    ) -> T:
        """Return the result of a function of images and the loop over micro-batches of the route for them.

        Where the end of the call finds that the weights have changed since the route was made, the route is made again
        and the function called again.

        Args:
            images: (B, C, H, W) or (C, H, W), anywhere.
            work: function of the images (B, C, H, W) on the device, the micro-batches and the checks of the call; it
                ends with `EndOfCall.read`.
            rows: of a full micro-batch; None takes `internal_batch_size`, else what fits.
            samples: of one image; a captured graph may have that many rows, so that an image fills it.

        Raises:
            InputError: the images are not such a tensor.
            NonFiniteError: the images hold NaN or infinity.
            ModelError: the weights changed twice during the call, or the model has no such route.
        """
        with own_arithmetic(self._device):
            changes = 0
            while changes < 2:
                end = EndOfCall(defers=self.defers)
                given = self._checked(images, end)
                try:
                    batches = self.batches(self.route(given, end), rows, samples)
                    if not batches.route.agrees:
                        self._compare(batches, given)
                    return work(given, batches, end)
                except PlanDiffersError as reason:
                    self._leave_engine(end.state, str(reason))
                except WeightsChangedError:
                    self._forget(end.state)
                    changes += 1
        raise ModelError("the model's weights changed twice during one call: explain a copy, or between the changes")

    def route(self, images: Tensor, end: EndOfCall | None = None) -> Route:
        """Return the route for images of this size, made again where the model has changed.

        Args:
            images: (B, C, H, W).
            end: is told the state of the model that the route was made from.
        """
        shape = (images.shape[1], images.shape[2], images.shape[3])
        with self._lock:
            if self._state is None or not self._state.holds(values=not self.defers):
                check_readable(self._model)
                self._routes.clear()
                self.graphs, self._no_plan = self.make_graphs(), None
                self._state = State(self._model, values=self._reads_values)
            # inserted again, so that the last entry is the route that was used last
            route = self._routes.pop(shape, None) or make_route(
                self._model,
                shape,
                route=self._wanted,
                precision=self._precision,
                device=self._device,
                backend=self._backend,
                sibling=next(iter(self._routes.values()), None),
                no_plan=self._no_plan,
            )
            self._routes[shape] = route
            if not self._state.ignored.issuperset(route.written):
                self._state = State(self._model, values=self._reads_values, ignored=route.written)
            if end is not None:
                end.state = self._state
            return route

    def _compare(self, batches: MicroBatches, images: Tensor) -> None:
        """Compare a new route's output with the model's own for the first image.

        The output that is computed for it is that of the call.

        Raises:
            PlanDiffersError: the engine's output is not the model's.
            ModelError: the frozen route's output is not the model's, which rounding alone can cause.
        """
        route, model, image = batches.route, self._model, images[:1]
        if route.model is not None and form_of(model)[1] == route.dtype:
            # the frozen route's copy computes in the model's own precision: it is the comparison
            route.agrees = True
            return
        reading = None if route.plan is None else families.read(model, (images.shape[2], images.shape[3]))
        try:
            output = batches.outputs(images)[:1]
        except (RuntimeError, ValueError, IndexError) as failure:
            if reading is None or is_out_of_memory(failure) or can_run(reading, image):
                raise
            why = f"the plan of its class cannot be run ({reason_of(failure)})"
            raise PlanDiffersError(why) from failure
        if not (image.isfinite().all() and output.isfinite().all()):
            # the call ends with NonFiniteError, and the next one compares
            return
        error = disagreement(output, model, image, self._precision)
        if error is None:
            route.agrees = True
        elif reading is None:
            own = next((name for name in ("bf16", "fp64") if DTYPES[name] == form_of(model)[1]), "fp32")
            raise ModelError(
                f"in {self._precision} the output of {class_name(model)} is off by {error:.0%} from that of its own "
                "forward in its own precision: it computes something else in this one, or loses too much. Give "
                f"precision='{own}'"
            )
        else:
            where = find_difference(model, reading, image)
            raise PlanDiffersError(
                f"the plan of its class gives another output than its own forward, off by {error:.1%}, "
                f"because of {where}"
            )

    def _leave_engine(self, state: State | None, reason: str) -> None:
        """Take the frozen route as long as the model is in this state."""
        with self._lock:
            if self._state is state:
                self._routes.clear()
                self.graphs, self._no_plan = self.make_graphs(), reason

    def batches(self, route: Route, rows: int | None = None, samples: int | None = None) -> MicroBatches:
        """Return the loop over micro-batches of a route; rows and samples as for `call`."""
        best, asked = self._fitting_rows(route), rows or self._internal_batch_size
        if samples is not None and asked is not None and samples > asked:
            samples = None
        graphs = self.graphs if route.capturable else None
        if self._graphs_wanted and graphs is None:
            raise ModelError(
                f"graphs=True was asked for, but the {route.name} route runs the model's own forward, which may wait "
                "for the device. Use graphs=None."
            )
        return MicroBatches(route, self.ops, asked or best, graphs=graphs, samples=samples)

    def fitting_rows(self, images: Tensor) -> int:
        """Return the rows of a full micro-batch for images (B, C, H, W)."""
        images = self._checked(images, EndOfCall(defers=self.defers))
        return self._internal_batch_size or self._fitting_rows(self.route(images))

    def _fitting_rows(self, route: Route) -> int:
        """Return the route's best number of rows, or fewer where memory is short.

        With CUDA graphs, which are captured for one number of rows, it is chosen once for each route.
        """
        if self.graphs is not None and route.full_rows is not None:
            return route.full_rows
        free = free_memory.SHARE * free_memory.free_bytes(self._device)
        route.fitting_rows = int(free / max(1, route.row_bytes))
        route.full_rows = route.best_rows(route.fitting_rows)
        return route.full_rows

    def _checked(self, images: Any, end: EndOfCall) -> Tensor:
        """Return images (B, C, H, W) on the device, and check their values where they are given on the host."""
        images = check_images(images, statistics_dtype(DTYPES[self._precision]))
        advice = "Look for NaN or infinity in how they were loaded and normalised."
        end.refuse_non_finite(images, "the pixels", advice, now=images.device.type != self._device.type)
        return to_device(images, self._device)

    def _forget(self, state: State | None) -> None:
        """Drop a state that the model is no longer in: the next call makes its route again."""
        with self._lock:
            if self._state is state:
                self._state = None
