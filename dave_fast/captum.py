"""DAVE as a captum `Attribution`, for captum's tunnels, metrics and visualisation.

    from dave_fast.captum import DAVE

    attributions = DAVE(model).attribute(images, target=3)          # signed, of the images' shape
    NoiseTunnel(DAVE(model)).attribute(images, target=3, nt_samples=4, stdevs=0.1)
    sensitivity_max(DAVE(model).attribute, images, target=3)

Needs captum, which the extra `evaluate` installs. The seed is fixed, so that two calls differ by their images alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.engine.checks import describe
from dave_fast.errors import InputError, needs
from dave_fast.explain import explainer
from dave_fast.explain.depth import PIXELS, Depth
from dave_fast.targets.forms import Target

with needs("evaluate", "dave_fast.captum"):
    from captum.attr import Attribution
    from captum.log import log_usage

Inputs = TypeVar("Inputs", Tensor, tuple[Tensor, ...])


class _Supplied(nn.Module):
    """A model that is called with further arguments."""

    def __init__(self, model: nn.Module, further: tuple[Any, ...]) -> None:
        super().__init__()
        self.model, self.further = model, further

    def forward(self, images: Tensor) -> Any:
        return self.model(images, *self.further)


class DAVE(Attribution):
    """`dave_fast.DAVE` as a captum `Attribution`.

    There is no convergence delta: attributions do not sum to a difference of outputs.

    Args:
        forward_func: an nn.Module. DAVE reads its modules, so that a function is not enough.
        settings: keywords of `dave_fast.DAVE` (noise_alpha, precision, device ...).
    """

    def __init__(self, forward_func: nn.Module, **settings: Any) -> None:
        if not isinstance(forward_func, nn.Module):
            raise InputError(f"forward_func is {describe(forward_func)}; DAVE looks into the model: give an nn.Module")
        Attribution.__init__(self, forward_func)
        self._settings = settings
        self._explainer = explainer.DAVE(forward_func, **settings)

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: attributions are effective gradient ⊙ input."""
        return True

    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        n_samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        internal_batch_size: int | None = None,
        *,
        depth: Depth = PIXELS,
    ) -> Inputs:
        """Return signed attributions of the inputs' shape and dtype, as a tuple where the inputs are one.

        Args:
            inputs: images (B, C, H, W), normalised, or a tuple of one such tensor.
            target: captum's forms and those of `dave_fast.targets`; None is the model's only score, or the predicted
                class where it has several.
            additional_forward_args: the model's arguments after the images, the same for all images.
            n_samples: see `dave_fast.DAVE.explain`.
            seed: see `dave_fast.DAVE.explain`.
            internal_batch_size: see `dave_fast.DAVE.explain`.
            depth: one, see `dave_fast.DAVE.explain`.

        Raises:
            InputError: there are several inputs, or additional_forward_args hold a tensor with a row for each image.
        """
        (images,) = inputs if isinstance(inputs, tuple) and len(inputs) == 1 else (inputs,)
        if isinstance(images, tuple):
            raise InputError(f"{len(images)} inputs were given; DAVE explains one tensor of images (B, C, H, W)")
        found = self._with(additional_forward_args).attribute(
            images, target, n_samples=n_samples, seed=seed, depth=depth, internal_batch_size=internal_batch_size
        )
        return (found,) if isinstance(inputs, tuple) else found

    def attribute_future(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: captum's asynchronous call is unsupported."""
        raise NotImplementedError("attribute_future is unsupported; call attribute")

    def _with(self, further: Any) -> explainer.DAVE:
        """Return the explainer of the model with further arguments."""
        if further is None:
            return self._explainer
        further = further if isinstance(further, tuple) else (further,)
        if any(isinstance(each, Tensor) and each.dim() for each in further):
            raise InputError(
                "additional_forward_args hold a tensor; samples of several images share micro-batches, so only what "
                "is the same for all can be passed on. Wrap the model in a module that supplies it"
            )
        return explainer.DAVE(_Supplied(self.forward_func, further), **self._settings)
