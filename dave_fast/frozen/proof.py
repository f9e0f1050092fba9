"""The proof of the frozen route on a given model: the affine replay.

Operators (P, norm scales, gates, masks) are recorded at x. Replayed with them, a model is an affine function f of its
input, and the frozen gradient w is its slope: f(x+δ) − f(x) = ⟨w, δ⟩ for any δ, to rounding. Where that fails, some
product that depends on the input was not frozen, or a path lost its gradient.

The proof runs on one image and on a copy of the model in float64 and evaluation mode, so that the tolerance can be
1e-12; the user's model is not called. Casts to lower precision inside the model are ignored. It takes the memory of the
copy (8 bytes a weight) and of the recorded operators, and four forward passes and one backward pass in float64.

The copy that is then run, in the precision that was asked for, comes from the same conversion
(`dave_fast.given.isolation`), and its gradient at the image of the proof is compared with the proven slope:
`check_copy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dave_fast.errors import ModelError, NonFiniteError, NotFrozenError
from dave_fast.frozen.mode import freeze, run_frozen
from dave_fast.frozen.replay import Replay
from dave_fast.frozen.trace import Trace, find_culprit, find_rounding
from dave_fast.given.isolation import class_name, form_of
from dave_fast.given.own_forward import logits_of, own_errors
from dave_fast.models.fingerprint import fingerprint

TOLERANCE = 1e-12
# relative error of a copy's gradient above which it is that of another function: rounding alone gives a few per cent
# in bfloat16 and 1e-5 in float32
PLAIN_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
COPY_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.5, torch.bfloat16: 0.5}

# a model has attention where one of these functions has an operator as a factor, P or softmax(q·kᵀ) of P·v, or where it
# calls softmax and multiplies its weights and the values one by one (MobileViT v2)
ATTENTION = frozenset({"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum", "mm", "softmax"})

# image sizes whose reports are kept for a model: each holds two images in float64
_MOST_REPORTS = 16
# a change of less than this, relative to the output, is rounding
_NO_CHANGE = 1e-14
# allowance for the rounding of the output itself, 45 units in the last place at a tolerance of 1e-12; it matters where
# a model adds a small change to a large constant (CaiT's class token behind a LayerScale of 1e-5)
_OUTPUT_SHARE = 0.01


@dataclass(frozen=True)
class Proven:
    """The frozen gradient that the replay has proved, in float64.

    Attributes:
        x: the image (1, C, H, W).
        cotangent: of the output (1, ...).
        slope: the gradient (1, C, H, W).
    """

    x: Tensor
    cotangent: Tensor
    slope: Tensor


@dataclass(frozen=True)
class ReplayReport:
    """The result of an affine replay.

    Attributes:
        model: name of the model.
        errors: |⟨c, f(x+δ) − f(x)⟩ − ⟨w, δ⟩| / (‖c‖·(‖f(x+δ) − f(x)‖ + ‖f(x)‖/100)), one for each δ of norm ‖x‖; c is
            the cotangent.
        operators: how many operators were recorded.
        functions: names of the functions in which they were used, and "softmax" where it was called.
        proven: what was compared.
        culprit: path and class of the module where it failed, and how; None where it held.
    """

    model: str
    errors: tuple[float, ...]
    operators: int
    functions: frozenset[str]
    proven: Proven = field(repr=False, compare=False)
    culprit: str | None = None

    @property
    def has_attention(self) -> bool:
        """Whether an operator mixes positions: attention, fused, as a matrix product, or as a softmax."""
        return not self.functions.isdisjoint(ATTENTION)

    @property
    def passed(self) -> bool:
        """Whether every error is within `TOLERANCE`; a NaN is not."""
        return all(error <= TOLERANCE for error in self.errors)


def affine_replay(model: nn.Module, inputs: Tensor, *, seed: int = 0, name: str | None = None) -> ReplayReport:
    """Replay a model with the operators of one image at two other inputs and compare with the frozen gradient.

    Args:
        model: any nn.Module.
        inputs: (B, ...), of which the first is used: images (B, C, H, W), or tokens for the tail of a model.
        seed: of the cotangent, a random combination of all outputs, and of the δ; no global generator is changed.
        name: of the model, for messages; None takes that of its class.

    Raises:
        ModelError: the model is random or constant, or cannot be copied.
        NotFrozenError: its path depends on the input.
        NonFiniteError: its output has NaN or infinity.
    """
    replay = Replay(model, inputs, name or class_name(model))
    output = replay.forward(replay.x, Trace())
    _check_output(replay, output)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
    with own_errors(model, "backward pass"), freeze(replay.x):
        (slope,) = torch.autograd.grad(output, replay.x, cotangent)
    steps = [_step(replay.x, generator) for _ in range(2)]
    errors = tuple(_error(replay, output, cotangent, slope, step) for step in steps)
    proven = Proven(replay.x.detach(), cotangent, slope)
    report = ReplayReport(replay.name, errors, len(replay.tape.entries), replay.functions, proven)
    return report if report.passed else replace(report, culprit=_locate(replay, cotangent, steps[0]))


def prove_frozen(model: nn.Module, inputs: Tensor, *, name: str | None = None) -> ReplayReport:
    """Run `affine_replay` and raise NotFrozenError, with the name of the module where it fails, unless it holds."""
    report = affine_replay(model, inputs, name=name)
    if not report.passed:
        raise NotFrozenError(
            f"the frozen gradient of {report.model} would be wrong: with its operators held constant the model is not "
            f"the affine function that it should be; its affine replay is off by {max(report.errors):.1e} (tolerance "
            f"{TOLERANCE:.0e}), because of {report.culprit}. Write that step with functions that have a frozen form "
            "(dave_fast/frozen/rules.py lists them), without detach() or custom autograd functions; where it is a "
            "softmax, a sigmoid or another function of the logits, explain the logits: give the model without it"
        )
    return report


def check_copy(made: nn.Module, model: nn.Module, report: ReplayReport) -> None:
    """Raise ModelError where a copy of a proved model, as it is run, is not what was proved.

    Its frozen gradient has to be the proven one, and its output under frozen operators that of a plain forward pass on
    several images: a model that mixes the images of a batch, or that asks whether gradients are needed, is another one
    in the proof than in its predictions.

    Args:
        made: the copy, in any precision, in evaluation mode.
        model: the model that was proved.
        report: of its proof.
    """
    proven, (device, dtype) = report.proven, form_of(made)
    with torch.inference_mode(False), torch.enable_grad():
        x = proven.x.to(device, dtype).detach().requires_grad_()
        output = run_frozen(made, x.clone(), freeze(x))
        with own_errors(model, "backward pass"), freeze(x):
            (gradient,) = torch.autograd.grad(output, x, proven.cotangent.to(output))
    _check_batches(made, model, x.detach(), output.detach())
    error = float((gradient.to(proven.slope) - proven.slope).norm() / proven.slope.norm())
    # a NaN is refused, too
    if not error <= COPY_TOLERANCE[dtype]:
        precision, finer = str(dtype).removeprefix("torch."), "fp64" if dtype == torch.float32 else "fp32"
        advice = "Remove its casts to a lower precision" if dtype == torch.float64 else f"Give precision='{finer}'"
        raise ModelError(
            f"in {precision} the frozen gradient of {report.model} is off by {error:.0%} from that in float64, most of "
            f"it because of {_locate_rounding(made, model, proven.x)}. {advice}"
        )


def _check_batches(made: nn.Module, model: nn.Module, image: Tensor, output: Tensor) -> None:
    """Raise ModelError where the output for an image depends on the other images, their order, or on gradients.

    Args:
        made: the copy that is run.
        model: of which it is a copy.
        image: (1, C, H, W).
        output: (1, ...), of the image alone under frozen operators.
    """

    def plain(*images: Tensor) -> Tensor:
        batch = torch.cat(images)
        with torch.no_grad(), own_errors(model, f"forward pass on images {tuple(batch.shape)}"):
            return logits_of(model, made(batch))

    # another sign, size and order of pixels, so that what is taken of both images differs from what is taken of one
    other = -0.5 * image.flip(-1)
    first, second = output, plain(other)
    for found, alone in (
        (plain(image, other), torch.cat([first, second])),
        (plain(other, image), torch.cat([second, first])),
    ):
        if found.shape == alone.shape:
            apart = max(float((a - b).double().norm() / b.double().norm()) for a, b in zip(found, alone, strict=True))
        else:
            apart = float("inf")
        if not apart <= PLAIN_TOLERANCE[output.dtype]:
            raise ModelError(
                f"the output of {class_name(model)} for an image differs by {apart:.1%} between a pass over the image "
                "alone with a gradient and a pass over a batch without one; they have to agree, so that what is "
                "explained is what the model predicts. Remove what mixes the images of a batch, and what asks for "
                "requires_grad or torch.is_grad_enabled()"
            )


def _locate_rounding(made: nn.Module, model: nn.Module, x: Tensor) -> str:
    """Name the module of a copy that rounds most, against a float64 copy of the model."""
    exact, rounded = Trace(keeps_calls=True), Trace(keeps_calls=True)
    replay = Replay(model, x, class_name(model))
    replay.forward(replay.x, exact)
    device, dtype = form_of(made)
    with torch.no_grad(), rounded.watching(made):
        made(x.to(device, dtype))
    return find_rounding(exact, rounded, torch.finfo(dtype).eps)


# a model -> its fingerprint, and its reports by image size, the last one used last
_proved: WeakKeyDictionary[nn.Module, tuple[object, dict[tuple[int, ...], ReplayReport]]] = WeakKeyDictionary()


def ensure_proved(model: nn.Module, inputs: Tensor) -> ReplayReport:
    """Run `prove_frozen` once for each model and image size, and again after modules or weights change.

    Changed weights need a new proof, since a branch that a weight of zero switches off was not tested. The first call
    takes about as long as explaining ten images in float64, every later one as long as the fingerprint of the
    weights.

    Args:
        model: any nn.Module.
        inputs: (B, C, H, W), of which the first image is used.
    """
    now, size = fingerprint(model), tuple(inputs.shape[1:])
    known, reports = _proved.get(model, (None, {}))
    reports = dict(reports) if known == now else {}
    report = reports.pop(size, None) or prove_frozen(model, inputs)
    _proved[model] = now, dict([*reports.items(), (size, report)][-_MOST_REPORTS:])
    return report


def _check_output(replay: Replay, output: Tensor) -> None:
    if not output.isfinite().all():
        raise NonFiniteError(
            f"{replay.name} returned NaN or infinity in float64 for the image of the proof: check its weights"
        )
    again = replay.forward(replay.x, Trace())
    if (again - output).norm() > TOLERANCE * output.norm():
        raise ModelError(
            f"{replay.name} is random: two passes over one image differ by {(again - output).abs().max():.1e} though "
            "it is in evaluation mode. Does its forward draw numbers, or call F.dropout without training=self.training?"
        )


def _step(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random δ of the norm of x, or of an image of ones where x is zero."""
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    length = x.detach().norm()
    scale = float(length) if length > 0 else x.numel() ** 0.5
    return direction * (scale / float(direction.norm()))


