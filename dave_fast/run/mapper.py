"""From images to rows: the only module of a run that calls the explainer.

A worker is given `MapSettings`, which can be pickled, and makes its `Mapper` from them: the model is loaded and every
default resolved. The mappers of one run have equal `Mapper.configuration` and `Mapper.weights`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dave_fast.defaults import DEFAULT_MODEL, DEFAULT_SAMPLES
from dave_fast.errors import InputError, NonFiniteError
from dave_fast.explain.depth import PIXELS, Depth, check_one
from dave_fast.models.meaning import link_of
from dave_fast.models.spec import ModelSpec
from dave_fast.run.contents import prepared
from dave_fast.run.identity import weights_hash
from dave_fast.run.limits import Limits
from dave_fast.run.messages import Mapped
from dave_fast.run.records import Record, image_key, printable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dave_fast.run.shards import ShardRow

MAP_DTYPES = ("float16", "uint8")
PREDICTED, LABEL = "predicted", "label"
_BATCH = {"cpu": 4, "cuda": 16}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MapSettings:
    """The settings of a run's maps, as a worker needs them.

    Attributes:
        model: a name, a spec of it with its weights and class names, or a module.
        n_samples: samples an image.
        seed: seed of the records that have none of their own.
        target: class index or name for all records; None: each record's own if it has one, else the predicted class;
            "predicted": always the predicted class; "label": the source's label, else the predicted class.
        map_dtype: "float16" or "uint8", as maps are stored.
        depth: where evidence is told, one depth as `DAVE.explain` takes it.
        raw: whether the signed contributions are stored too.
        outputs: whether the model's outputs are stored too.
        batch_size: images a call of the explainer; None: by the device.
        limits: the most that a record may take; no part of the run's identity.
        options: further keywords of `dave_fast.DAVE`.
    """

    model: str | ModelSpec | nn.Module = DEFAULT_MODEL
    n_samples: int = DEFAULT_SAMPLES
    seed: int = 0
    target: str | int | None = None
    map_dtype: str = "float16"
    depth: Depth = PIXELS
    raw: bool = False
    outputs: bool = False
    batch_size: int | None = None
    limits: Limits = field(default_factory=Limits)
    options: dict[str, Any] = field(default_factory=dict)

    def mapper(self, device: str | None, threads: int | None = None) -> Mapper:
        """Return the mapper on a device.

        Args:
            device: name of a torch device, None for the best there is.
            threads: torch's threads on a CPU, None for torch's default.
        """
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return Mapper(self, device)


class Mapper:
    """A model on a device, which makes the rows of a run.

    Args:
        settings: the settings of the run's maps.
        device: name of a torch device, None for the best there is.

    Raises:
        InputError: the model is no classifier of images, its output is not (B, K), the target is no class of it, or it
            has no such depth.
        ModelError: depth is not that of the pixels, and the model has no sequence of blocks.

    Attributes:
        notes: remarks for the user, such as warnings while the model was loaded.
        target: class index for all records, or None.
        depth: "pixels", the number of a block or a range such as "5-9".
        weights: hash of the model's weights.
        batch_size: images a call of `explain`.
    """

    def __init__(self, settings: MapSettings, device: str | None) -> None:
        import torch

        from dave_fast.explain.subject import Subject

        self.settings = settings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject = Subject.load(settings.model, device=device, **settings.options)
            self.explainer, self.prepare, self.labels = subject
            self.weights = weights_hash(self.explainer.model)
            self.target = None
            if settings.target is not None and settings.target not in (PREDICTED, LABEL):
                self.target = self.labels.resolve(settings.target)
            # A grey image shows errors before the run begins, and has the weights laid out.
            grey = torch.zeros(1, 3, *self.prepare.size)
            (self.depth,) = self.explainer.explain(grey, n_samples=1, depth=check_one(settings.depth)).levels
        self.notes = [str(warning.message) for warning in caught]
        if isinstance(settings.model, ModelSpec) and settings.model.random_weights:
            self.notes.append("the weights are random: the maps show the mechanics and mean nothing.")
        self.notes += [self.prepare.note] if self.prepare.note else []
        if settings.options.get("noise_alpha") is None:
            self.notes.append(
                f"noise_alpha is {self.explainer.sampling.noise_alpha:g} for {self.explainer.model_name}."
            )
        self.device = str(self.explainer.device)
        self.batch_size = settings.batch_size or _BATCH.get(self.explainer.device.type, 4)

    @property
    def configuration(self) -> dict[str, Any]:
        """Every setting that changes a map by more than rounding, as plain values."""
        settings, explainer = self.settings, self.explainer
        return {
            "model": explainer.model_name,
            "n_samples": settings.n_samples,
            "seed": settings.seed,
            "target": self.target if self.target is not None else settings.target,
            "precision": explainer.precision,
            "sampling": vars(explainer.sampling),
            "shrink": explainer.shrink,
            "depth": self.depth,
            "preprocessing": dict(self.prepare.config),
            "classes": self.labels.count,
            "link": link_of(explainer.model, self.labels.count or 0),
            "map_dtype": settings.map_dtype,
            "raw": settings.raw,
            "outputs": settings.outputs,
        }

    @property
    def input_bytes(self) -> int:
        """Bytes of one prepared image."""
        return 4 * 3 * self.prepare.size[0] * self.prepare.size[1]

    def decode(self, record: Record) -> Tensor:
        """Return the model's input for a record, (3, H, W) float32.

        Raises:
            ImageError: the image cannot be read or prepared.
        """
        return prepared(record, lambda image: self.prepare(image)[0], self.settings.limits)

    def rows(
        self, given: Sequence[tuple[Record, Callable[[], Tensor]]], progress: Progress
    ) -> tuple[list[ShardRow], Mapped]:
        """Return a row for each record, in their order, and the message that reports them.

        Args:
            given: the records, each with a function that returns its input as `decode` does, or raises InputError.
            progress: as for `explain`.
        """
        rows: dict[str, ShardRow] = {}
        records, inputs = [], []
        for record, load in given:
            try:
                target = self._resolved(record).target
                if target is not None:
                    self.labels.resolve(target)
                inputs.append(load())
                records.append(record)
            except InputError as error:
                rows[record.id] = self.error_row(record, error)
        start = time.perf_counter()
        rows |= {row["id"]: row for row in self.explain(records, inputs, progress)}
        busy_s = time.perf_counter() - start
        ordered = [rows[record.id] for record, _ in given]
        errors = [(row["id"], row["error"]) for row in ordered if row["status"] == "error"]
        return ordered, Mapped(len(ordered), busy_s, errors)

    def explain(self, records: Sequence[Record], inputs: Sequence[Tensor], progress: Progress | None) -> list[ShardRow]:
        """Return a row for each record, in their order; records that cannot be explained get rows with an error.

        Args:
            records: the records.
            inputs: the model's input for each of them, (3, H, W).
            progress: called with the number of (image, sample) rows done and their total.

        Raises:
            MemoryError: memory runs out with one image at a time.
            Exception: any other error that is not due to a single image.
        """
        rows: dict[str, ShardRow] = {}
        for group in _alike(map(self._resolved, records), inputs):
            rows |= {row["id"]: row for row in self._group(*group, progress)}
        return [rows[record.id] for record in records]

    def _resolved(self, record: Record) -> Record:
        """Return a record with the seed and the target that it is explained with, without its content."""
        forced = self.target is not None or self.settings.target == PREDICTED
        seed = self.settings.seed if record.seed is None else record.seed
        return replace(record, seed=seed, target=self.target if forced else record.target, content=None, error=None)

    def _group(
        self, records: Sequence[Record], inputs: Sequence[Tensor], progress: Progress | None
    ) -> Iterator[ShardRow]:
        """Yield the rows of records with one seed, of which all or none have a target.

        Out of memory, the records are tried again in halves; after an error that may be one image's, one by one.
        """
        import torch

        try:
            yield from self._explained(records, torch.stack(list(inputs)), progress)
            return
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(records) == 1:
                raise MemoryError(
                    "out of memory with one image at a time: give a smaller --internal-batch-size or fewer --n-samples."
                ) from error
            some = len(records) // 2
        except (InputError, NonFiniteError) as error:
            # The explainer refuses the whole batch for one image.
            if len(records) == 1:
                yield self.error_row(records[0], error)
                return
            some = 1
        for start in range(0, len(records), some):
            yield from self._group(records[start : start + some], inputs[start : start + some], progress)

    def _explained(self, records: Sequence[Record], images: Tensor, progress: Progress | None) -> Iterator[ShardRow]:
        import torch

        settings = self.settings
        targets, seed = [record.target for record in records], records[0].seed
        assert seed is not None
        explanation = self.explainer.explain(
            images,
            target=None if targets[0] is None else torch.tensor(targets),
            n_samples=settings.n_samples,
            seed=seed,
            depth=settings.depth,
            image_keys=[image_key(record.id) for record in records],
            progress=progress,
        )
        maps = explanation.maps.cpu().numpy()
        raws = explanation.raw.cpu().numpy() if settings.raw else None
        outputs = explanation.output.cpu().float().numpy()
        probability = explanation.probability.tolist()
        for n, record in enumerate(records):
            row = _record_columns(record, settings.n_samples) | packed_map(maps[n], settings.map_dtype)
            row |= {
                "target": int(explanation.target[n]),
                "prediction": int(outputs[n].argmax()),
                "probability": None if math.isnan(probability[n]) else probability[n],
                "status": "ok",
            }
            if raws is not None:
                row |= packed_raw(raws[n])
            if settings.outputs:
                row["output"] = outputs[n].tobytes()
            yield row

    def error_row(self, record: Record, error: Exception) -> ShardRow:
        """Return the row of a record that could not be explained."""
        record = self._resolved(record)
        row = _record_columns(record, self.settings.n_samples)
        # A message names the file, whose name may be no Unicode.
        reason = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
        return row | {"target": record.target, "status": "error", "error": reason}


def _record_columns(record: Record, n_samples: int) -> ShardRow:
    return {"id": record.id, "uri": printable(record.uri), "seed": record.seed, "n_samples": n_samples}


def packed_map(heat: np.ndarray, dtype: str) -> ShardRow:
    """Return the columns of a map (H, W) in [0, 1], stored as `dtype`: "float16" or "uint8"."""
    scale = 1.0
    if dtype == "uint8":
        scale = float(heat.max()) / 255 or 1.0
        heat = np.rint(heat / scale)
    content = np.clip(heat, 0, 255).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"height": heat.shape[0], "width": heat.shape[1], "dtype": dtype, "map": content, "scale": scale}


def packed_raw(raw: np.ndarray) -> ShardRow:
    """Return the columns of signed contributions (3, H, W), stored as float16 and scaled to [-1, 1]."""
    scale = float(np.abs(raw).max()) or 1.0
    return {"raw": (raw / scale).astype("<f2").tobytes(), "raw_scale": scale}


def _alike(records: Iterable[Record], inputs: Sequence[Tensor]) -> Iterator[tuple[list[Record], list[Tensor]]]:
    """Yield groups of records, and their inputs, with one seed and of which all or none have a target."""
    groups: dict[Any, tuple[list[Record], list[Tensor]]] = {}
    for record, tensor in zip(records, inputs, strict=True):
        group = groups.setdefault((record.seed, record.target is None), ([], []))
        group[0].append(record)
        group[1].append(tensor)
    yield from groups.values()
