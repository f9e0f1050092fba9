"""A process that times one revision of dave-fast on demand; `compare` runs two of them in turns.

It runs as a script with the folder of the revision's package first on the path. The bench is this revision's, and the
rest of the package the other's, so that both are timed by the same code. A revision that lacks modules which the bench
names is refused.

    stdin   {"prepare": {...}} once, then {"time": "name"} …        a line of JSON each
    stdout  {"names": [...], "refused": {...}}, then {"seconds": 0.0123} …            or {"error": "…"}
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def adopt_bench() -> None:
    """Make `dave_fast.bench` this revision's, not that of the package on the path."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "dave_fast.bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dave_fast.bench"] = module
    spec.loader.exec_module(module)


def prepare(wanted: dict[str, Any]) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return a clock for each case of the ops and one for the engine, and the refused cases with reasons."""
    import torch

    from dave_fast.bench.agreement import check, loader
    from dave_fast.bench.cases import cases_of
    from dave_fast.bench.rates import DTYPES
    from dave_fast.bench.shapes import build_model, shapes_of, spec_of
    from dave_fast.bench.timing import clock

    torch.set_num_threads(wanted["threads"])
    device, dtype = wanted["device"], DTYPES[wanted["precision"]]
    load = loader(wanted["backend"], device)
    model = build_model(spec_of(wanted), wanted["size"], pretrained=wanted["pretrained"])
    clocks, refused = {}, {}
    for op in wanted["ops"]:
        if op == "engine":
            clocks[op], _ = clock([_engine_call(model, wanted)], device, host=True)
            continue
        shapes = shapes_of(model, wanted["samples"], size=wanted["size"], rows=wanted["rows"])
        for case in cases_of(op, shapes):
            operands = case.operands(torch.Generator(device).manual_seed(wanted["seed"]), dtype)
            agreement, _ = check(case, load, operands, dtype)
            if agreement.reason is None:
                clocks[case.label], _ = clock([case.bind(load, operands, dtype)], device)
            else:
                refused[case.label] = agreement.reason
    return clocks, refused


def refuse_mixed_packages() -> None:
    """Raise ImportError if a module of the package is not of the revision's tree.

    The finder of an editable install supplies modules of the working tree where the revision lacks them, and two
    revisions in one process say nothing about either.
    """
    import dave_fast

    tree = Path(str(dave_fast.__file__)).resolve().parents[1]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        of_bench = name == "dave_fast.bench" or name.startswith("dave_fast.bench.")
        if name.startswith("dave_fast.") and not of_bench and file and tree not in Path(file).resolve().parents:
            advice = "compare revisions whose modules have the same names"
            raise ImportError(f"it has no module {name}, which this bench expects; {advice}")


def _engine_call(model: Any, wanted: dict[str, Any]) -> Callable[[], Any]:
    """Return a call that makes one explanation by the public API."""
    import torch

    from dave_fast.explain.explainer import DAVE

    settings = {key: wanted[key] for key in ("precision", "backend", "device")}
    explainer = DAVE(model, noise_alpha=0.5, internal_batch_size=wanted["rows"], **settings)
    generator = torch.Generator().manual_seed(wanted["seed"])
    images = torch.randn(1, *wanted["image"], generator=generator).to(wanted["device"])
    return lambda: explainer.explain(images, 0, wanted["samples"])


def main() -> None:
    """Answer the questions on standard input."""
    adopt_bench()
    # libraries print to standard error, so that only answers are on standard output
    answers, sys.stdout = sys.stdout, sys.stderr
    clocks: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "prepare" in asked:
                clocks, refused = prepare(asked["prepare"])
                refuse_mixed_packages()
                answer: dict[str, Any] = {"names": list(clocks), "refused": refused}
            else:
                answer = {"seconds": clocks[asked["time"]]()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
