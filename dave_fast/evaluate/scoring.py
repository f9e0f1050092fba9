"""The run of an evaluation: every method explains the same batches, and every metric scores every map.

Each attribution is scored twice: as it is (signed sum over channels) and after DAVE's own post-processing
(`dave_fast.ops.smooth`), so that no method gains from smoothing alone. DAVE's smoothed maps are those that it gives: by
default they are shrunk first (`dave_fast.ops.shrink`), which takes samples and their spread. Progress is counted in
passes, one forward and one backward of one image of the model's size, so that it is even in time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dave_fast.evaluate import metrics
from dave_fast.evaluate.methods import CONTROLS, Attribute, Attributed, Method, MethodSettings
from dave_fast.evaluate.settings import GRIDS, VARIANTS, EvaluationSettings, Results
from dave_fast.evaluate.sources import Examples, ExampleSource
from dave_fast.evaluate.stages import stages
from dave_fast.evaluate.twin import NotTakenError
from dave_fast.models.meaning import probabilities
from dave_fast.ops.smooth import smooth

NO_PROBABILITIES = "the model's scores have no probabilities (its link is None), by which its images are chosen"

Progress = Callable[[int, int, str], None]
# variant -> (n, H, W)
Maps = dict[str, Tensor]


def as_maps(found: Attributed) -> Maps:
    """Return maps (n, H, W): the signed sum over channels, and the smoothed map."""
    raw, smoothed = found if isinstance(found, tuple) else (found, smooth(found))
    return {VARIANTS[0]: raw.sum(1), VARIANTS[1]: smoothed}


class Run:
    """The state of one evaluation.

    Args:
        model: in evaluation mode, on its device.
        source: the images.
        settings: what to measure.
        setup: how the methods are run.
        chosen: the methods by name; those that do not support the model are listed in `results.absent`.
        results: filled by the run.
        progress: called with (passes done, passes in all, description).
    """

    def __init__(
        self,
        model: nn.Module,
        source: ExampleSource,
        settings: EvaluationSettings,
        setup: MethodSettings,
        chosen: dict[str, Method],
        results: Results,
        progress: Progress | None,
    ) -> None:
        self.model, self.source, self.settings, self.setup = model, source, settings, setup
        self.results, self.progress = results, progress
        self.attributes: dict[str, Attribute] = {}
        for name, method in chosen.items():
            try:
                self.attributes[name] = method.make(model, setup)
            except NotTakenError as error:
                results.absent[name] = str(error)
        self.methods = {name: method for name, method in chosen.items() if name in self.attributes}
        self.device = next(model.parameters()).device
        self.images = min(settings.images, len(source))
        self.curved = self.done = self.labelled = 0
        self.right: list[bool] = []
        self.areas: list[Tensor] = []
        self.seed_scores: dict[tuple[str, str, int], list[float]] = defaultdict(list)
        # of the first images, on the CPU: themselves, their classes and each method's maps
        self.kept: list[tuple[Examples, Tensor, dict[str, Maps]]] = []

    def wants(self, group: str) -> bool:
        """Return whether a group of metrics is to be scored."""
        return group in self.settings.groups

    def explain(
        self,
        name: str,
        images: Tensor,
        classes: Tensor,
        keys: Sequence[int],
        what: str,
        *,
        seed: int | None = None,
        attribute: Attribute | None = None,
    ) -> Attributed:
        """Return what the method's `Attribute` returns, and report progress.

        Args:
            name: of the method.
            images: (n, C, H, W), or as the method's `make_shared` takes them.
            classes: (n,) int64.
            keys: of the images.
            what: description for the progress.
            seed: of the draws; None for that of the settings.
            attribute: the method on another model; None for the run's own.
        """
        attribute = attribute or self.attributes[name]
        found = attribute(images, classes, keys, self.settings.seed if seed is None else seed)
        self.done += len(classes) * self.methods[name].cost(self.setup)
        if self.progress is not None:
            self.progress(self.done, self.total, f"{name}: {what}")
        return found

    @property
    def total(self) -> int:
        """Estimated passes of the whole run."""
        s = self.settings
        probes = min(s.probes, self.images)
        once = sum(method.cost(self.setup) for method in self.methods.values())
        again = sum(method.cost(self.setup) for method in self.methods.values() if method.random)
        maps = self.images + probes * (self.wants("stability") + self.wants("classes"))
        pairs = 2 * s.pairs * (self.wants("classes") and self.source.read_pairs(0, 1) is not None)
        stages_ = s.randomised * len(stages(self.model)) * self.wants("randomisation")
        grids = sum(s.mosaics_of(GRIDS[kind][0]) * GRIDS[kind][0] ** 2 for kind in s.grids) * self.wants("grids")
        return once * (maps + pairs + stages_ + grids) + again * probes * (s.seeds - 1) * self.wants("seeds")

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the model's logits (n, K), batch by batch."""
        return torch.cat([self.model(some) for some in images.split(self.settings.batch_size)])

    def score_batch(self, batch: Examples) -> None:
        """Explain a batch by every method, and score everything that needs only that batch."""
        output = self.logits(batch.images)
        probability = probabilities(self.model, output)
        predicted = output.argmax(1)
        classes = torch.where(batch.labels < 0, predicted, batch.labels)
        seen, s = len(self.right), self.settings
        probing, keeping = (slice(max(most - seen, 0)) for most in (s.probes, max(s.randomised, s.examples)))
        sure = (predicted == classes) & (probability.amax(1) >= s.confident)
        if self.wants("curves") and probability.isnan().all():
            self.results.absent |= {f"{protocol} curve": NO_PROBABILITIES for protocol in s.protocols}
        curving = sure.nonzero()[:, 0][: max(s.probes - self.curved, 0)]
        runner_up = output.scatter(1, classes[:, None], -torch.inf).argmax(1)
        kept = {}
        for name in self.methods:
            with torch.enable_grad():
                found = self.explain(name, batch.images, classes, batch.keys, "images")
            maps = as_maps(found)
            if self.wants("localisation"):
                self._score_maps(name, found[0] if isinstance(found, tuple) else found, maps, batch)
            if self.wants("curves") and len(curving):
                some = {variant: each[curving] for variant, each in maps.items()}
                self._score_curves(name, some, batch.images[curving], classes[curving])
            if len(classes[probing]):
                some = {variant: each[probing] for variant, each in maps.items()}
                self._score_probes(name, some, batch[probing], classes[probing], runner_up[probing])
            kept[name] = {variant: each[keeping].cpu() for variant, each in maps.items()}
        self._show(batch, classes, probability, kept)
        self.kept.append((batch[keeping].to("cpu"), classes[keeping].cpu(), kept))
        self.right += (predicted == classes).tolist()
        self.labelled += int((batch.labels >= 0).sum())
        self.areas.append(batch.masks.double().mean((1, 2)).cpu())
        self.curved += len(curving)

    def _score_maps(self, name: str, raw: Tensor, maps: Maps, batch: Examples) -> None:
        for metric, function in (
            ("EnergyPG", metrics.energy_pointing_game),
            ("pointing game", metrics.pointing_game),
        ):
            self.results.add(name, metric, {variant: function(each, batch.masks) for variant, each in maps.items()})
        if (patch := patch_size(self.model)) is not None:
            self.results.add(name, "border excess", {VARIANTS[0]: metrics.border_excess(raw, patch)})

    def _score_curves(self, name: str, maps: Maps, images: Tensor, classes: Tensor) -> None:
        for protocol in self.settings.protocols:
            steps = self.settings.curve_steps
            curves = {
                variant: metrics.perturbation_curve(self.model, images, each, classes, protocol, steps=steps)
                for variant, each in maps.items()
            }
            self.results.add(name, f"{protocol} curve", {v: metrics.mean_score(each) for v, each in curves.items()})
            changed = curves[VARIANTS[0]].changed.cpu()
            rows = self.results.curves.setdefault(protocol, (changed, {}))[1].setdefault(name, {})
            for variant, curve in curves.items():
                scores = curve.scores.cpu()
                rows[variant] = torch.cat([rows.get(variant, scores[:0]), scores])

    def _score_probes(self, name: str, maps: Maps, batch: Examples, classes: Tensor, runner_up: Tensor) -> None:
        """Score stability, similarity between classes, and other seeds."""

        def compare(metric: str, images: Tensor, targets: Tensor) -> None:
            other = as_maps(self.explain(name, images, targets, batch.keys, metric))
            self.results.add(name, metric, {v: metrics.correlation(each, other[v]) for v, each in maps.items()})

        if self.wants("stability"):
            compare("stability", batch.images + self.settings.stability_sigma * self._noise(batch), classes)
        # a model with a single score has no other class
        if self.wants("classes") and not torch.equal(runner_up, classes):
            compare("class similarity", batch.images, runner_up)
        if self.wants("seeds") and self.wants("localisation") and self.methods[name].random:
            first = self.settings.seed
            for seed in range(first, first + self.settings.seeds):
                found = maps
                if seed != first:
                    found = as_maps(self.explain(name, batch.images, classes, batch.keys, "seeds", seed=seed))
                for variant, each in found.items():
                    scores = metrics.energy_pointing_game(each, batch.masks)
                    self.seed_scores[name, variant, seed] += scores.tolist()

    def _noise(self, batch: Examples) -> Tensor:
        """Return normal noise for each image, seeded by its key."""
        shape = batch.images.shape[1:]
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in batch.keys]
        return torch.stack(drawn).to(batch.images)

    def close_seeds(self) -> None:
        """Store the mean EnergyPG of each seed if objects are known and there is more than one seed."""
        for (name, variant, _), scores in sorted(self.seed_scores.items()):
            mean = torch.tensor(scores, dtype=torch.float64).nanmean().item()
            if not math.isnan(mean) and self.settings.seeds > 1:
                self.results.seeds.setdefault(name, {}).setdefault(variant, []).append(mean)

    def _show(self, batch: Examples, classes: Tensor, probability: Tensor, kept: dict[str, Maps]) -> None:
        """Store the first images of the run as examples for the report."""
        for row, at in enumerate(classes[: max(self.settings.examples - len(self.right), 0)].tolist()):
            self.results.examples.append(
                {
                    "name": batch.names[row],
                    "class": at,
                    "probability": float(probability[row, at]),
                    "image": batch.images[row].cpu(),
                    "mask": batch.masks[row].cpu(),
                    "maps": {name: maps[VARIANTS[1]][row] for name, maps in kept.items() if name not in CONTROLS},
                }
            )

    def score_pairs(self) -> None:
        """Score images with two objects: the share on one object when it, or the other one, is explained."""
        for start in range(0, self.settings.pairs, self.settings.batch_size):
            both = self.source.read_pairs(start, min(start + self.settings.batch_size, self.settings.pairs))
            if both is None:
                return
            one, other = (each.to(self.device) for each in both)
            for name in self.methods:
                for metric, classes in (("two objects", one.labels), ("wrong object", other.labels)):
                    maps = as_maps(self.explain(name, one.images, classes, one.keys, "two objects"))
                    scores = {v: metrics.energy_pointing_game(each, one.masks) for v, each in maps.items()}
                    self.results.add(name, metric, scores)


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Return (height, width) of the patches of a timm model; None if it has no such attribute."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return None if size is None else (int(size[0]), int(size[1]))