def _error(replay: Replay, output: Tensor, cotangent: Tensor, slope: Tensor, step: Tensor) -> float:
    """Return the error of one step δ, as `ReplayReport.errors`; raise ModelError where the output does not change."""
    moved = (replay.x + step).detach().requires_grad_()
    change = (replay.forward(moved, Trace()) - output).detach()
    if change.norm() <= _NO_CHANGE * output.detach().norm():
        raise ModelError(
            f"the output of {replay.name} does not change with its input, so that there is nothing to explain: are "
            "its weights loaded (a head or a branch of zeros)?"
        )
    scale = cotangent.norm() * (change.norm() + _OUTPUT_SHARE * output.detach().norm())
    return abs(float((cotangent * change).sum() - (slope * step).sum())) / float(scale)


def _locate(replay: Replay, cotangent: Tensor, step: Tensor) -> str:
    """Replay once more at x and at x + δ with a trace of every module, and name the culprit."""
    before, after = Trace(keeps_calls=True), Trace(keeps_calls=True)
    output = replay.forward(replay.x, before)
    replay.forward((replay.x + step).detach().requires_grad_(), after)
    try:
        # the caller may be under no_grad or in inference mode
        with torch.inference_mode(False), torch.enable_grad(), own_errors(replay.model, "backward pass"):
            return find_culprit(before, after, (output * cotangent).sum())
    except ModelError as error:
        return f"a step that could not be found ({error})"
