"""The comparison of a route's output with the output of the model itself.

A plan is read from a model's modules, and the frozen route runs a converted copy. Both can differ from what the model
computes: a method that was replaced, a hook, a buffer that does not survive the conversion. So the first output of each
route is compared with the model's own forward, by a copy in the model's own precision. It costs one forward pass on one
image for each route, and nothing for later calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dave_fast.engine.bound_ops import Stream
from dave_fast.engine.build import build_engine
from dave_fast.errors import ModelError, is_out_of_memory
from dave_fast.frozen.trace import Trace
from dave_fast.given.isolation import form_of, isolated
from dave_fast.given.own_forward import own_output
from dave_fast.ops.fp8 import wide
from dave_fast.ops.patches import patchify
from dave_fast.ops.precision import DTYPES
from dave_fast.plan.reading import Reading

# relative error of an output by the machine epsilon of the coarser of the two precisions; deep models reach a tenth
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.06}
NARROW_BOUNDS = {"fp8": 0.3, "int8": 0.15}
# how much larger than the model's own in the same precision the error of a route may be where it exceeds the bound
OWN_ERRORS = 8
# an error above which an output is that of another function, whatever the model's own error is
WORST = {torch.float64: 1e-6, torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
NARROW_WORST = {"fp8": 0.8, "int8": 0.5}
# relative difference, in float64, of the stream behind a module that is another function
_DIFFERS = 1e-7


def disagreement(output: Tensor, model: nn.Module, image: Tensor, precision: str) -> float | None:
    """Return the relative error of a route's output where it is not the model's own; None where it is.

    Where the error is somewhat larger than the bound, the model's own sensitivity decides: a copy in the route's
    precision (in float64 for a route as exact as the model).

    Args:
        output: (1, ...) of the route.
        model: the model.
        image: (1, C, H, W).
        precision: of the route.

    Raises:
        ModelError: the model's own forward raises.
    """
    own_dtype = form_of(model)[1]
    expected = own_output(model, image)
    error = _error(output, expected)
    dtype, bound = DTYPES[precision], NARROW_BOUNDS.get(precision)
    coarser = BOUNDS[dtype] > BOUNDS.get(own_dtype, 0.0)
    coarse = dtype if coarser else own_dtype
    if error <= (bound or BOUNDS[coarse]):
        return None
    if error > NARROW_WORST.get(precision, WORST[coarse]):
        return error
    own = _error(own_output(model, image, dtype if coarser else torch.float64), expected)
    return None if error <= OWN_ERRORS * own * (bound / BOUNDS[dtype] if bound else 1) else error


def _error(output: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two outputs; infinity for other shapes and for NaN."""
    if output.shape != expected.shape:
        return float("inf")
    difference = float((output.to(expected.device).double() - expected.double()).norm())
    size = float(expected.double().norm())
    # an output of zeros alone (a head without weights) has no relative error
    error = difference / size if size else difference
    return error if error == error else float("inf")


def can_run(reading: Reading, image: Tensor) -> bool:
    """Return whether a model as it was read has a forward walk over an image (1, C, H, W) at all, in plain PyTorch."""
    device = reading.position.device
    try:
        engine = build_engine(reading, dtype=torch.float64, device=device, backend="torch")
        engine.forward(patchify(image.to(device, torch.float64), reading.patch_size))
    # shapes that do not fit raise errors of many classes
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


@torch.no_grad()
def find_difference(model: nn.Module, reading: Reading, image: Tensor) -> str:
    """Name the first module whose output is not that of its reading, in float64, as the end of a sentence.

    Args:
        model: a model of one of the families.
        reading: of the model.
        image: (1, C, H, W).
    """
    trace, device = Trace(keeps_calls=True), reading.position.device
    x = image.to(device, torch.float64)
    try:
        made = isolated(model, torch.float64)
        with trace.watching(made):
            made(x)
    # only the name is lost
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"its own forward in float64 ({type(error).__name__}: {error})"
    # what stands around the model puts names ahead of its own
    paths = reading.paths
    calls = {path: call for call in trace.calls for path in paths if f".{call.path}".endswith(f".{path}")}
    if not all(path in calls and calls[path].inputs for path in paths):
        return f"its own forward, which does not run all of {paths[0]} to {paths[-1]}"
    engine = build_engine(reading, dtype=torch.float64, device=device, backend="torch")
    steps = iter(engine.plan.steps)

    def differs(found: Stream, expected: Tensor) -> bool:
        stream = wide(found).view(1, -1, engine.plan.width)
        expected = expected[:, : stream.shape[1]]
        if engine.plan.centred:
            expected = expected - expected.mean(-1, keepdim=True)
        return _error(stream, expected) > _DIFFERS

    stream, *_ = engine.forward.embed(patchify(x, reading.patch_size))
    if differs(stream, calls[paths[0]].inputs[0][1]):
        return "what is ahead of its blocks (patch embedding, positions, class token, norm)"
    for path, block in zip(paths, reading.blocks, strict=True):
        stream = calls[path].inputs[0][1].reshape(-1, engine.plan.width)
        if engine.plan.centred:
            stream = stream - stream.mean(-1, keepdim=True)
        for _ in block:
            stream, *_ = engine.forward.step(next(steps), stream, None, 1, {})
        if differs(stream, calls[path].outputs[0][1]):
            return f"its {calls[path].name}"
    return "what follows its blocks (norm, pooling, head)"


class PlanDiffersError(ModelError):
    """A model whose plan computes something else; the message is the reason, as the end of a sentence."""
