"""Other attribution methods with the call of `DAVE.explain`, and several of them side by side.

    found = dave_fast.Explainer("integrated gradients", "deit3_base_patch16_224.fb_in1k").explain("photo.jpg")
    dave_fast.compare("photo.jpg", "deit3_base_patch16_224.fb_in1k").show()

The methods are those of `dave-fast evaluate`; docs/evaluate.md has their definitions and sources. They explain classes.
Maps are made of a method's attribution as DAVE's are of its own: smoothed, without what is negative (`ops.smooth`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.errors import InputError, MissingPackageError, ModelError, NonFiniteError, missing
from dave_fast.evaluate.methods import CONTROLS, EXTRAS, METHODS, Attribute, MethodSettings, known_name
from dave_fast.evaluate.twin import NotTakenError
from dave_fast.explain.depth import PIXELS, Depth, check_depth
from dave_fast.explain.explainer import DAVE
from dave_fast.explain.explanation import Explanation
from dave_fast.explain.inputs import shown
from dave_fast.explain.pictures import MOST_SHOWN
from dave_fast.given.isolation import isolated
from dave_fast.images.drawing import Style
from dave_fast.images.figures import Row, grid_of
from dave_fast.images.given import Picture, photographs
from dave_fast.images.screen import Drawn
from dave_fast.models.spec import ModelSpec
from dave_fast.numbers import check_integer
from dave_fast.ops.smooth import smooth
from dave_fast.targets.forms import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = tuple(name for name in METHODS if name not in CONTROLS)
Images = Tensor | Picture | Sequence[Picture]


def absence(name: str) -> MissingPackageError | None:
    """Return the error that the package of a method is missing in this environment; None where it is there."""
    package = METHODS[name].package
    if package is None or find_spec(package) is not None:
        return None
    return missing(EXTRAS[package], name, package)


class Explainer:
    """An attribution method for the decisions of one model.

    Args:
        name: one of `NAMES`; case, dashes and spaces do not matter.
        model: anything that `DAVE` takes, or a `DAVE`, whose model is then not loaded again.
        settings: keywords of `DAVE`, where none is given.

    Raises:
        InputError: there is no such method, or settings come with a `DAVE`, which has its own.
        MissingPackageError: the package that it is in is missing.
        DaveFastError: as `DAVE` does.
    """

    def __init__(self, name: str, model: str | ModelSpec | nn.Module | DAVE, **settings: Any) -> None:
        self.name = known_name(name)
        if error := absence(self.name):
            raise error
        self.dave = _dave(model, settings)

    def __repr__(self) -> str:
        return f"{self.name} of {self.dave.model_name} on {self.dave.device}"

    def _attribute(self, n_samples: int) -> Attribute:
        # baselines run the model's own forward: on a copy as the model is now, in evaluation mode and float32
        model = isolated(self.dave.model, torch.float32, self.dave.device)
        keywords = {"device": self.dave.device, "precision": "fp32", "noise_alpha": 0.0}
        setup = MethodSettings(n_samples, keywords)
        if self.name == "SmoothGrad":
            setup = replace(setup, spread=max(1 / std for std in self.dave.prepare.std))
        return METHODS[self.name].make(model, setup)

    def explain(
        self,
        images: Images,
        target: Target | str = None,
        n_samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        *,
        depth: Depth | Sequence[Depth] = PIXELS,
        targets: Sequence[Target | str] | Tensor | None = None,
        top_k: int | None = None,
        progress: Any = None,
    ) -> Explanation:
        """Return attribution maps for images, as `DAVE.explain` does.

        Args:
            images: photographs or a tensor.
            target: a class; None is the predicted one.
            n_samples: perturbed samples of DAVE and SmoothGrad, and steps of integrated gradients.
            seed: of random methods.
            depth: of DAVE's maps; other methods have pixels only.
            targets: in place of target, K classes.
            top_k: in place of target, the K most probable classes.
            progress: as for `DAVE.explain`; other methods report each class.

        Raises:
            InputError: a target is no class, or the method has no such depth.
            ModelError: the method does not support the model.
            NonFiniteError: NaN or infinity in the attribution.
            DaveFastError: as `DAVE.explain` does.
        """
        asked: dict[str, Any] = {"targets": targets, "top_k": top_k, "seed": seed}
        if self.name == "DAVE":
            return self.dave.explain(images, target, n_samples, depth=depth, progress=progress, **asked)
        if check_depth(depth) != (PIXELS,):
            raise InputError(f"depth is {depth!r}: {self.name} has one map, of the pixels")
        n_samples = check_integer(n_samples, "n_samples", 1)
        given, views = (images, None) if isinstance(images, Tensor) else self.dave.inputs.of_photographs(images)
        # classes, names and probabilities, for the price of one sample
        found = self.dave.explain(given, target, 1, depth=depth, **asked)
        if bool((found.target < 0).any()):
            raise InputError(f"{self.name} explains classes; for differences, texts and patches take DAVE")
        try:
            attribute = self._attribute(n_samples)
        except NotTakenError as reason:
            raise ModelError(f"{self.name} does not support {self.dave.model_name}: {reason}") from reason
        classes = found.target.reshape(len(found), -1).to(self.dave.device)
        batch = (given if given.dim() == 4 else given[None]).detach().to(self.dave.device, torch.float32)
        rows = []
        with shown(progress) as update:
            for number, of_target in enumerate(classes.T, 1):
                made = attribute(batch, of_target.contiguous(), [0] * len(batch), seed)
                rows.append(made[0] if isinstance(made, tuple) else made)
                if update is not None:
                    update(number, classes.shape[1])
        raw = torch.stack(rows, 1).detach().float().reshape(found.raw.shape)
        if not bool(raw.isfinite().all()):
            raise NonFiniteError(f"NaN or infinity in the attribution of {self.name} for {self.dave.model_name}")
        maps = smooth(raw.flatten(0, -4)).reshape(found.maps.shape)
        about = replace(
            found.about,
            method=self.name,
            noise_alpha=float("nan"),
            precision="fp32",
            views=found.views if views is None else views,
        )
        return replace(found, maps=maps, raw=raw, signed=raw.sum(-3), n_samples=n_samples, shrink=False, about=about)


def _dave(model: str | ModelSpec | nn.Module | DAVE, settings: Mapping[str, Any]) -> DAVE:
    if not isinstance(model, DAVE):
        return DAVE(model, **settings)
    if settings:
        raise InputError(f"{', '.join(settings)}: settings of a DAVE are given to the DAVE itself, and one was given")
    return model


@dataclass(frozen=True)
class Comparison(Drawn, Mapping[str, Explanation]):
    """Explanations of the same images side by side, by several methods or settings: a mapping from their names.

    One of settings is made of its explanations: `Comparison({"8 samples": few, "64 samples": many}).show()`.

    Attributes:
        found: the explanations.
        absent: why each other method has none.
        seconds: the time that each explanation took, once, with all preparation: no benchmark.
    """

    found: Mapping[str, Explanation]
    absent: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError unless there are explanations, each of as many images, one or more."""
        counts = {len(one) for one in self.found.values()}
        if len(counts) != 1 or 0 in counts:
            raise InputError("a comparison takes explanations, one or more, each of the same images")

    def __getitem__(self, name: str) -> Explanation:
        if name in self.found:
            return self.found[name]
        try:
            return self.found[known_name(name)]
        # a mapping's own error, which `in` and `get` expect
        except InputError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __repr__(self) -> str:
        first = next(iter(self.found.values()))
        names = ", ".join(name for _, name, _ in first.answers()[0])
        lines = [f"Comparison of {len(self)} explanations, {len(first)} image{'s' * (len(first) != 1)}, {names}"]
        times = {name: f"{self.seconds[name]:8.2f} s" if name in self.seconds else "" for name in self.found}
        lines += [f"  {name:22}{time}" for name, time in times.items()]
        lines += [f"  {name:22}not run: {reason}" for name, reason in self.absent.items()]
        return "\n".join(lines)

    def figure(self, *, signed: bool | None = None, **style: Any) -> Figure:
        """Return a figure: each image, and beside it its map by each method.

        Args:
            signed: as for the pictures of an `Explanation`.
            style: keywords of `dave_fast.images.drawing.Style`.

        Raises:
            InputError: there are more images than fit.
        """
        first = next(iter(self.found.values()))
        if len(first) > MOST_SHOWN:
            raise InputError(f"there are {len(first)} images; a picture has at most {MOST_SHOWN}")
        rows = []
        for b, view in enumerate(first.views):
            asked, panels = first.answers()[b][0][1], []
            for name, one in self.found.items():
                panel, crop = one.panels(b, signed=signed)[0], one.views[b].crop
                # of another model the answer and the preprocessing may differ
                words = "" if panel.name == asked else panel.name
                own = None if np.array_equal(crop, view.crop) else crop
                panels.append(replace(panel, name=name, probability=None, depth=words, crop=own))
            rows.append(Row(view.title or f"image {b}", view.crop, panels, asked))
        return grid_of(rows, Style(**style))


