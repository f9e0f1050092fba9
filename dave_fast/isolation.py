"""Independent copies of modules, so that a caller's model is read and never run.

A model's forward may keep attention maps, count its calls or write into buffers. Whatever dave-fast runs is therefore a
copy that shares no tensor with the model: `isolated` is the one conversion by which the proof, the frozen route, the
engine's tail and the comparison with the model's own output get theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.overrides import TorchFunctionMode

from dave_fast.errors import DaveFastError, ModelError, is_out_of_memory, reason_of

_COMPLEX = {torch.float64: torch.complex128}
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def isolated(model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
    """Return a copy of a model in evaluation mode that shares no tensor with it.

    Tensors are copied wherever the model keeps them: parameters, buffers, plain attributes, and those inside of lists
    and objects. None of the copies requires a gradient or has a graph. Attributes that cannot be copied, such as locks
    and generators, are shared.

    Args:
        model: any module.
        dtype: of floating-point tensors; complex tensors get the complex dtype of at least its precision, and keep
            their imaginary part. None keeps each tensor's own.
        device: of all tensors; None keeps each tensor's own.

    Raises:
        ModelError: the model cannot be copied.
    """
    conversion = _Conversion(dtype, device)
    with torch.inference_mode(False), torch.no_grad():
        try:
            try:
                made = conversion.deepcopy(model, {})
            except Exception:
                made = conversion.deepcopy(model, {id(value): value for value in _uncopyable(model)})
            made.eval().requires_grad_(False)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{type(model).__name__} cannot be copied, and it is explained by a copy so that it is not changed: "
                f"{type(error).__name__}: {reason_of(error)}. Give a model that copy.deepcopy can copy"
            ) from error
    _require_same(model, made)
    return _uncompiled(made)


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return a model with the modules that torch.compile wraps in their wrappers' place: its graphs hide operators."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is OptimizedModule:
                module.register_module(name, child._orig_mod)
    return model._orig_mod if type(model) is OptimizedModule else model


class _Conversion(TorchFunctionMode):
    """A mode in which `copy.deepcopy` detaches and converts every tensor."""

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        super().__init__()
        self._dtype, self._device = dtype, device

    def deepcopy(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        with self:
            return copy.deepcopy(model, memo)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._converted(tensor)
            return memo[id(tensor)]
        # how a parameter copies its values
        return self._converted(args[0]) if func is Tensor.clone else func(*args, **(kwargs or {}))

    def _converted(self, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if self._dtype is not None and dtype.is_complex:
            dtype = _COMPLEX.get(self._dtype, torch.complex64)
        elif self._dtype is not None and dtype.is_floating_point:
            dtype = self._dtype
        return tensor.detach().to(self._device or tensor.device, dtype, copy=True)


def _uncopyable(model: nn.Module) -> Iterator[Any]:
    """Yield the attributes of all modules, also those in lists and dictionaries, that copy.deepcopy cannot copy."""
    modules = {id(module): module for module in model.modules()}
    pending = [value for module in modules.values() for value in vars(module).values()]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module | Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple | set | frozenset | dict):
            pending += [*value.values()] if isinstance(value, dict) else [*value]
            continue
        try:
            _Conversion(None, None).deepcopy(value, dict(modules))
        # what __deepcopy__ and __reduce__ raise can be of any class
        except Exception:
            yield value


def _require_same(model: nn.Module, made: nn.Module) -> None:
    """Raise ModelError where a copy has other modules or hooks; torch.fx's GraphModule loses its hooks, for one."""
    own, copied = list(model.named_modules()), list(made.named_modules())
    for (path, module), (other, twin) in zip(own, copied, strict=False):
        same = path == other and len(own) == len(copied)
        # a forward that was set on a compiled module is not copied
        same = same and (type(module) is not OptimizedModule or hasattr(module.forward, "_torchdynamo_orig_callable"))
        if not same or any(len(getattr(module, hooks)) != len(getattr(twin, hooks)) for hooks in _HOOKS):
            where = f"module {path!r} ({type(module).__name__})" if path else type(module).__name__
            raise ModelError(
                f"{type(model).__name__} cannot be copied, and it is explained by a copy so that it is not changed: "
                f"copy.deepcopy loses hooks or modules of {where}. Put what the hooks do into a module's forward"
            )


def check_readable(model: nn.Module) -> None:
    """Raise ModelError for a model whose weights or code cannot be read: compiled, quantised, sharded, not loaded."""
    for path, module in model.named_modules():
        where = f"its module {path!r} ({type(module).__name__})" if path else f"it ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise _unreadable(model, f"{where} is TorchScript, whose operators cannot be held constant", "was made of")
        if type(module).__module__.startswith(_QUANTISED):
            raise _unreadable(model, f"{where} has quantised weights", "was before it was quantised")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                _check_tensor(model, f"{path}.{name}".strip("."), tensor)


def _check_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    kind = type(tensor.data).__name__ if not nn.parameter.is_lazy(tensor) else type(tensor).__name__
    if nn.parameter.is_lazy(tensor):
        raise _unreadable(model, f"{name!r} has no values yet ({kind})", "is after a first call")
    if tensor.is_meta:
        raise _unreadable(model, f"{name!r} is on the meta device and has no values", "is with its weights loaded")
    if kind == "DTensor" or "Flat" in type(tensor).__name__:
        raise _unreadable(model, f"{name!r} is a shard ({kind}) of a distributed model (FSDP)", "is with full weights")
    if tensor.is_quantized or kind != "Tensor":
        raise _unreadable(model, f"{name!r} is quantised or of another kind ({kind})", "was before its conversion")


def _unreadable(model: nn.Module, why: str, instead: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} cannot be explained: {why}, and a floating-point nn.Module in PyTorch's own operators "
        f"is expected. Give the model as it {instead}"
    )


@contextmanager
def own_errors(model: nn.Module, doing: str) -> Iterator[None]:
    """Run a caller's code within this context; its exceptions are chained to a ModelError that names the model.

    Args:
        model: the module that is run.
        doing: what is done with it, for the message: "forward pass on images (1, 3, 224, 224)".

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
        advice = "Call the model on such images yourself: does it work, also in this precision?"
        if "use_reentrant" in str(error):
            advice = "Switch activation checkpointing off, or build it with use_reentrant=False"
        raise ModelError(
            f"the {doing} of {type(model).__name__} raised {type(error).__name__}: {reason_of(error)}. {advice}"
        ) from error


def logits_of(model: nn.Module, output: object) -> Tensor:
    """Return a model's output, or its entry `logits`; raise ModelError where there is no such tensor."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ModelError(
            f"the model {type(model).__name__} returned {type(output).__name__}{keys}; expected a tensor (B, classes) "
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


def form_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a model's first floating-point parameter or buffer; float32 on the CPU without one."""
    tensors = (*model.parameters(), *model.buffers())
    first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    return first.device, first.dtype
