"""The run of an evaluation: every method explains the same batches, and every metric scores every map.

Each attribution is scored twice: as it is (signed sum over channels) and after DAVE's own post-processing
(`dave_fast.ops.smooth`), so that no method gains from smoothing alone. Progress is counted in passes, one forward and
one backward of one image of the model's size, so that it is even in time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dave_fast.evaluate import metrics
from dave_fast.evaluate.methods import CONTROLS, Attribute, Method, MethodSettings
from dave_fast.evaluate.settings import GRIDS, VARIANTS, EvaluationSettings, Results
from dave_fast.evaluate.sources import Examples, ExampleSource
from dave_fast.evaluate.stages import stages
from dave_fast.evaluate.twin import NotTakenError
from dave_fast.ops.smooth import smooth

Progress = Callable[[int, int, str], None]


def as_maps(raw: Tensor) -> dict[str, Tensor]:
    """Return maps (n, H, W) of attributions (n, C, H, W): the signed sum over channels, and the smoothed map."""
    return {VARIANTS[0]: raw.sum(1), VARIANTS[1]: smooth(raw)}


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
        self.probed = self.curved = self.done = self.labelled = 0
        self.right: list[bool] = []
        self.areas: list[Tensor] = []
        self.seed_scores: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
        self.kept: list[tuple[Examples, Tensor]] = []
        self.kept_raw: dict[str, list[Tensor]] = defaultdict(list)

    def wants(self, group: str) -> bool:
        """Return whether a group of metrics is to be scored."""
        return group in self.settings.groups

    def explain(
        self,
        name: str,
        attribute: Attribute,
        images: Tensor,
        classes: Tensor,
        keys: Sequence[int],
        seed: int,
        what: str,
    ) -> Tensor:
        """Return attributions (n, C, H, W), and report progress.

        Args:
            name: of the method, for its cost.
            attribute: the method.
            images: (n, C, H, W), or as its `make_shared` takes them.
            classes: (n,) int64.
            keys: of the images.
            seed: of the draws.
            what: description for the progress.
        """
        raw = attribute(images, classes, keys, seed)
        self.done += len(classes) * self.methods[name].cost(self.setup)
        if self.progress is not None:
            self.progress(self.done, self.total, f"{name}: {what}")
        return raw

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
        probability = self.logits(batch.images).softmax(1)
        predicted = probability.argmax(1)
        classes = torch.where(batch.labels < 0, predicted, batch.labels)
        self.right += (predicted == classes).tolist()
        self.labelled += int((batch.labels >= 0).sum())
        self.areas.append(batch.masks.double().mean((1, 2)).cpu())
        probing = min(max(self.settings.probes - self.probed, 0), len(batch))
        sure = (predicted == classes) & (probability.amax(1) >= self.settings.confident)
        curving = sure.nonzero()[:, 0][: max(self.settings.probes - self.curved, 0)]
        for name, attribute in self.attributes.items():
            with torch.enable_grad():
                raw = self.explain(name, attribute, batch.images, classes, batch.keys, self.settings.seed, "images")
            self._score_maps(name, raw, batch)
            if self.wants("curves") and len(curving):
                self._score_curves(name, raw[curving], batch.images[curving], classes[curving])
            if probing:
                runner_up = probability.scatter(1, classes[:, None], -1).argmax(1)
                self._score_probes(name, raw[:probing], batch[:probing], classes[:probing], runner_up[:probing])
            self._keep(name, raw, batch)
        self._show(batch, classes, probability)
        self.probed += probing
        self.curved += len(curving)

    def _score_maps(self, name: str, raw: Tensor, batch: Examples) -> None:
        if not self.wants("localisation"):
            return
        for variant, maps in as_maps(raw).items():
            self.results.add(name, variant, "EnergyPG", metrics.energy_pointing_game(maps, batch.masks))
            self.results.add(name, variant, "pointing game", metrics.pointing_game(maps, batch.masks))
        if (patch := patch_size(self.model)) is not None:
            self.results.add(name, VARIANTS[0], "border excess", metrics.border_excess(raw, patch))

    def _score_curves(self, name: str, raw: Tensor, images: Tensor, classes: Tensor) -> None:
        for protocol in self.settings.protocols:
            for variant, maps in as_maps(raw).items():
                steps = self.settings.curve_steps
                curve = metrics.perturbation_curve(self.model, images, maps, classes, protocol, steps=steps)
                self.results.add(name, variant, f"{protocol} curve", metrics.mean_score(curve))
                rows = self.results.curves.setdefault(protocol, (curve.changed.cpu(), {}))[1].setdefault(name, {})
                before = rows.get(variant)
                scores = curve.scores.cpu()
                rows[variant] = scores if before is None else torch.cat([before, scores])

    def _score_probes(self, name: str, raw: Tensor, batch: Examples, classes: Tensor, runner_up: Tensor) -> None:
        """Score stability, similarity between classes, and other seeds."""
        attribute, seed, own = self.attributes[name], self.settings.seed, as_maps(raw)

        def compare(metric: str, images: Tensor, targets: Tensor) -> None:
            other = as_maps(self.explain(name, attribute, images, targets, batch.keys, seed, metric))
            for variant, maps in own.items():
                self.results.add(name, variant, metric, metrics.correlation(maps, other[variant]))

        if self.wants("stability"):
            compare("stability", batch.images + self.settings.stability_sigma * self._noise(batch), classes)
        if self.wants("classes"):
            compare("class similarity", batch.images, runner_up)
        if self.wants("seeds") and self.wants("localisation") and self.methods[name].random:
            for other in range(seed, seed + self.settings.seeds):
                if other != seed:
                    maps = as_maps(self.explain(name, attribute, batch.images, classes, batch.keys, other, "seeds"))
                else:
                    maps = own
                for variant, one in maps.items():
                    scores = metrics.energy_pointing_game(one, batch.masks)
                    self.seed_scores[name, variant, other].append(scores.cpu())

    def _noise(self, batch: Examples) -> Tensor:
        """Return normal noise for each image, seeded by its key."""
        shape = batch.images.shape[1:]
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in batch.keys]
        return torch.stack(drawn).to(batch.images)

    def close_seeds(self) -> None:
        """Store the mean EnergyPG of each seed if objects are known and there is more than one seed."""
        for (name, variant, _), parts in sorted(self.seed_scores.items()):
            mean = torch.cat(parts).nanmean().item()
            if not math.isnan(mean) and self.settings.seeds > 1:
                self.results.seeds.setdefault(name, {}).setdefault(variant, []).append(mean)

    def first(self, count: int) -> tuple[Tensor, Tensor, list[int]]:
        """Return the first images, their explained classes and keys."""
        images = torch.cat([each.images for each, _ in self.kept])[:count]
        classes = torch.cat([classes for _, classes in self.kept])[:count]
        return images, classes, [key for each, _ in self.kept for key in each.keys][:count]

    def first_raw(self, name: str, count: int) -> Tensor:
        """Return a method's attributions of the first images."""
        return torch.cat(self.kept_raw[name])[:count]

    def _keep(self, name: str, raw: Tensor, batch: Examples) -> None:
        """Store attributions of the first images, for randomisation and for pictures."""
        wanted = max(self.settings.randomised, self.settings.examples)
        have = sum(map(len, self.kept_raw[name]))
        self.kept_raw[name].append(raw[: max(wanted - have, 0)].cpu())

    def _show(self, batch: Examples, classes: Tensor, probability: Tensor) -> None:
        """Store the first images with their classes, and as examples for the report."""
        have = sum(len(each) for each, _ in self.kept)
        more = max(max(self.settings.randomised, self.settings.examples) - have, 0)
        self.kept.append((batch[:more], classes[:more]))
        for row in range(min(len(batch), max(self.settings.examples - have, 0))):
            at = int(classes[row])
            self.results.examples.append(
                {
                    "name": batch.names[row],
                    "class": at,
                    "probability": float(probability[row, at]),
                    "image": batch.images[row].cpu(),
                    "mask": batch.masks[row].cpu(),
                    "maps": {
                        name: smooth(self.first_raw(name, have + row + 1)[-1:])[0]
                        for name in self.methods
                        if name not in CONTROLS
                    },
                }
            )

    def score_pairs(self) -> None:
        """Score images with two objects: the share on one object when it, or the other one, is explained."""
        for start in range(0, self.settings.pairs, self.settings.batch_size):
            both = self.source.read_pairs(start, min(start + self.settings.batch_size, self.settings.pairs))
            if both is None:
                return
            one, other = (each.to(self.device) for each in both)
            for name, attribute in self.attributes.items():
                seed = self.settings.seed
                right = self.explain(name, attribute, one.images, one.labels, one.keys, seed, "two objects")
                wrong = self.explain(name, attribute, one.images, other.labels, one.keys, seed, "two objects")
                for metric, raw in (("two objects", right), ("wrong object", wrong)):
                    for variant, maps in as_maps(raw).items():
                        self.results.add(name, variant, metric, metrics.energy_pointing_game(maps, one.masks))


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Return (height, width) of the patches of a timm model; None if it has no such attribute."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return None if size is None else (int(size[0]), int(size[1]))
