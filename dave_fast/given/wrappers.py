"""Models inside of wrappers: what people put around a model for training or speed, and a normalisation ahead of it.

A wrapper is seen through only where calling it is calling the model inside: by its exact class, without hooks and
without a replaced forward. Any other module stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import ModelError, is_out_of_memory
from dave_fast.given.isolation import is_untouched, isolated

# the qualified name of a class, whose library may be absent, and the attribute that holds the model
_HOLDERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "peft.mixed_model.PeftMixedModel": "base_model",
}
_PEFT = "peft.peft_model.PeftModel"
# attributes by which a module says what it is; a wrapper that has them is taken at its word
_SAYS = ("kind", "link", "num_classes", "pretrained_cfg")
# a normalisation may hold an image; one with more numbers is taken for a part of the model
_MOST_NUMBERS = 1_000_000
# an affine map differs by rounding alone, relative to its largest summand
_ROUNDINGS = {torch.float64: 1e-12, torch.float32: 1e-5}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers that compute nothing; a `Normalised` where its images are normalised first.

    Args:
        model: any module; it is not changed, and returned as it is where it is no such wrapper.
    """
    model = _held(model)
    if type(model) is not nn.Sequential:
        return model
    parts = _parts(model)
    if len(parts) == 1:
        return parts[0]
    normalise = nn.Sequential(*parts[:-1])
    normalise.training = model.training
    small = sum(tensor.numel() for tensor in _tensors(normalise)) <= _MOST_NUMBERS
    if not parts or not small or _channel_map(normalise, _channels(parts[-1])) is None:
        return model
    return Normalised(normalise, parts[-1])


class Watched:
    """A model in wrappers that were seen through, as they were.

    Args:
        model: any module; it is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._found, self._visited = model, unwrapped(model), _visited(model)

    def check(self) -> None:
        """Raise ModelError where calling the model is no longer calling what was found inside of it."""
        visited = _visited(self._model)
        if visited == self._visited:
            return
        if _content(unwrapped(self._model)) != _content(self._found):
            raise ModelError(
                f"the {type(self._model).__name__} that was given has been changed since (a hook, or another module "
                "inside): make a new DAVE of it."
            )
        self._visited = visited


def _content(model: nn.Module) -> list[nn.Module]:
    return [*model.normalise.children(), model.model] if type(model) is Normalised else [model]


def _visited(model: nn.Module) -> list[nn.Module]:
    """Return the wrappers that are seen through, and what is in them, in the order of the calls."""
    found = [model]
    while _is_plain(model) and (attribute := _attribute(model)) is not None:
        model = attrgetter(attribute)(model)
        found.append(model)
    if type(model) is nn.Sequential and _is_plain(model):
        found += [each for child in model.children() for each in _visited(child)]
    return found


def last_part(model: Any) -> Any:
    """Return the module whose output is the model's, without wrappers and what stands ahead of it; others as given."""
    if not isinstance(model, nn.Module):
        return model
    parts = _parts(model)
    return parts[-1] if parts else model


