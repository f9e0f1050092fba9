"""DAVE: the front end. Images and a target in, attribution maps out.

The way of the data is one line: draws -> perturb -> forward and frozen VJP -> pull_back -> robust_mean -> smooth,
over flat (image, sample) rows in micro-batches. Source: DAVE, arXiv 2602.06613, Eq. 3-8.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dave_fast.engine import free_memory
from dave_fast.engine.aggregation import Aggregation
from dave_fast.engine.checks import (
    check_classes,
    check_images,
    check_integer,
    check_keys,
    check_rows,
    describe,
)
from dave_fast.engine.eager import Walk
from dave_fast.engine.end_of_call import EndOfCall, WeightsChangedError
from dave_fast.engine.graphs import make_graphs
from dave_fast.engine.micro_batches import MicroBatches, Progress
from dave_fast.engine.route import ROUTES, Route, make_route
from dave_fast.errors import InputError, ModelError
from dave_fast.models.adapter import kind_of
from dave_fast.models.catalog import is_private, load_model, noise_alpha_for
from dave_fast.models.fingerprint import State
from dave_fast.models.spec import ModelSpec
from dave_fast.ops import _registry
from dave_fast.ops.patches import patchify, unpatchify
from dave_fast.ops.precision import DTYPES, choose_precision, own_arithmetic, resolve_device, statistics_dtype
from dave_fast.sampling import Draws, Sampling, draw, identity
from dave_fast.targets.cotangents import Cotangent, ElementCotangent
from dave_fast.targets.forms import ModelView, Question, Target, resolve_target, split_targets
from dave_fast.transfers import moved, to_device

T = TypeVar("T")


@dataclass(frozen=True)
class Explanation:
    """Attribution maps of B images.

    maps: (B, H, W) float32 in [0, 1], for looking at · raw: (B, C, H, W) float32, signed, per channel: the
    median/MAD mean of effective gradient ⊙ image · target: (B,) int64, −1 where it is no class ·
    probability: (B,) float32, softmax of the unperturbed image's output at the target, NaN where it is no class ·
    output: (B, ...) float32, the model's output for the unperturbed images · n_samples, seed: as given.

    Of K targets (`explain(targets=...)`): maps (B, K, H, W), raw (B, K, C, H, W), target and probability (B, K).
    """

    maps: Tensor
    raw: Tensor
    target: Tensor
    probability: Tensor
    output: Tensor
    n_samples: int
    seed: int


class DAVE:
    """Explains the decisions of a Vision Transformer.

    Args:
        model: a name (timm's, "demo", "hf:...", "torchvision:...", "open_clip:...": see `dave_fast.models.spec`), a
            ModelSpec with weights and class names of your own, or any nn.Module. A module is only read; changes that
            you make to its weights, modules, hooks and settings are noticed by the next call (`models.fingerprint`).
            Of a model given by name the weights are this explainer's own, and are not read again at every call: to
            write to them through `.data`, which leaves no other trace, load the model yourself and give the module.
        device: where to compute; by default the model's own for a module, else a GPU where there is one.
        precision: "fp64", "fp32", "bf16" or "fp8" (e4m3 operands in the GEMMs: see `dave_fast.ops.fp8`); by default
            bf16 where the device has it, else fp32.
        backend: "auto", or "native" (C++ on the host), "onednn" or "torch": taken for every op that has it.
        route: "auto", "engine" (raises where the model has no plan) or "frozen".
        noise_alpha: largest noise level; by default the authors' value for the model, else 0.5 with a warning.
        schedule, rotation, scale, translation, flip: see `dave_fast.sampling.Sampling`.
        internal_batch_size: rows (image, sample) of a micro-batch; by default what fits.
        graphs: replay micro-batches as CUDA graphs (see `engine.graphs`). None where the device and the route can;
            True raises where they cannot; False launches the same kernels one by one, with the same result.

    Raises UnknownModelError, InputError, BackendError.
    """

    def __init__(
        self,
        model: str | ModelSpec | nn.Module,
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        backend: str = "auto",
        route: str = "auto",
        noise_alpha: float | None = None,
        schedule: str = "sequence",
        rotation: float = 20.0,
        scale: tuple[float, float] = (0.9, 1.1),
        translation: float = 0.1,
        flip: float = 0.5,
        internal_batch_size: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.model, self.model_name = load_model(model)
        self.device = resolve_device(device, self.model, named=not isinstance(model, nn.Module))
        self.precision = choose_precision(precision, self.device, backend)
        self.backend = backend
        if noise_alpha is None:
            noise_alpha = noise_alpha_for(self.model_name)
        self.sampling = Sampling(noise_alpha, schedule, rotation, scale, translation, flip)
        self.internal_batch_size = check_rows(internal_batch_size)
        if route not in ROUTES:
            raise InputError(f"route is {route!r}; expected one of {', '.join(ROUTES)}")
        self._route_wanted = route
        self._routes: dict[tuple[int, ...], Route] = {}
        self._lock = threading.Lock()
        self._state: State | None = None
        self._reads_values = not is_private(model)
        # on a GPU what the host must know is read at the end of a call: see `dave_fast.engine.end_of_call`
        self._defers = self.device.type != "cpu"
        self._graphs_wanted = graphs
        self._make_graphs = partial(make_graphs, self.device, graphs)
        self._graphs = self._make_graphs()
        kind = self.device.type
        # PyTorch's forms wait for the device, which a graph cannot
        self._pixels = _registry.choose("perturb", backend, kind) != "torch"
        self._perturb = _registry.bind("perturb", backend, kind)
        self._pull_back = _registry.bind("pull_back", backend, kind)
        self._robust_mean = _registry.bind("robust_mean", backend, kind)
        self._aggregation = Aggregation(self._robust_mean, _registry.bind("pull_back_mean", backend, kind))
        self._smooth = _registry.bind("smooth", backend, kind)

    # ---- what callers use ----

    def explain(
        self,
        images: Tensor,
        target: Target = None,
        n_samples: int = 50,
        seed: int = 0,
        *,
        targets: Sequence[Target] | Tensor | None = None,
        top_k: int | None = None,
        image_keys: Sequence[int] | None = None,
        internal_batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Explanation:
        """Attribution maps for images (B, C, H, W), normalised as the model expects them.

        Args:
            images: floating point, finite. One image may be given as (C, H, W).
            target: what is explained; None is the predicted class. All of captum's forms and callables: see
                `dave_fast.targets.forms`; contrasts, texts, other images and more: see `dave_fast.targets`.
            n_samples: S, perturbed samples an image; more is smoother, at linear cost.
            targets: in place of target, K of them, each in any of its forms, or a tensor of classes (K,) or (B, K).
                They share the forward walks and the draws; each map is that of its own call, bit for bit on a CPU.
            top_k: in place of target: the K most probable classes of each image, the most probable first.
            seed: any integer. The same seed gives the same map whatever the batch, its order and its size, up to
                rounding; the same call gives the same bits, on a CPU for any number of threads as well (our kernels
                never split a sum over threads; of oneDNN's and MKL's this was seen at one, two and three threads).
            image_keys: an integer an image that tells its draws from other images'; by default all share theirs.
            internal_batch_size: rows (image, sample) of a micro-batch.
            progress: called with (rows done, rows in all) after each micro-batch; on a GPU while later ones run.

        Raises InputError (shape, dtype, target, n_samples), ModelError, NonFiniteError.
        """
        seed, n_samples = check_integer(seed, "seed"), check_integer(n_samples, "n_samples", 1)
        if sum(each is not None for each in (target, targets, top_k)) > 1:
            raise InputError("of target=, targets= and top_k= more than one was given; give one of them")
        top_k = None if top_k is None else check_integer(top_k, "top_k", 1)
        rows = check_rows(internal_batch_size)
        wanted = [target] if targets is None else split_targets(targets)

        def work(images: Tensor, route: Route, end: EndOfCall) -> Explanation:
            keys = check_keys(image_keys, len(images))
            batches = self._batches(route, rows, n_samples)
            output = self._output(batches, images, end)
            if top_k is None or top_k == 1:
                resolved = [self._resolved(each, output, images) for each in wanted]
            else:
                resolved = self._most_probable(output, top_k)
            draws = draw(
                n_samples,
                height=images.shape[2],
                width=images.shape[3],
                seed=seed,
                image_keys=keys,
                sampling=self.sampling,
            )
            raw = self._aggregation.raw(batches, route, images, draws, resolved, progress)
            end.refuse_non_finite(raw, "the attribution", f"{self._advice}, or look for overflow in the model.")
            maps = self._smooth(raw.flatten(0, 1)).view(*raw.shape[:2], *raw.shape[3:])
            of_each = moved([each.classes for each in resolved], output.device)
            classes = torch.stack([each.expand(len(images)) for each in of_each], dim=1)
            classes, probability = end.read(classes, self._probability(output, classes))
            # one target has no dimension of its own
            at = 0 if targets is None and top_k is None else slice(None)
            return Explanation(
                maps=maps.float()[:, at],
                raw=raw.float()[:, at],
                target=classes[:, at],
                probability=probability[:, at],
                output=output.float(),
                n_samples=n_samples,
                seed=seed,
            )

        return self._answered(images, work)

    def bind(self, question: Question) -> Question:
        """A question with what the model has to say about it filled in (the index of a name, the embedding of a text
        or image), so that it is asked once and not at every call. See `dave_fast.targets`."""
        with own_arithmetic(self.device):
            return question.bind(self._view())

    def attribute(
        self,
        inputs: Tensor,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        n_samples: int = 50,
        seed: int = 0,
        internal_batch_size: int | None = None,
    ) -> Tensor:
        """captum's contract: inputs (B, C, H, W) -> signed attributions of the same shape and dtype.

        target=None is the predicted class. additional_forward_args are not supported and raise InputError.
        """
        if additional_forward_args is not None:
            raise InputError("additional_forward_args are not supported; wrap the model in a module that supplies them")
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise InputError(f"inputs must be one tensor (B, C, H, W); got {describe(inputs)}")
        explanation = self.explain(inputs, target, n_samples, seed, internal_batch_size=internal_batch_size)
        return explanation.raw.to(device=inputs.device, dtype=inputs.dtype)

    @property
    def multiplies_by_inputs(self) -> bool:
        """captum's property: attributions are effective gradient ⊙ input."""
        return True

    def predict(self, images: Tensor) -> Tensor:
        """The model's output for unperturbed images (B, C, H, W): (B, ...) float32, in this precision and route."""

        def work(images: Tensor, route: Route, end: EndOfCall) -> Tensor:
            output = self._output(self._batches(route), images, end).float()
            end.read()
            return output

        return self._answered(images, work)

    def effective_gradient(self, images: Tensor, target: Target = None) -> Tensor:
        """One row of the effective transformation per image, unperturbed: (B, C, H, W).

        float64 in fp64, else float32. DAVE, arXiv 2602.06613, Eq. 5.
        """

        def work(images: Tensor, route: Route, end: EndOfCall) -> Tensor:
            batches = self._batches(route)
            resolved = self._resolved(target, self._output(batches, images, end), images)
            gradients = torch.empty_like(images)
            tokens = torch.empty_like(patchify(images, route.patch_size))
            batches.vjps(images, identity(len(images)), [resolved], tokens[None], None)
            gradients.copy_(unpatchify(tokens, route.patch_size, *images.shape[2:]))
            end.refuse_non_finite(gradients, "the effective gradient", f"{self._advice}.")
            end.read()
            return gradients

        return self._answered(images, work)

    @property
    def route(self) -> str:
        """ "engine" or "frozen": the route of the last explanation, else the one that was asked for."""
        return next(reversed(self._routes.values())).name if self._routes else self._route_wanted

    # ---- for callers that fill micro-batches themselves, such as a server ----

    def contributions(self, images: Tensor, draws: Draws, targets: Tensor) -> Tensor:
        """One micro-batch: R rows of draws of several images -> contributions (K, R, C, H, W) of K classes.

        The K frozen VJPs share one forward walk. A row's contributions do not depend on its batch mates, up to
        rounding. `dave_fast.sampling.join` puts rows of several draws together.

        Args:
            images: (B, C, H, W), normalised as the model expects them, finite.
            draws: R rows; `draws.image_index` says which image each belongs to.
            targets: (B, K) integers, the classes of each image that are explained.

        Raises InputError, ModelError, NonFiniteError (for pixels; contributions are not looked at).
        """

        def work(images: Tensor, route: Route, end: EndOfCall) -> Tensor:
            made: Tensor | None = None
            of_image: list[Cotangent] = []

            def keep(walk: Walk, output: Tensor, at: slice, rows: Draws) -> None:
                nonlocal made
                if made is None:
                    check_classes(targets, len(images), output)
                    of_image.extend(map(ElementCotangent, to_device(targets.T.contiguous(), images.device)))
                    made = images.new_empty(len(of_image), len(draws), *images.shape[1:])
                for which, target in enumerate(of_image):
                    made[which, at].copy_(walk.vjp(target(output, rows), images.dtype))

            # a GPU takes its own buckets
            rows = len(draws) if self._graphs is None else None
            self._batches(route, rows).each(images, draws, keep)
            if made is None:
                raise InputError("draws hold no rows")
            end.read()
            return made

        return self._answered(images, work)

    def aggregate(self, contributions: Tensor) -> tuple[Tensor, Tensor]:
        """Contributions (B, S, C, H, W) -> raw (B, C, H, W) and maps (B, H, W): the end of `explain`.

        NaN where a contribution is.
        """
        with own_arithmetic(self.device):
            raw = self._robust_mean(contributions)
            return raw, self._smooth(raw)

    @property
    def statistics_dtype(self) -> torch.dtype:
        """What contributions are kept in."""
        return statistics_dtype(DTYPES[self.precision])

    def fitting_rows(self, images: Tensor) -> int:
        """How many rows `contributions` should be given at once for images (B, C, H, W)."""
        images = self._checked(images, EndOfCall(defers=self._defers))
        return self.internal_batch_size or self._fitting_rows(self._route(images))

    @property
    def _advice(self) -> str:
        """What to do about a number that is none."""
        if self.precision == "fp8":
            return (
                "A number may have left the range of e4m3, which is made for images that are normalised as the model "
                "expects them (standard deviation about 1; see `dave_fast.engine.calibration`): try precision='bf16'"
            )
        return "Try precision='fp32'"

    # ---- micro-batches ----

    def _batches(self, route: Route, rows: int | None = None, samples: int | None = None) -> MicroBatches:
        """The loop over micro-batches.

        Args:
            route: the walks.
            rows: of a full micro-batch, where the caller says so.
            samples: of one image, where a bucket may have just so many rows.
        """
        best, asked = self._fitting_rows(route), rows or self.internal_batch_size
        if samples is not None and asked is not None and samples > asked:
            samples = None
        graphs = self._graphs if route.capturable else None
        if self._graphs_wanted and graphs is None:
            raise ModelError(
                f"graphs=True was asked for, but the {route.name} route runs the model's own forward, which may wait "
                "for the device. Use graphs=None."
            )
        ops = (self._perturb, self._pull_back)
        return MicroBatches(route, *ops, asked or best, graphs=graphs, pixels=self._pixels, samples=samples)

    def _output(self, batches: MicroBatches, images: Tensor, end: EndOfCall) -> Tensor:
        """The model's output for the unperturbed images."""
        output = batches.outputs(images)
        end.refuse_non_finite(output, "the model's output", f"Check the weights. {self._advice}.")
        return output

    def _resolved(self, target: Target, output: Tensor, images: Tensor) -> Cotangent:
        """A target's cotangent, checked against the images' output."""
        return resolve_target(target, output, (images.shape[2], images.shape[3]), self._view())

    def _most_probable(self, output: Tensor, k: int) -> list[Cotangent]:
        """Return the cotangents of the k most probable classes of each image."""
        if output.dim() != 2 or kind_of(self.model) == "embedding":
            raise InputError(f"the model's output is {tuple(output.shape)}; top_k needs a classifier's: (B, K).")
        if k > output.shape[1]:
            raise InputError(f"top_k is {k}, and the model has {output.shape[1]} classes.")
        return [ElementCotangent(classes, classes) for classes in output.float().topk(k).indices.T.contiguous()]

    def _view(self) -> ModelView:
        """What questions may ask of this explainer."""

        def work(images: Tensor, route: Route, end: EndOfCall) -> Tensor:
            output = self._output(self._batches(route), images, end)
            end.read()
            return output

        return ModelView(self.model, lambda images: self._answered(images, work))

    def _probability(self, output: Tensor, classes: Tensor) -> Tensor:
        """(B, K) of classes (B, K) int64; NaN where there is no class, or the output is no classifier's."""
        if output.dim() != 2 or kind_of(self.model) == "embedding":
            return torch.full(classes.shape, float("nan"), device=classes.device)
        chosen = output.softmax(1).gather(1, classes.clamp(min=0)).float()
        return chosen.masked_fill(classes < 0, float("nan"))

    # ---- sizes ----

    def _fitting_rows(self, route: Route) -> int:
        """Rows of a micro-batch: the route's best number, or fewer where memory is short.

        Chosen once a route where buckets are captured for it.
        """
        if self._graphs is not None and route.full_rows is not None:
            return route.full_rows
        free = free_memory.SHARE * free_memory.free_bytes(self.device)
        route.fitting_rows = int(free / max(1, route.row_bytes))
        route.full_rows = route.best_rows(route.fitting_rows)
        return route.full_rows

    # ---- the route ----

    def _answered(self, images: Any, work: Callable[[Tensor, Route, EndOfCall], T]) -> T:
        """What `work` makes of images on the device, by the walks of the model as it is, ending with `end.read()`.

        Where the end finds that the weights were changed since the walks were made, walks and work are made anew.
        Raises ModelError where the weights change again meanwhile.
        """
        with own_arithmetic(self.device):
            for _ in range(2):
                end = EndOfCall(defers=self._defers)
                given = self._checked(images, end)
                try:
                    return work(given, self._route(given, end), end)
                except WeightsChangedError:
                    self._forget(end.state)
        raise ModelError("the model's weights changed twice during one call: explain a copy, or between the changes")

    def _route(self, images: Tensor, end: EndOfCall | None = None) -> Route:
        """The walks for images of this size, made anew where the user has changed the model.

        end: gets the state of the model that they were made from.
        """
        shape = (images.shape[1], images.shape[2], images.shape[3])
        with self._lock:
            if self._state is None or not self._state.holds(values=not self._defers):
                self._routes.clear()
                self._graphs = self._make_graphs()
                self._state = State(self.model, values=self._reads_values)
            if end is not None:
                end.state = self._state
            # the last one used stands last
            route = self._routes.pop(shape, None) or self._made(shape)
            self._routes[shape] = route
            return route

    def _forget(self, state: State | None) -> None:
        """The model is no longer in this state: the next call makes its walks anew."""
        with self._lock:
            if self._state is state:
                self._state = None

    def _made(self, shape: tuple[int, int, int]) -> Route:
        made, line = make_route(
            self.model,
            shape,
            route=self._route_wanted,
            precision=self.precision,
            device=self.device,
            backend=self.backend,
            sibling=next(iter(self._routes.values()), None),
        )
        if line is not None:
            warnings.warn(line, stacklevel=5)
        return made

    def _checked(self, images: Any, end: EndOfCall) -> Tensor:
        """images (B, C, H, W) on the device. Those that are given on the host are looked at there."""
        images = check_images(images, self.statistics_dtype)
        advice = "Look for NaN or infinity in how they were loaded and normalised."
        end.refuse_non_finite(images, "the pixels", advice, now=images.device.type != self.device.type)
        return to_device(images, self.device)


def effective_gradient(
    model: str | ModelSpec | nn.Module,
    images: Tensor,
    target: Target = None,
    *,
    precision: str = "fp64",
    route: str = "frozen",
    device: str | torch.device | None = None,
    backend: str = "auto",
) -> Tensor:
    """The effective gradient of one unperturbed sample per image, (B, C, H, W); see `DAVE.effective_gradient`.

    Not multiplied by the image. route="engine" and "frozen" agree to rounding.
    """
    explainer = DAVE(model, device=device, precision=precision, route=route, backend=backend, noise_alpha=0.0)
    return explainer.effective_gradient(images, target)
