"""The cost of a run over a dataset beyond the engine: decoding, records, shards.

    python -m benchmarks.run_overhead IMAGES [--model vit_base_patch16_224] [--samples 4] [--repeats 3] [--ray]

IMAGES is a folder of photographs. Two measurements, each in turns within one process:

- With a real model: seconds of a run and of the engine alone on the same images, decoded beforehand. Both have their
  plan before the clock starts. CPU seconds are recorded, too, since other load on the machine disturbs them less.
- With a stub that takes 5 ms an image, as a fast GPU would: the share of the time that it is busy, and the share that
  the rate of decoding permits, which is measured with as many threads.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import machine
from dave_fast.models.spec import ModelSpec
from dave_fast.run.local import Machine
from dave_fast.run.mapper import Mapper, MapSettings, _record_columns, packed_map
from dave_fast.run.records import image_key
from dave_fast.run.runner import RunSummary, run_dataset
from dave_fast.run.sources import open_source

STUB_SECONDS = 0.005
NOISE_ALPHA = 0.5
SIDE = 224


class FixedPace(Mapper):
    """A mapper whose device takes 5 ms an image; decoding, shards and everything else are real."""

    def __init__(self, settings: MapSettings, device: str | None) -> None:
        from timm.models import create_model

        from dave_fast.images import preprocessing
        from dave_fast.models.labels import Labels

        torch.set_num_threads(1)
        self.settings, self.device, self.notes, self.target = settings, "stub", [], None
        self.prepare = preprocessing(create_model("vit_tiny_patch16_224", pretrained=False))
        self.labels, self.weights, self.batch_size = Labels(1000), "stub", settings.batch_size or 4
        x = np.linspace(-3, 3, SIDE, dtype=np.float32)
        bump = np.exp(-(x[:, None] ** 2 + x[None] ** 2))
        noise = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
        self._map = np.where(bump > 0.05, bump * noise, 0)

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the stub."""
        size = dict(self.prepare.config)
        return {
            "model": "stub",
            "precision": "fp32",
            "preprocessing": size,
            "classes": 1000,
            "raw": False,
            "outputs": False,
        }

    def explain(self, records: Any, inputs: Any, progress: Any) -> list[dict[str, Any]]:
        """Return rows after the time of the stub."""
        time.sleep(STUB_SECONDS * len(records))
        rows = []
        for record in map(self._resolved, records):
            row = _record_columns(record, 50) | packed_map(self._map, "float16")
            rows.append(row | {"target": 1, "prediction": 1, "probability": 0.5, "status": "ok"})
        return rows


class FixedPaceSettings(MapSettings):
    """Settings whose maps `FixedPace` makes."""

    def mapper(self, device: str | None, threads: int | None = None) -> Mapper:
        """Return the stub."""
        return FixedPace(self, device)


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def manifest(images: str, count: int, folder: Path) -> str:
    """Write a list of `count` records that repeats the images of a folder; return its path."""
    records = list(open_source(images).records())
    lines = [f"{n},{records[n % len(records)].uri}" for n in range(count)]
    path = folder / "list.csv"
    path.write_text("id,uri\n" + "\n".join(lines) + "\n")
    return str(path)


def measure_model(place: str, settings: MapSettings, repeats: int) -> list[dict[str, float]]:
    """Measure the seconds of the engine alone and of the run, in turns."""
    torch.set_num_threads(torch.get_num_threads())
    mapper = Mapper(settings, "cpu")
    records = list(open_source(place).records())
    inputs = torch.stack([mapper.decode(record) for record in records])
    results = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), cpu_seconds()
        for first in range(0, len(records), mapper.batch_size):
            some = slice(first, first + mapper.batch_size)
            keys = [image_key(record.id) for record in records[some]]
            mapper.explainer.explain(inputs[some], n_samples=settings.n_samples, image_keys=keys)
        bare, bare_cpu = time.perf_counter() - start, cpu_seconds() - cpu
        with tempfile.TemporaryDirectory() as out:
            summary = run_dataset(place, Path(out) / "run", settings, Machine(devices=("cpu",)))
        # seconds that the device was busy inside the run
        inside = summary.device_share * summary.seconds
        results.append({"bare": bare, "bare_cpu": bare_cpu, "run": summary.seconds, "inside": inside})
    return results


