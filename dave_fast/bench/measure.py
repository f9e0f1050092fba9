"""One request of `dave-fast bench`, and its result as it is written to JSON."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dave_fast.bench import isas, machine, whole
from dave_fast.bench.agreement import check, loader
from dave_fast.bench.cases import CASES, cases_of
from dave_fast.bench.compare import compare
from dave_fast.bench.op_tests import run_tests
from dave_fast.bench.ops import YOURS, bench_op, registered
from dave_fast.bench.rates import DTYPES
from dave_fast.bench.shapes import Shapes, build_model, shapes_of, spec_of
from dave_fast.bench.sweep import latency_against_samples, memory_against_size
from dave_fast.errors import InputError
from dave_fast.explain.explainer import DAVE
from dave_fast.models.spec import ModelSpec
from dave_fast.ops import _registry
from dave_fast.ops.precision import choose_precision
from dave_fast.plan.families import why_not

ENGINE = "engine"
Say = Callable[[str], None]


def run(
    wanted: dict[str, Any],
    *,
    before: tuple[str, float] | None = None,
    tests: bool = True,
    yours: bool = False,
    sweep: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure, and return the result as it is written to JSON.

    Args:
        wanted: op, model, weights, num_classes, pretrained, size, samples, images, rows, device, precision, backend,
            repeats and budget, as the command's options.
        before: a git revision to compare with, and the ratio − 1 from which the working tree is slower.
        tests: whether to run the ops' tests first.
        yours: whether a backend "yours" is registered.
        sweep: whether to measure latency against S and memory against resolution.
        say: called with a description of each step.

    Returns:
        The result; its "red" lists what is refused, with reasons.

    Raises:
        InputError: an option has no meaning.
        ModelError: the op needs a plan of the model, and there is none.
        BackendError: a backend is unavailable, or operands do not fit the device.
    """
    network: Any = build_model(spec_of(wanted), wanted["size"], pretrained=wanted["pretrained"])
    # an op needs a plan; the engine runs without one
    shapes: Any = None
    if why_not(network) is None or wanted["op"] != ENGINE:
        shapes = shapes_of(network, wanted["samples"], size=wanted["size"], rows=wanted["rows"])
    image = shapes.image if shapes else _image_of(network, wanted["size"])
    result: dict[str, Any] = {
        "setting": {**wanted, "image": "×".join(map(str, image))},
        "environment": machine.environment(device=wanted["device"]),
        "tests": {},
        "red": [],
    }
    names = _names(wanted["op"])
    green = _green(names, result, say) if tests else names
    if before is not None:
        _compare(result, wanted, image, green, before, say)
        return result
    if ENGINE in green:
        result["engine"] = _engine(network, shapes, image, wanted, yours, say)
        if yours and shapes is not None:
            result["red"] += _yours_alone(shapes, wanted)
    settings = {key: wanted[key] for key in ("precision", "device", "backend", "repeats", "budget")}
    ops = [name for name in green if name != ENGINE]
    result["ops"] = [row for name in ops for row in bench_op(name, shapes, progress=say, **settings)]
    if sweep and ENGINE in green:
        _sweep(result, network, image, wanted, say)
    for row in (*result.get("engine", ()), *result["ops"]):
        if row.get("reason"):
            name = row.get("name") or f"{row['op']} {row['case']} by {row['backend']}"
            result["red"].append(f"{name}: {row['reason']}")
    return result


def run_here(wanted: dict[str, Any], kernels: dict[str, str], **settings: Any) -> dict[str, Any]:
    """Return what `run` returns with the user's kernels, or "not measured", a reason.

    Args:
        wanted: of `run`; a precision of None is the default, among those of the instruction set in use.
        kernels: op -> "module:function".
        **settings: further keywords of `run`.
    """
    device = wanted["device"]
    precision = wanted["precision"] or choose_precision(None, torch.device(device))
    if wanted["precision"] is None and isas.why_not(precision, device) is not None:
        precision = "fp32"
    reason = isas.why_not(precision, device)
    if reason is not None:
        return {"not measured": reason}
    with registered(kernels, device):
        return run({**wanted, "precision": precision}, yours=bool(kernels), **settings)