class Normalised(nn.Module):
    """A model behind a map scale · x + shift of each channel, as `nn.Sequential(normalise, model)` has it.

    Attributes that it does not have are those of the model, such as `num_classes`.

    Args:
        normalise: computes the map of images (B, C, H, W).
        model: of normalised images.
    """

    def __init__(self, normalise: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.normalise, self.model = normalise, model
        self.training = model.training

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for images that are not normalised."""
        return self.model(self.normalise(images))

    def __getattr__(self, name: str) -> Any:
        """Return a part of this module, else an attribute of the model."""
        # a copy or a pickle of this module is not one of the model
        if name.startswith("__") or name in ("normalise", "model") or "_modules" not in self.__dict__:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def channel_map(self) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift as they are now, (C,) float64 each on the CPU; None if there are none any more."""
        return _channel_map(self.normalise, _channels(self.model))


def _held(model: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers that only hold one."""
    while _is_plain(model) and (attribute := _attribute(model)) is not None:
        model = attrgetter(attribute)(model)
    return model


def _attribute(model: Any) -> str | None:
    """Return the attribute of the module that a wrapper calls; None where a module is no wrapper."""
    name = _name(model)
    if name.startswith("peft.tuners.") and type(model).forward.__qualname__ == "BaseTuner.forward":
        return "model"
    if name != _PEFT:
        return _HOLDERS.get(name)
    tuner = type(model.base_model)
    enable = getattr(tuner, "_enable_peft_forward_hooks", None)
    # LoRA's acts on arguments that no image model is given, other tuners' on every call
    harmless = enable is None or enable.__qualname__.startswith("LoraModel.")
    prompts = any(config.is_prompt_learning for config in model.peft_config.values())
    return "base_model.model" if harmless and not prompts and tuner.__module__.startswith("peft.tuners.") else None


def _name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _is_plain(model: nn.Module) -> bool:
    """Return whether a module has no hooks, no description of its own, and the forward that its library gave it."""

    def library(thing: Any) -> str:
        return str(getattr(thing, "__module__", "")).partition(".")[0]

    says = any(name in vars(model) for name in _SAYS)
    # the forward of TorchScript is no function
    forward = inspect.getattr_static(type(model), "forward")
    return not says and is_untouched(model) and library(forward) == library(type(model))


def _parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a model applies one after another, without wrappers and identities."""
    model = _held(model)
    if type(model) not in (nn.Sequential, nn.Identity, Normalised) or not _is_plain(model):
        return [model]
    return [part for child in model.children() for part in _parts(child)]


def _channels(model: nn.Module) -> int:
    """Return the channels of a model's images: those of its first convolution, otherwise 3."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def _channel_map(module: nn.Module, channels: int) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift (C,) of a module that maps each channel to scale · x + shift; None if it does not."""
    if not all(map(is_untouched, module.modules())):
        return None
    device = next(_tensors(module), torch.empty(0)).device
    shapes = ((2, channels, 6, 8), (1, channels, 9, 7))
    return measured_map(
        lambda: isolated(module, torch.float64), shapes, torch.zeros(0, dtype=torch.float64, device=device)
    )


def measured_map(
    make: Callable[[], Callable[[Tensor], Tensor]], shapes: Sequence[Sequence[int]], like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of a function that maps each channel of images to scale · x + shift; None if it does not.

    It is called with images of zeros, of ones and of several magnitudes. PyTorch's global random generator is not
    changed.

    Args:
        make: returns the function of images (B, C, H, W).
        shapes: of images.
        like: has the device and the dtype of the images.

    Returns:
        (C,) float64 each on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    images = [
        size * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        for shape in shapes
        for size in (1e-2, 1.0, 1e3)
    ]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        before = torch.get_rng_state()
        try:
            function = make()
            shift = function(like.new_zeros(tuple(shapes[0])))
            scale = function(torch.ones_like(shift)) - shift
            fits = all(_is_map(function, image.to(like), scale[0, :, 0, 0], shift[0, :, 0, 0]) for image in images)
        # what is no map of images may raise anything; it is then called as its owner does
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
        if not fits or not torch.equal(torch.get_rng_state(), before):
            return None
    return scale[0, :, 0, 0].detach().cpu().double(), shift[0, :, 0, 0].detach().cpu().double()


def _is_map(function: Callable[[Tensor], Tensor], images: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Return whether output and gradient of a function are those of the map for images (B, C, H, W)."""
    leaf = images.clone().requires_grad_()
    # a copy of the leaf may be changed in place
    output = function(leaf.clone())
    if output.shape != images.shape or not bool((scale.isfinite() & (scale != 0)).all()):
        return False
    scale, shift = scale[:, None, None], shift[:, None, None]
    (gradient,) = torch.autograd.grad(output, leaf, images)
    rounding = _ROUNDINGS[images.dtype] * ((scale * images).abs().amax() + shift.abs().amax())
    near = (output - (scale * images + shift)).abs() <= rounding
    return bool(near.all()) and bool(((gradient - scale * images).abs() <= rounding).all())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's parameters and buffers, and the tensors that it has as attributes."""
    for each in module.modules():
        for value in (*each._parameters.values(), *each._buffers.values(), *vars(each).values()):
            if isinstance(value, Tensor):
                yield value
