"""From images to rows: the one place where a run meets the explainer.

A worker is given a `Setup`, which can be pickled, and makes its `Mapper` from it: the model loaded, everything that
was left open resolved. The mappers of a run agree on `Mapper.configuration` and `Mapper.weights`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dave_fast.errors import DaveFastError, ImageError, InputError, NonFiniteError
from dave_fast.images import decode_image
from dave_fast.models.spec import ModelSpec
from dave_fast.run.contents import read_content
from dave_fast.run.identity import weights_hash
from dave_fast.run.records import Record, image_key, printable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dave_fast.explain.explainer import Explanation
    from dave_fast.run.shards import Row

MAP_DTYPES = ("float16", "uint8")
PREDICTED, LABEL = "predicted", "label"
_BATCH = {"cpu": 4, "cuda": 16}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Setup:
    """Everything that a worker needs to know to make maps.

    model: a name, a spec of it with its weights and class names, or a module. target: class index or name for all
    records; None: each record's own where it has one, else the predicted class; "predicted": that always; "label":
    the source's label, else the predicted class. options: further keywords of `dave_fast.DAVE`. make: what builds the
    mapper on a device, for tests and benchmarks.
    """

    model: str | ModelSpec | nn.Module = "demo"
    n_samples: int = 50
    seed: int = 0
    target: str | int | None = None
    map_dtype: str = "float16"
    raw: bool = False
    outputs: bool = False
    batch_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[Setup, str | None], Mapper] | None = None

    def mapper(self, device: str | None, threads: int | None = None) -> Mapper:
        """The mapper on a device (None is the best there is), with so many threads on a CPU (None: torch's choice)."""
        if self.make is not None:
            return self.make(self, device)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return Mapper(self, device)


class Mapper:
    """A model on a device, and what a run asks of it."""

    def __init__(self, setup: Setup, device: str | None) -> None:
        from dave_fast.explain.subject import Subject

        self.setup = setup
        self.notes: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject = Subject.load(setup.model, device=device, **setup.options)
        self.explainer, self.prepare, self.labels = subject
        self.notes += [str(warning.message) for warning in caught]
        if isinstance(setup.model, ModelSpec) and setup.model.random_weights:
            self.notes.append("the weights are random: the maps show the mechanics and mean nothing.")
        self.notes += [self.prepare.note] if self.prepare.note else []
        named = setup.target not in (None, PREDICTED, LABEL)
        self.target = self.labels.resolve(setup.target) if named and setup.target is not None else None
        self.weights = weights_hash(self.explainer.model)
        self.device = str(self.explainer.device)
        self.batch_size = setup.batch_size or _BATCH.get(self.explainer.device.type, 4)

    def warm_up(self) -> None:
        """Explain a grey image once, so that what cannot work fails before the run begins, and weights are laid out."""
        import torch

        images = torch.zeros(1, 3, *self.prepare.size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            explanation = self.explainer.explain(images, n_samples=1)
        self.notes += [str(warning.message) for warning in caught]
        if explanation.output.dim() != 2:
            shape = tuple(explanation.output.shape)
            raise InputError(f"the model's output is {shape}; runs explain classifiers, whose output is (B, K).")

    @property
    def configuration(self) -> dict[str, Any]:
        """Every setting that changes a map by more than rounding, as plain values."""
        setup, explainer = self.setup, self.explainer
        return {
            "model": explainer.model_name,
            "n_samples": setup.n_samples,
            "seed": setup.seed,
            "target": self.target if self.target is not None else setup.target,
            "precision": explainer.precision,
            "sampling": vars(explainer.sampling),
            "preprocessing": dict(self.prepare.config),
            "classes": self.labels.count,
            "map_dtype": setup.map_dtype,
            "raw": setup.raw,
            "outputs": setup.outputs,
        }

    @property
    def input_bytes(self) -> int:
        """Bytes of one prepared image."""
        return 4 * 3 * self.prepare.size[0] * self.prepare.size[1]

    def decode(self, record: Record) -> Tensor:
        """The model's input for a record, (3, H, W). Raises ImageError."""
        image = decode_image(read_content(record), record.uri)
        try:
            return self.prepare.transform(image)
        except (ValueError, OSError, MemoryError) as error:
            raise ImageError(f"cannot prepare {record.uri}: {error}.") from error

    def explain(self, records: Sequence[Record], inputs: Sequence[Tensor], progress: Progress | None) -> list[Row]:
        """A row for each record, in their order; records that cannot be explained get rows with an error.

        Raises MemoryError where one image at a time is too much, and whatever is not one image's fault.
        """
        rows: dict[str, Row] = {}
        for group in _alike(self._resolved(records), inputs):
            rows |= {row["id"]: row for row in self._group(*group, progress)}
        return [rows[record.id] for record in records]

    def refuse_target(self, record: Record) -> None:
        """Raise InputError for a record whose own target is no class of the model."""
        (resolved,) = self._resolved([record])
        if resolved.target is not None:
            self.labels.resolve(resolved.target)

    def _resolved(self, records: Sequence[Record]) -> list[Record]:
        """Records with the seed and the target that they are explained with."""
        setup = self.setup
        forced = self.target is not None or setup.target == PREDICTED
        return [
            replace(
                record,
                seed=setup.seed if record.seed is None else record.seed,
                target=self.target if forced else record.target,
                content=None,
            )
            for record in records
        ]

    def _group(self, records: Sequence[Record], inputs: Sequence[Tensor], progress: Progress | None) -> Iterator[Row]:
        """Rows of records that share a seed, and of which all or none have a target; halved where that helps."""
        import torch

        try:
            yield from self._rows(records, self._explanation(records, torch.stack(list(inputs)), progress))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(records) == 1:
                raise MemoryError(
                    "out of memory with one image at a time: give a smaller --internal-batch-size or fewer --n-samples."
                ) from error
            failure: DaveFastError | None = None
        except (InputError, NonFiniteError) as error:
            # The whole batch is refused for the sake of one image.
            failure = error
        else:
            return
        if len(records) == 1 and failure is not None:
            yield self.error_row(records[0], failure)
            return
        half = len(records) // 2 if failure is None else 1
        for start in range(0, len(records), half):
            yield from self._group(records[start : start + half], inputs[start : start + half], progress)

    def _explanation(self, records: Sequence[Record], images: Tensor, progress: Progress | None) -> Explanation:
        import torch

        targets = [record.target for record in records]
        seed = records[0].seed
        assert seed is not None
        return self.explainer.explain(
            images,
            target=None if targets[0] is None else torch.tensor(targets),
            n_samples=self.setup.n_samples,
            seed=seed,
            image_keys=[image_key(record.id) for record in records],
            progress=progress,
        )

    def _rows(self, records: Sequence[Record], explanation: Explanation) -> Iterator[Row]:
        maps = explanation.maps.cpu().numpy()
        raws = explanation.raw.cpu().numpy() if self.setup.raw else None
        outputs = explanation.output.cpu().float().numpy()
        for n, record in enumerate(records):
            row = _record_columns(record, self.setup.n_samples) | packed_map(maps[n], self.setup.map_dtype)
            row |= {
                "target": int(explanation.target[n]),
                "prediction": int(outputs[n].argmax()),
                "probability": float(explanation.probability[n]),
                "status": "ok",
            }
            if raws is not None:
                row |= packed_raw(raws[n])
            if self.setup.outputs:
                row["output"] = outputs[n].tobytes()
            yield row

    def error_row(self, record: Record, error: Exception) -> Row:
        """The row of a record that could not be explained."""
        (record,) = self._resolved([record])
        row = _record_columns(record, self.setup.n_samples)
        return row | {"target": record.target, "status": "error", "error": " ".join(str(error).split())}


def _record_columns(record: Record, n_samples: int) -> Row:
    return {"id": record.id, "uri": printable(record.uri), "seed": record.seed, "n_samples": n_samples}


def packed_map(heat: np.ndarray, dtype: str) -> Row:
    """A map (H, W) in [0, 1] as a row's columns."""
    scale = 1.0
    if dtype == "uint8":
        scale = float(heat.max()) / 255 or 1.0
        heat = np.rint(heat / scale)
    content = np.clip(heat, 0, 255).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"height": heat.shape[0], "width": heat.shape[1], "dtype": dtype, "map": content, "scale": scale}


def packed_raw(raw: np.ndarray) -> Row:
    """Signed contributions (3, H, W) as a row's columns, scaled to fill float16."""
    scale = float(np.abs(raw).max()) or 1.0
    return {"raw": (raw / scale).astype("<f2").tobytes(), "raw_scale": scale}


def _alike(records: Sequence[Record], inputs: Sequence[Tensor]) -> Iterator[tuple[list[Record], list[Tensor]]]:
    """Records, and their inputs, that one call of the explainer can take: of one seed, all or none with a target."""
    groups: dict[Any, tuple[list[Record], list[Tensor]]] = {}
    for record, tensor in zip(records, inputs, strict=True):
        group = groups.setdefault((record.seed, record.target is None), ([], []))
        group[0].append(record)
        group[1].append(tensor)
    yield from groups.values()