def _green(names: list[str], result: dict[str, Any], say: Say) -> list[str]:
    """Run the tests of ops and return the names whose tests did not fail; outcomes are stored in the result."""
    green = []
    for name in names:
        say(f"tests of {name}")
        result["tests"][name], red = run_tests(name)
        if red:
            result["red"].append(f"{name} is not timed, since its tests are {result['tests'][name]}")
        else:
            green.append(name)
    return green


def _image_of(network: Any, size: int | None) -> tuple[int, int, int]:
    """Return (C, H, W) of a model without a plan, by its configuration or --size."""
    config = getattr(network, "pretrained_cfg", None) or {}
    shape = tuple(config.get("input_size", (3, 224, 224)))
    return (shape[0], size or shape[1], size or shape[2])


def _names(op: str) -> list[str]:
    if op == "all":
        return [ENGINE, *CASES]
    if op != ENGINE and op not in CASES:
        raise InputError(f"there is no op {op!r} to time; there are {', '.join((ENGINE, 'all', *CASES))}")
    return [op]


def _engine(
    network: Any,
    shapes: Shapes | None,
    image: tuple[int, int, int],
    wanted: dict[str, Any],
    yours: bool,
    say: Say,
) -> list[dict[str, Any]]:
    """Measure the engine with the chosen backend, and with the user's kernels if registered."""
    device, precision = wanted["device"], wanted["precision"]
    contestants = []
    for backend in [wanted["backend"] or "auto", *([YOURS] if yours else [])]:
        made = whole.dave(network, precision, wanted["samples"], shapes, device=device, backend=backend)
        made.name += f", {backend}"
        made.rows = (wanted["rows"],)
        contestants.append(made)
    say("float64 truth")
    truth = whole.find_truth(network, torch.randn(whole.CHECKED, *image).to(device), [precision], device)
    return whole.measure(
        contestants,
        truth,
        shapes=shapes,
        images=wanted["images"],
        device=device,
        repeats=wanted["repeats"],
        latencies=max(100, wanted["repeats"]),
        budget=wanted["budget"],
        progress=say,
    )


def _yours_alone(shapes: Shapes, wanted: dict[str, Any]) -> list[str]:
    """Check the user's kernels op by op, since errors of an op can be hidden in a low-precision engine."""
    refused = []
    dtype, device, load = DTYPES[wanted["precision"]], wanted["device"], loader(YOURS, wanted["device"])
    for op in CASES:
        for case in cases_of(op, shapes) if YOURS in _registry.IMPLEMENTATIONS[op] else ():
            operands = case.operands(torch.Generator(device).manual_seed(secrets.randbits(32)), dtype)
            agreement, _ = check(case, load, operands, dtype)
            if agreement.reason is not None:
                refused.append(f"{op} {case.name} by {YOURS}: {agreement.reason}")
    return refused


def _sweep(
    result: dict[str, Any], network: nn.Module, image: tuple[int, int, int], wanted: dict[str, Any], say: Say
) -> None:
    """Measure latency against S and, for timm models, which can be built for other sizes, memory against resolution."""
    device, precision = wanted["device"], wanted["precision"]
    say("latency against S")
    explainer = DAVE(network, device=device, precision=precision, noise_alpha=whole.NOISE_ALPHA)
    result["latency"] = latency_against_samples(explainer, image, wanted["budget"])
    if ModelSpec(wanted["model"]).source[0] != "timm":
        return
    say("memory against resolution")
    build = partial(build_model, wanted["model"])
    samples, rows = wanted["samples"], wanted["rows"] or 1
    result["memory"] = memory_against_size(build, precision=precision, device=device, samples=samples, rows=rows)


def _compare(
    result: dict[str, Any],
    wanted: dict[str, Any],
    image: tuple[int, int, int],
    names: list[str],
    before: tuple[str, float],
    say: Say,
) -> None:
    """Compare with a revision, and store the comparison in the result."""
    fixed = {
        **wanted,
        "ops": names,
        "image": list(image),
        "backend": wanted["backend"] or "auto",
        "threads": torch.get_num_threads(),
        "seed": secrets.randbits(32),
    }
    revision, threshold = before
    found = compare(revision, fixed, repeats=wanted["repeats"], threshold=threshold, progress=say)
    result["compare"] = found
    result["red"] += [f"{name}: {reason}" for name, reason in found["refused"].items()]
    result["red"] += [
        f"{row['name']} is {row['ratio']['median'] - 1:.1%} slower than {revision} (threshold {threshold:.0%})"
        for row in found["rows"]
        if row["slower"]
    ]
