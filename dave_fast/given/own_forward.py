"""A caller's own code: which models can be read at all, its forward on a copy, and the exceptions that it raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dave_fast.errors import DaveFastError, ModelError, is_out_of_memory, reason_of
from dave_fast.given.isolation import class_name, form_of, isolated

# what to do about an error, by the first word of what was done
_ADVICE = {
    "forward": ". Call the model yourself on such images in this precision, and correct what raises",
    "backward": ". Call torch.autograd.grad yourself on its output, and correct what raises",
}
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes")


def check_readable(model: nn.Module) -> None:
    """Raise ModelError for a model whose weights or code cannot be read: compiled, quantised, sharded, not loaded."""
    for path, module in model.named_modules():
        where = f"its module {path!r} ({type(module).__name__})" if path else f"it ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise _unreadable(
                model, f"{where} is TorchScript, whose operators cannot be held constant", "as it was before torch.jit"
            )
        if type(module).__module__.startswith(_QUANTISED):
            raise _unreadable(model, f"{where} has quantised weights", "as it was before it was quantised")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                _check_tensor(model, f"{path}.{name}".strip("."), tensor)


def _check_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    kind = type(tensor.data).__name__ if not nn.parameter.is_lazy(tensor) else type(tensor).__name__
    if nn.parameter.is_lazy(tensor):
        raise _unreadable(model, f"{name!r} has no values yet ({kind})", "after a first call")
    if tensor.is_meta:
        raise _unreadable(model, f"{name!r} is on the meta device and has no values", "with its weights loaded")
    if kind == "DTensor" or "Flat" in type(tensor).__name__:
        raise _unreadable(model, f"{name!r} is a shard ({kind}) of a distributed model (FSDP)", "with full weights")
    if tensor.is_quantized or kind != "Tensor":
        raise _unreadable(model, f"{name!r} is quantised or of another kind ({kind})", "as it was before that")


def _unreadable(model: nn.Module, why: str, instead: str) -> ModelError:
    return ModelError(
        f"{class_name(model)} cannot be explained: {why}, and a floating-point nn.Module in PyTorch's own operators "
        f"is expected. Give the model {instead}"
    )


@contextmanager
def own_errors(model: nn.Module, doing: str) -> Iterator[None]:
    """Run a caller's code within this context; its exceptions are chained to a ModelError that names the model.

    Args:
        model: the module that is run.
        doing: what is done with it, for the message: "forward pass on images (1, 3, 224, 224)", "backward pass".

    Raises:
        ModelError: any exception inside, except the project's own and those that mean that memory ran out.
    """
    try:
        yield
    except DaveFastError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        advice = _ADVICE.get(doing.partition(" ")[0], "")
        if "use_reentrant" in str(error):
            advice = ". Switch activation checkpointing off, or build it with use_reentrant=False"
        raise ModelError(
            f"the {doing} of {class_name(model)} raised {type(error).__name__}: {reason_of(error)}{advice}"
        ) from error


def logits_of(model: nn.Module, output: object) -> Tensor:
    """Return a model's output, or its entry `logits`; raise ModelError where there is no such tensor."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ModelError(
            f"the model {class_name(model)} returned {type(output).__name__}{keys}; expected a tensor (B, classes) "
            "or an output with logits: wrap the model in a module that returns its logits"
        )
    return found


def own_output(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the output (B, ...) of a model's own forward for images (B, C, H, W), computed by a copy on its device.

    Args:
        model: any module; it is not called.
        images: on any device.
        dtype: of the copy; None takes the model's own.

    Raises:
        ModelError: the model cannot be copied, its forward raises, or it returns no tensor.
    """
    made = isolated(model, dtype)
    images = images.to(*form_of(made))
    with torch.no_grad(), own_errors(model, f"forward pass on images {tuple(images.shape)}"):
        return logits_of(model, made(images))
