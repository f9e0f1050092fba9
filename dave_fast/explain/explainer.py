"""The front end: images and targets in, attribution maps out.

Perturbed samples of the images are drawn and made (perturb), taken forward and back through the model with its
operators frozen, pulled back to the images (pull_back), averaged over the samples (robust_mean), shrunk by the noise
that is left in the average (shrink) and smoothed for looking at (smooth). All but the last three work on rows (image,
sample) in micro-batches. Source: DAVE, arXiv 2602.06613, Eq. 3-8; shrinkage is an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.defaults import DEFAULT_SAMPLES, DEFAULT_SHRINK, MOST_SAMPLES
from dave_fast.engine.aggregation import attributions
from dave_fast.engine.checks import check_keys, check_rows, describe
from dave_fast.engine.end_of_call import EndOfCall
from dave_fast.engine.levels import PIXELS as LEVEL_OF_PIXELS
from dave_fast.engine.levels import Levels, levels_of
from dave_fast.engine.micro_batches import MicroBatches, Progress
from dave_fast.engine.route import check_route
from dave_fast.errors import InputError
from dave_fast.explain.depth import PIXELS, Depth, check_depth, check_one, depth_of, places_of
from dave_fast.explain.depth_account import Depths, account, every_level
from dave_fast.explain.explanation import About, Asked, Explanation
from dave_fast.explain.inputs import Inputs, shown
from dave_fast.explain.noise_level import noise_level
from dave_fast.explain.route_cache import RouteCache
from dave_fast.explain.sample_calls import SampleCalls
from dave_fast.given.wrappers import Watched
from dave_fast.images import Preprocessing
from dave_fast.images.given import Picture
from dave_fast.models.catalog import is_private, load_model
from dave_fast.models.labels import Labels, labels_of
from dave_fast.models.meaning import has_classes, link_of, most_probable, probability_of
from dave_fast.models.spec import ModelSpec
from dave_fast.numbers import check_integer
from dave_fast.ops._registry import choose
from dave_fast.ops.patches import unpatchify
from dave_fast.ops.precision import choose_precision, own_arithmetic, resolve_device
from dave_fast.sampling import Sampling, draw, identity
from dave_fast.targets.cotangents import Cotangent, ElementCotangent
from dave_fast.targets.forms import ModelView, Question, Target, resolve_target, split_targets
from dave_fast.targets.text import parse_target
from dave_fast.transfers import moved

__all__ = ["DAVE", "Explanation", "effective_gradient"]


class DAVE(SampleCalls):
    """An explainer of the decisions of one Vision Transformer.

    A module that is given is only read. Changes that its owner makes to its weights, modules, hooks and settings are
    noticed by the next call (see `dave_fast.models.fingerprint`). The weights of a model given by name belong to the
    explainer and are not read again at every call: to write to them through `.data`, which leaves no other trace, load
    the model yourself and give the module.

    Args:
        model: a name (timm's, "demo", "hf:...", "torchvision:...", "open_clip:...": see `dave_fast.models.spec`), a
            ModelSpec with weights and class names of your own, or any nn.Module.
        device: where to compute; by default the model's own for a module, else a GPU where there is one.
        precision: "fp64", "fp32", "bf16", "fp8" (e4m3 operands in the GEMMs, on GPUs: see `dave_fast.ops.fp8`) or
            "int8" (operands of eight-bit integers, on CPUs that multiply them: `dave_fast.ops.int8`); by default bf16
            where the device has it, else fp32. `dave-fast info` says which this device has.
        backend: "auto", or "native" (C++ on the host), "onednn" or "torch": taken for every op that has it.
        route: "auto", "engine" (raises where the model has no plan) or "frozen".
        noise_alpha: largest noise level; by default the authors' value for the model, else one by the scale of its
            pixels (see `dave_fast.explain.noise_level`). For maps at blocks alone 0, transformations without noise, was
            as good or better on all models that were measured (docs/depth.md); pixels and blocks of a call share it.
        schedule: "sequence" or "paper" (see `dave_fast.sampling.Sampling`, also for the next four).
        rotation: largest angle in degrees.
        scale: smallest and largest factor.
        translation: largest shift as a share of the side.
        flip: probability of a horizontal flip.
        shrink: whether maps are shrunk: before negative values are cut off, detail and level of a map are multiplied by
            the share of their power that is not noise, as the spread of its own samples tells (`dave_fast.ops.shrink`).
            Few samples then leave little more background than many; the limit for many is the same. False gives the
            paper's maps. `raw` is the paper's in either case.
        internal_batch_size: rows (image, sample) of a micro-batch; by default what fits.
        graphs: replay micro-batches as CUDA graphs (see `dave_fast.engine.graphs`). None where the device and the
            route can; True raises where they cannot; False launches the same kernels one by one, with the same result.

    Raises:
        UnknownModelError: there is no such model, or its weights cannot be fetched.
        ModelError: the model is not supported: it takes more than images, or is quantised.
        InputError: a setting is out of range.
        BackendError: the backend was named and cannot be used.
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
        shrink: bool = DEFAULT_SHRINK,
        internal_batch_size: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        # what can be refused without the model is refused before its weights are fetched
        sampling = Sampling(0.0 if noise_alpha is None else noise_alpha, schedule, rotation, scale, translation, flip)
        if not isinstance(shrink, bool):
            raise InputError(f"shrink is {shrink!r}; expected True, or False for the paper's maps")
        self.shrink = shrink
        self.internal_batch_size = check_rows(internal_batch_size)
        check_route(route)
        if not isinstance(model, nn.Module):
            place = resolve_device(device, nn.Identity(), named=True)
            choose_precision(precision, place, backend)
            choose("perturb", backend, place.type)
        self._wrapping = Watched(model) if isinstance(model, nn.Module) else None
        self.model, self.model_name = load_model(model)
        self.device = resolve_device(device, self.model, named=not isinstance(model, nn.Module))
        self.precision = choose_precision(precision, self.device, backend)
        self.backend = backend
        self.inputs = Inputs(self.model)
        if noise_alpha is None:
            level = noise_level(self.model, self.model_name, lambda: self.inputs.prepare)
            sampling = replace(sampling, noise_alpha=level)
        self.sampling = sampling
        self._cache = RouteCache(
            self.model,
            self.device,
            self.precision,
            backend,
            route,
            graphs,
            self.internal_batch_size,
            reads_values=not is_private(model),
        )

    def explain(
        self,
        images: Tensor | Picture | Sequence[Picture],
        target: Target | str = None,
        n_samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        *,
        depth: Depth | Sequence[Depth] = PIXELS,
        targets: Sequence[Target | str] | Tensor | None = None,
        top_k: int | None = None,
        image_keys: Sequence[int] | None = None,
        internal_batch_size: int | None = None,
        progress: Progress | bool | None = None,
    ) -> Explanation:
        """Return attribution maps for images.

        Photographs are prepared as the model expects them (`DAVE.prepare`). A tensor is taken as it is; one that looks
        as if it had not been normalised is told by an InputWarning.

        Equal seeds give equal maps whatever the batch, its order and its size, up to rounding. The same call gives the
        same bits, on a CPU for any number of threads as well: the project's kernels never split a sum over threads, and
        for oneDNN's and MKL's this was seen at one, two and three threads.

        Args:
            images: a photograph or a list of them, each a path, a URL that fsspec reads, the bytes of an image file, a
                PIL image or an array (H, W, 3); or a tensor (B, C, H, W), of one image (C, H, W): floating point,
                finite, normalised as the model expects.
            target: what is explained; None is the predicted class. All of captum's forms and callables: see
                `dave_fast.targets.forms`; contrasts, texts, other images and more: see `dave_fast.targets`; as text,
                such as "tiger" or "tiger-lion": see `dave_fast.targets.text`.
            n_samples: S, perturbed samples of an image; more are smoother, at linear cost.
            seed: any integer.
            depth: where in the model evidence is told: "pixels", the paper's map; the number of a block, for the tokens
                that enter it; a range such as "5-9", for the mean over its blocks; a share of the depth such as 0.5,
                for the block there; "auto", for a range in the deeper half; or several of them, which share all walks,
                each map being that of its own call, bit for bit on a CPU (`dave_fast.explain.depth`).
            targets: in place of target, K of them, each in any of its forms, or a tensor of classes (K,) or (B, K).
                They share the forward walks and the draws; each map is that of its own call, bit for bit on a CPU.
            top_k: in place of target, the K most probable classes of each image, the most probable first.
            image_keys: an integer for each image; images with different keys have different draws. By default all
                have the same.
            internal_batch_size: rows (image, sample) of a micro-batch.
            progress: True for a bar on the screen; or called with (rows done, rows in all) after each micro-batch, on a
                GPU while later ones run.

        Raises:
            ImageError: a photograph cannot be read.
            InputError: the shape or dtype of the images, a target or a setting cannot be explained.
            ModelError: the model cannot be read or copied (TorchScript, quantised or sharded weights), its own forward
                raises, it computes something else for a batch or in this precision, or it changes during the call.
            NotFrozenError: the model has an operator that cannot be held constant.
            NonFiniteError: NaN or infinity in images, output or attribution.
            OutOfMemoryError: memory runs out with the smallest micro-batch.
        """
        seed, n_samples = check_integer(seed, "seed"), check_integer(n_samples, "n_samples", 1, MOST_SAMPLES)
        if sum(each is not None for each in (target, targets, top_k)) > 1:
            raise InputError("of target=, targets= and top_k= more than one was given; give one of them")
        top_k = None if top_k is None else check_integer(top_k, "top_k", 1)
        rows, depths = check_rows(internal_batch_size), check_depth(depth)
        asked, shrink = [target] if targets is None else split_targets(targets), self.shrink
        several = isinstance(depth, Sequence) and not isinstance(depth, str)
        given, views = (images, None) if isinstance(images, Tensor) else self.inputs.of_photographs(images)

        def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> Explanation:
            keys = check_keys(image_keys, len(images))
            places = places_of(depths, lambda: batches.route.blocks)
            deep = levels_of(places) != LEVEL_OF_PIXELS
            output = self._output(batches, images, end, every_level(batches.route.blocks) if deep else LEVEL_OF_PIXELS)
            labels = self._labels(output)
            wanted = [parse_target(each, labels) if isinstance(each, str) else each for each in asked]
            if top_k is None or top_k == 1:
                resolved = [self.resolve(each, output, images) for each in wanted]
            else:
                resolved = [ElementCotangent(each, each) for each in most_probable(self.model, output, top_k)]
            height, width = images.shape[2:]
            draws = draw(n_samples, height=height, width=width, seed=seed, image_keys=keys, sampling=self.sampling)
            told = self._account(batches, images, resolved, end) if deep else None
            with shown(progress) as update:
                found = attributions(batches, images, draws, resolved, update, shrink=shrink, places=places)
            end.refuse_non_finite(found.raw, "the attribution", f"{self._advice}, or look for overflow in the model.")
            of_each = moved([each.classes for each in resolved], output.device)
            classes = torch.stack([each.expand(len(images)) for each in of_each], dim=1)
            own, extremes = self.inputs.of_tensor(images) if views is None else (views, images.new_empty(0))
            classes, probability, extremes = end.read(classes, probability_of(self.model, output, classes), extremes)
            self.inputs.tell(extremes)
            # `target=` gives results without the dimension K, one depth those without that of depths
            at = 0 if targets is None and top_k is None else slice(None)
            maps, raw, signed = (
                t.float()[:, at] if several else t.float()[:, :, 0][:, at]
                for t in (found.maps, found.raw, found.signed)
            )
            names = tuple(map(depth_of, places))
            return Explanation(
                maps=maps,
                raw=raw,
                signed=signed,
                target=classes[:, at],
                probability=probability[:, at],
                output=output.float(),
                n_samples=n_samples,
                seed=seed,
                shrink=shrink,
                depth=names if several else names[0],
                depths=None if told is None else told.map(lambda t: t[:, at]),
                about=About(
                    model=self.model_name,
                    precision=self.precision,
                    noise_alpha=self.sampling.noise_alpha,
                    labels=labels,
                    link=link_of(self.model, output.shape[1]) if has_classes(self.model, output) else None,
                    asked=tuple(Asked.of(each, labels) for each in wanted) * (top_k or 1),
                    views=own,
                ),
            )

        return self._checked.call(given, work, rows, n_samples)

    def depths(
        self,
        images: Tensor | Picture | Sequence[Picture],
        target: Target | str = None,
        *,
        targets: Sequence[Target | str] | Tensor | None = None,
    ) -> Depths:
        """Return what of the decision for each image the pixels and the tokens that enter each block account for.

        Args:
            images: as for `explain`.
            target: as for `explain`.
            targets: in place of target, K of them as for `explain`; the tensors have a dimension K after B.

        Raises:
            DaveFastError: as `explain` does; ModelError also for a model without a sequence of blocks.
        """
        if target is not None and targets is not None:
            raise InputError("target= and targets= were both given; give one of them")
        wanted = [target] if targets is None else split_targets(targets)

        def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> Depths:
            output = self._output(batches, images, end, every_level(batches.route.blocks))
            told = self._account(batches, images, [self.resolve(each, output, images) for each in wanted], end)
            end.read()
            return told if targets is not None else told.map(lambda t: t[:, 0])

        return self._checked.call(self._prepared(images), work)

    def __repr__(self) -> str:
        shrunk = "shrunk" if self.shrink else "not shrunk"
        return (
            f"DAVE of {self.model_name} on {self.device}: {self.precision}, route {self.route}, noise_alpha = "
            f"{self.sampling.noise_alpha:g}, {shrunk}"
        )

    @property
    def prepare(self) -> Preprocessing:
        """The model's preprocessing: photograph -> (input (C, H, W), the model's view of it).

        Raises:
            InputError: the model takes no photographs.
            ModelError: its preprocessing has a step that is not supported.
        """
        return self.inputs.prepare

    def bind(self, question: Question) -> Question:
        """Return a question with the model's part in it filled in, so that this is done once and not at every call.

        The model's part is the index of a class name, or the embedding of a text or image; see `dave_fast.targets`.
        """
        with own_arithmetic(self.device):
            return question.bind(self._view())

    def attribute(
        self,
        inputs: Tensor,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        n_samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        depth: Depth = PIXELS,
        internal_batch_size: int | None = None,
    ) -> Tensor:
        """Return signed attributions of the shape and dtype of inputs (B, C, H, W), as captum's methods do.

        All other arguments are those of `explain`, except that additional_forward_args must be None and depth is one.

        Raises:
            InputError: as `explain`, and where additional_forward_args are given.
        """
        if additional_forward_args is not None:
            raise InputError("additional_forward_args are not supported; wrap the model in a module that supplies them")
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise InputError(f"inputs must be one tensor (B, C, H, W); got {describe(inputs)}")
        explanation = self.explain(
            inputs, target, n_samples, seed, depth=check_one(depth), internal_batch_size=internal_batch_size
        )
        return explanation.raw.to(device=inputs.device, dtype=inputs.dtype)

    @property
    def multiplies_by_inputs(self) -> bool:
        """True, as captum names it: attributions are effective gradient ⊙ input."""
        return True

    def predict(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Return the model's output (B, ...) float32 for unperturbed images, as `explain` takes them.

        It is computed in the explainer's precision and by its route.
        """
        return self._checked.call(self._prepared(images), self._prediction).float()

    def output_shape(self, images: Tensor) -> tuple[int, ...]:
        """Return the shape (B, ...) of the model's output for images (B, C, H, W), whatever its values are."""

        def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> tuple[int, ...]:
            output = batches.outputs(images)
            end.read()
            return tuple(output.shape)

        return self._cache.call(images, work)

    def effective_gradient(self, images: Tensor | Picture | Sequence[Picture], target: Target | str = None) -> Tensor:
        """Return one row of the effective transformation for each unperturbed image: DAVE, arXiv 2602.06613, Eq. 5.

        Args:
            images: as for `explain`.
            target: as for `explain`; it names the row.

        Returns:
            (B, C, H, W), float64 in fp64, else float32; not multiplied by the image.
        """

        def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> Tensor:
            resolved = self.resolve(target, self._output(batches, images, end), images)
            tokens = batches.vjps(images, identity(len(images)), [resolved], None).pixels
            assert tokens is not None
            gradients = unpatchify(tokens[0].to(images.dtype), batches.route.patch_size, *images.shape[2:])
            end.refuse_non_finite(gradients, "the effective gradient", f"{self._advice}.")
            end.read()
            return gradients

        return self._checked.call(self._prepared(images), work)

    @property
    def route(self) -> str:
        """The route of the last explanation, "engine" or "frozen"; before the first one the route asked for."""
        return self._cache.name

    @property
    def _advice(self) -> str:
        """What to do about NaN or infinity."""
        if self.precision == "fp8":
            return (
                "A number may have left the range of e4m3, which is made for images that are normalised as the model "
                "expects them (standard deviation about 1; see `dave_fast.engine.calibration`): try precision='bf16'"
            )
        return "Try precision='fp32'"

    def _output(
        self, batches: MicroBatches, images: Tensor, end: EndOfCall, levels: Levels = LEVEL_OF_PIXELS
    ) -> Tensor:
        """Return the model's output for the unperturbed images, and queue its check."""
        output = batches.outputs(images, levels)
        end.refuse_non_finite(output, "the model's output", f"Check the weights. {self._advice}.")
        return output

    def _account(self, batches: MicroBatches, images: Tensor, targets: Sequence[Cotangent], end: EndOfCall) -> Depths:
        """Return what each depth accounts for of the targets, and queue its checks."""
        told = account(batches, images, targets)
        for found in (told.pixels, told.tokens):
            end.refuse_non_finite(found, "the attribution", f"{self._advice}.")
        return told

    def _prepared(self, images: Any) -> Any:
        """Return photographs as the model's input (B, C, H, W), and tensors as they are."""
        return images if isinstance(images, Tensor) else self.inputs.of_photographs(images)[0]

    def _labels(self, output: Tensor) -> Labels:
        """Return the names of the model's classes by its output (B, ...)."""
        return labels_of(self.model, output.shape[1] if output.dim() == 2 else None)

    def resolve(self, target: Target | str, output: Tensor, images: Tensor) -> Cotangent:
        """Return a target's cotangent, checked against the output (B, ...) of images (B, C, H, W); see `samples`."""
        height, width = images.shape[2:]
        target = parse_target(target, self._labels(output)) if isinstance(target, str) else target
        return resolve_target(target, output, (height, width), self._view())

    def _view(self) -> ModelView:
        """Return what a question may ask of the model."""
        return ModelView(self.model, partial(self._checked.call, work=self._prediction))

    def _prediction(self, images: Tensor, batches: MicroBatches, end: EndOfCall) -> Tensor:
        """Return the model's output (B, ...) for unperturbed images, in the dtype of the walks."""
        output = self._output(batches, images, end)
        end.read()
        return output


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
    """Return the effective gradient of each unperturbed image, (B, C, H, W); see `DAVE.effective_gradient`.

    The arguments are those of `DAVE` and of that method. The routes "engine" and "frozen" agree to rounding.

    Raises:
        DaveFastError: as `DAVE` and `DAVE.explain` do.
    """
    explainer = DAVE(model, device=device, precision=precision, route=route, backend=backend, noise_alpha=0.0)
    return explainer.effective_gradient(images, target)
