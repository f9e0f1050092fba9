"""DAVE: the front end. Images and a target in, attribution maps out.

The way of the data is one line: draws -> perturb -> forward and frozen VJP -> pull_back -> robust_mean -> smooth,
over flat (image, sample) rows in micro-batches. Source: DAVE, arXiv 2602.06613, Eq. 3-8.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.checks import (
    check_classes,
    check_images,
    check_integer,
    check_keys,
    check_rows,
    describe,
    refuse_non_finite,
)
from dave_fast.errors import InputError
from dave_fast.memory import SHARE, contribution_bytes, free_bytes
from dave_fast.models.catalog import load_model, noise_alpha_for
from dave_fast.ops import _registry
from dave_fast.ops.patches import unpatchify
from dave_fast.precision import choose_precision, own_arithmetic, resolve_device, statistics_dtype
from dave_fast.route import DTYPES, ROUTES, Route, make_route
from dave_fast.sampling import Draws, Sampling, draw, identity
from dave_fast.targets import ResolvedTarget, Target, resolve_target
from dave_fast.weights import fingerprint

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Explanation:
    """Attribution maps of B images.

    maps: (B, H, W) float32 in [0, 1], for looking at · raw: (B, C, H, W) float32, signed, per channel: the
    median/MAD mean of effective gradient ⊙ image · target: (B,) int64, −1 where it is no class ·
    probability: (B,) float32, softmax of the unperturbed image's output at the target, NaN where it is no class ·
    output: (B, ...) float32, the model's output for the unperturbed images · n_samples, seed: as given.
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
        model: a timm name, "demo" (the embedded model) or any nn.Module. It is only read; changes that you make to
            its weights, modules, hooks and settings are noticed at the next call (see `dave_fast.weights`).
        device: where to compute; by default the model's own for a module, else a GPU where there is one.
        precision: "fp64", "fp32" or "bf16"; by default bf16 where the device has it, else fp32.
        backend: "auto", or "native" (C++ on the host), "onednn" or "torch": taken for every op that has it.
        route: "auto", "engine" (raises where the model has no plan) or "frozen".
        noise_alpha: largest noise level; by default the authors' value for the model, else 0.5 with a warning.
        schedule, rotation, scale, translation, flip: see `dave_fast.sampling.Sampling`.
        internal_batch_size: rows (image, sample) of a micro-batch; by default what fits.

    Raises UnknownModelError, InputError, BackendError.
    """

    def __init__(
        self,
        model: str | nn.Module,
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
    ) -> None:
        self.model, self.model_name = load_model(model)
        self.device = resolve_device(device, self.model, named=isinstance(model, str))
        self.precision = choose_precision(precision, self.device)
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
        self._fingerprint: object = None
        kind = self.device.type
        self._perturb = _registry.bind("perturb", backend, kind)
        self._pull_back = _registry.bind("pull_back", backend, kind)
        self._robust_mean = _registry.bind("robust_mean", backend, kind)
        self._smooth = _registry.bind("smooth", backend, kind)

    # ---- what callers use ----

    def explain(
        self,
        images: Tensor,
        target: Target = None,
        n_samples: int = 50,
        seed: int = 0,
        *,
        image_keys: Sequence[int] | None = None,
        internal_batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Explanation:
        """Attribution maps for images (B, C, H, W), normalised as the model expects them.

        Args:
            images: floating point, finite. One image may be given as (C, H, W).
            target: what is explained; None is the predicted class. All of captum's forms and callables: see
                `dave_fast.targets`.
            n_samples: S, perturbed samples an image; more is smoother, at linear cost.
            seed: any integer. The same seed gives the same map whatever the batch, its order and its size.
            image_keys: an integer an image that tells its draws from other images'; by default all share theirs.
            internal_batch_size: rows (image, sample) of a micro-batch.
            progress: called with (rows done, rows in all) after each micro-batch.

        Raises InputError (shape, dtype, target, n_samples), ModelError, NonFiniteError.
        """
        seed, n_samples = check_integer(seed, "seed"), check_integer(n_samples, "n_samples", 1)
        with own_arithmetic(self.device):
            images = self._checked(images)
            keys = check_keys(image_keys, len(images))
            route = self._route(images)
            rows = check_rows(internal_batch_size) or self.internal_batch_size or self._fitting_rows(route)
            output = self._output(route, images, rows)
            resolved = resolve_target(target, output)
            draws = draw(
                n_samples,
                height=images.shape[2],
                width=images.shape[3],
                seed=seed,
                image_keys=keys,
                sampling=self.sampling,
            )
            raw = self._raw(route, images, draws, resolved, rows, progress)
            classes = resolved.classes.expand(len(images)).clone()
            return Explanation(
                maps=self._smooth(raw).float(),
                raw=raw.float(),
                target=classes,
                probability=_probability(output, classes),
                output=output.float(),
                n_samples=n_samples,
                seed=seed,
            )

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
        with own_arithmetic(self.device):
            images = self._checked(images)
            route = self._route(images)
            return self._output(route, images, self.internal_batch_size or self._fitting_rows(route)).float()

    def effective_gradient(self, images: Tensor, target: Target = None) -> Tensor:
        """One row of the effective transformation per image, unperturbed: (B, C, H, W).

        float64 in fp64, else float32. DAVE, arXiv 2602.06613, Eq. 5.
        """
        with own_arithmetic(self.device):
            images = self._checked(images)
            route = self._route(images)
            rows = self.internal_batch_size or self._fitting_rows(route)
            resolved = resolve_target(target, self._output(route, images, rows))
            gradients = torch.empty_like(images)
            every = identity(len(images))
            for start in range(0, len(images), rows):
                some = every[start : start + rows]
                output, saved = route.forward(self._perturb(images, some, route.patch_size, dtype=route.dtype))
                tokens = route.vjp(saved, resolved.cotangent(output, some.image_index)).to(images.dtype)
                gradients[start : start + rows] = unpatchify(tokens, route.patch_size, *images.shape[2:])
            refuse_non_finite(gradients, "the effective gradient", "Try precision='fp32'.")
            return gradients

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
        with own_arithmetic(self.device):
            images = self._checked(images)
            route = self._route(images)
            output, saved = route.forward(self._perturb(images, draws, route.patch_size, dtype=route.dtype))
            check_classes(targets, len(images), output)
            rows = torch.arange(len(draws))
            made = images.new_empty(targets.shape[1], len(draws), *images.shape[1:])
            for which, of_image in enumerate(targets.T):
                cotangent = torch.zeros_like(output)
                cotangent[rows, of_image[draws.image_index]] = 1
                tokens = route.vjp(saved, cotangent)
                made[which] = self._pull_back(tokens, images, draws, route.patch_size, dtype=images.dtype)
            return made

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
        return self.internal_batch_size or self._fitting_rows(self._route(self._checked(images)))

    # ---- micro-batches ----

    def _raw(
        self, route: Route, images: Tensor, draws: Draws, target: ResolvedTarget, rows: int, progress: Progress | None
    ) -> Tensor:
        """All rows of draws, micro-batch by micro-batch -> raw (B, C, H, W)."""
        samples, shape = len(draws) // len(images), images.shape[1:]
        raw = torch.empty_like(images)
        done = 0
        for some in self._groups(len(images), samples, tuple(shape)):
            part = draws[some.start * samples : some.stop * samples]
            contributions = images.new_empty(len(part), *shape)
            for start in range(0, len(part), rows):
                stop = min(start + rows, len(part))
                contributions[start:stop] = self._contributions(route, images, part[start:stop], target)
                done += stop - start
                if progress is not None:
                    progress(done, len(draws))
            raw[some] = self._robust_mean(contributions.view(-1, samples, *shape))
        refuse_non_finite(raw, "the attribution", "Try precision='fp32', or look for overflow in the model.")
        return raw

    def _contributions(self, route: Route, images: Tensor, draws: Draws, target: ResolvedTarget) -> Tensor:
        """Rows of draws -> contributions (R, C, H, W) of images' dtype."""
        tokens = self._perturb(images, draws, route.patch_size, dtype=route.dtype)
        output, saved = route.forward(tokens)
        cotangent = target.cotangent(output, draws.image_index)
        return self._pull_back(route.vjp(saved, cotangent), images, draws, route.patch_size, dtype=images.dtype)

    def _output(self, route: Route, images: Tensor, rows: int) -> Tensor:
        """The model's output for the unperturbed images."""
        every = identity(len(images))
        outputs = []
        for start in range(0, len(images), rows):
            tokens = self._perturb(images, every[start : start + rows], route.patch_size, dtype=route.dtype)
            outputs.append(route.forward(tokens)[0])
        output = torch.cat(outputs)
        refuse_non_finite(output, "the model's output", "Check the weights, or try precision='fp32'.")
        return output

    # ---- sizes ----

    def _fitting_rows(self, route: Route) -> int:
        """Rows of a micro-batch: the route's best number, or fewer where memory is short."""
        fitting = int(SHARE * free_bytes(self.device) / max(1, route.row_bytes))
        return max(1, min(route.default_rows, fitting))

    def _groups(self, n_images: int, n_samples: int, shape: tuple[int, ...]) -> Iterator[slice]:
        """Images whose contributions are held together."""
        one = contribution_bytes(n_samples, shape, statistics_dtype(DTYPES[self.precision]))
        free = free_bytes(self.device)
        if one > free:
            raise InputError(
                f"{n_samples} samples of {shape} take {one / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; ask "
                "for fewer samples or smaller images"
            )
        size = max(1, int(SHARE * SHARE * free / one))
        for start in range(0, n_images, size):
            yield slice(start, min(start + size, n_images))

    # ---- the route ----

    def _route(self, images: Tensor) -> Route:
        """The walks for images of `shape`, made anew when the user has changed the model."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        with self._lock:
            now = fingerprint(self.model)
            if now != self._fingerprint:
                self._routes.clear()
                self._fingerprint = now
            # the last one used stands last
            route = self._routes.pop(shape, None) or self._made(shape)
            self._routes[shape] = route
            return route

    def _made(self, shape: tuple[int, int, int]) -> Route:
        made, line = make_route(
            self.model,
            shape,
            route=self._route_wanted,
            dtype=DTYPES[self.precision],
            device=self.device,
            backend=self.backend,
            sibling=next(iter(self._routes.values()), None),
        )
        if line is not None:
            warnings.warn(line, stacklevel=5)
        return made

    def _checked(self, images: Any) -> Tensor:
        return check_images(images, self.device, statistics_dtype(DTYPES[self.precision]))


def effective_gradient(
    model: str | nn.Module,
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


def _probability(output: Tensor, classes: Tensor) -> Tensor:
    if output.dim() != 2:
        return torch.full(classes.shape, float("nan"))
    chosen = output.softmax(1).cpu().gather(1, classes.clamp(min=0)[:, None])[:, 0].float()
    return chosen.masked_fill(classes < 0, float("nan"))