def compare(
    images: Images,
    model: str | ModelSpec | nn.Module | DAVE,
    methods: str | Sequence[str] | None = None,
    *,
    target: Target | str = None,
    n_samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Comparison:
    """Explain images by several methods.

    Args:
        images: photographs or a tensor, as for `DAVE.explain`.
        model: anything that `DAVE` takes, or a `DAVE`.
        methods: names, or one; None for all that are installed and support the model.
        target: a class; None is the predicted one of each image.
        n_samples: perturbed samples of DAVE and SmoothGrad, and steps of integrated gradients.
        seed: of random methods.
        progress: whether to show a bar.
        settings: keywords of `DAVE`, where none is given.

    Raises:
        InputError: a method is unknown, or was named and its package is missing; an image or the target does not fit.
        ModelError: no method supports the model, or gives finite numbers.
    """
    dave = _dave(model, settings)
    methods = [methods] if isinstance(methods, str) else methods
    # what a URL leads to is read once
    images = images if isinstance(images, Tensor) else photographs(images)
    found: dict[str, Explanation] = {}
    absent: dict[str, str] = {}
    seconds: dict[str, float] = {}
    names = list(dict.fromkeys(map(known_name, NAMES if methods is None else methods)))
    if methods is None:
        absent = {name: str(error) for name in names if (error := absence(name))}
        names = [name for name in names if name not in absent]
    with shown(progress) as update:
        for number, name in enumerate(names, 1):
            start = time.perf_counter()
            try:
                found[name] = Explainer(name, dave).explain(images, target, n_samples, seed)
            except (ModelError, NonFiniteError) as reason:
                absent[name] = str(reason)
            seconds[name] = time.perf_counter() - start
            if update is not None:
                update(number, len(names))
    if not found:
        raise ModelError("; ".join(absent.values()) or "methods is empty; expected one or more")
    return Comparison(found, absent, seconds)