def decode_rate(place: str, threads: int) -> float:
    """Return how many images a second this number of threads decodes and prepares, without other work."""
    mapper = FixedPace(MapSettings("demo"), None)
    records = list(open_source(place).records())
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(mapper.decode, records[:16]))
        start = time.perf_counter()
        list(pool.map(mapper.decode, records))
        return len(records) / (time.perf_counter() - start)


def measure_stub(place: str, repeats: int, threads: int, engine: str) -> list[dict[str, float]]:
    """Measure rates of decoding and runs in turns."""
    results = []
    for _ in range(repeats):
        before = decode_rate(place, threads)
        summary = stub_run(place, threads, engine)
        after = decode_rate(place, threads)
        rate = (before + after) / 2
        possible = min(1.0, rate * STUB_SECONDS)
        results.append(
            {
                "decode": rate,
                "images_per_second": summary.images_per_second,
                "busy": summary.device_share,
                "possible": possible,
                "of_possible": summary.device_share / possible,
            }
        )
    return results


def stub_run(place: str, threads: int, engine: str) -> RunSummary:
    """Make a whole run with the stub."""
    settings = FixedPaceSettings()
    with tempfile.TemporaryDirectory() as out:
        return run_dataset(place, Path(out) / "run", settings, Machine(("cpu",), workers=threads), engine=engine)


def told(results: Sequence[dict[str, float]], name: str, form: str = "{:.3g}") -> str:
    """Return the median (minimum to maximum) as text."""
    values = [result[name] for result in results]
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main() -> None:
    """Measure, print and store the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--count", type=int, default=12, help="images for the model")
    parser.add_argument("--stub-count", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    screen = Console()
    spec = ModelSpec(given.model, random_weights=True)
    settings = MapSettings(spec, n_samples=given.samples, options={"noise_alpha": NOISE_ALPHA})
    content: dict[str, Any] = {"environment": machine.environment("pyarrow", "ray"), "settings": vars(given)}
    with tempfile.TemporaryDirectory() as folder:
        place = manifest(given.images, given.count, Path(folder))
        model = measure_model(place, settings, given.repeats)
        for result in model:
            result["overhead"] = result["run"] / result["bare"] - 1
            result["outside"] = 1 - result["inside"] / result["run"]
        content["model"] = model
        screen.print(
            f"{given.model}, S = {given.samples}, {given.count} images: bare {told(model, 'bare')} s, "
            f"run {told(model, 'run')} s; overhead {told(model, 'overhead', '{:+.1%}')}; "
            f"of the run outside the engine {told(model, 'outside', '{:.1%}')}"
        )
        place = manifest(given.images, given.stub_count, Path(folder))
        for engine in ("local", "ray") if given.ray else ("local",):
            stub = measure_stub(place, given.repeats if engine == "local" else 1, given.threads, engine)
            content[f"stub_{engine}"] = stub
            screen.print(
                f"stub, {engine}: decode-bound {told(stub, 'decode')} images/s, run "
                f"{told(stub, 'images_per_second')} images/s, device busy {told(stub, 'busy', '{:.0%}')} of "
                f"{told(stub, 'possible', '{:.0%}')} possible: {told(stub, 'of_possible', '{:.0%}')}"
            )
    path = machine.results_path("run_overhead")
    machine.write_json(path, content)
    screen.print(f"{path}")


if __name__ == "__main__":
    # workers import the stub by this module's name, not as __main__
    from benchmarks import run_overhead

    run_overhead.main()
