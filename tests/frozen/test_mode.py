"""The frozen route against a second implementation and hand-computed slopes; it leaves the model unchanged."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from dave_fast.errors import ModelError
from dave_fast.frozen.mode import freeze
from tests.frozen.oracle import oracle_vjp
from tests.tolerances import EXACT
from tests.toys import Calls, frozen_forward, frozen_vjp, normal, relative, second_score, slope
from tests.variants import ALL, ENGINE, PLAIN

# Against the oracle


@pytest.mark.parametrize("name", PLAIN)
def test_agrees_with_the_oracle(name: str) -> None:
    model, images = PLAIN[name].build(torch.float64), PLAIN[name].images(dtype=torch.float64)
    expected_output, expected = oracle_vjp(model, images, second_score)
    output, gradient = frozen_vjp(model, images, second_score)
    assert gradient.shape == images.shape and gradient.dtype == images.dtype
    assert not output.requires_grad and not gradient.requires_grad
    assert relative(output, expected_output) < EXACT
    assert relative(gradient, expected) < EXACT


def test_drops_the_operator_variation() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (full,) = torch.autograd.grad(second_score(model(leaf)).sum(), leaf)
    _, gradient = frozen_vjp(model, images, second_score)
    assert relative(gradient, full) > 0.1


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2-giant-swiglu"])
def test_fused_and_explicit_attention_agree(name: str) -> None:
    model, images = ENGINE[name].build(torch.float64), ENGINE[name].images(dtype=torch.float64)
    _, fused = frozen_vjp(model, images, second_score)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    _, explicit = frozen_vjp(model, images, second_score)
    assert relative(explicit, fused) < EXACT


@pytest.mark.parametrize("name", ["vit", "eva02", "swin", "torchvision"])
def test_rows_of_a_batch_are_independent(name: str) -> None:
    variant = ALL[name]
    model, images = variant.build(torch.float64), variant.images(3, torch.float64)
    _, together = frozen_vjp(model, images, second_score)
    alone = torch.cat([frozen_vjp(model, image[None], second_score)[1] for image in images])
    assert relative(together, alone) < EXACT


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["vit", "vit-rms-norm", "siglip", "eva02", "torchvision", "hand-written"])
def test_lower_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    variant = ALL[name]
    _, truth = frozen_vjp(variant.build(torch.float64), variant.images(dtype=torch.float64), second_score)
    output, gradient = frozen_vjp(variant.build(dtype), variant.images(dtype=dtype), second_score)
    assert gradient.dtype == dtype and output.dtype == dtype
    assert relative(gradient.double(), truth) < tolerance


# Nothing is touched


def state(model: nn.Module) -> dict[str, object]:
    """Return all of a model's state that a caller could see changing."""
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": [(k, id(p), p.requires_grad, p.grad) for k, p in model.named_parameters()],
        "modes": [(k, m.training, m.forward.__func__) for k, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    old, new = before.pop("weights"), after.pop("weights")
    assert isinstance(old, dict) and isinstance(new, dict)
    assert before == after and old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("name", ["vit", "vit-swiglu", "torchvision", "xcit"])
def test_the_model_is_untouched(name: str) -> None:
    variant = ALL[name]
    model, images = variant.build(), variant.images()
    first = next(iter(model.parameters()))
    first.grad = torch.ones_like(first)
    before, given = state(model), images.clone()
    frozen_vjp(model, images, second_score)
    assert_same(before, state(model))
    assert torch.equal(images, given) and not images.requires_grad and images.grad is None


def test_the_model_is_untouched_after_an_error() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()

    def fails(module: nn.Module, args: object, output: Tensor) -> None:
        raise RuntimeError("in the middle")

    handle = model.blocks[1].mlp.act.register_forward_hook(fails)
    before = state(model)
    with pytest.raises(ModelError, match="VisionTransformer raised RuntimeError: in the middle"):
        frozen_vjp(model, images, second_score)
    assert_same(before, state(model))
    assert not _get_current_function_mode_stack()
    handle.remove()
    leaf = images.clone().requires_grad_()
    (full,) = torch.autograd.grad(second_score(model(leaf)).sum(), leaf)
    assert relative(frozen_vjp(model, images, second_score)[1], full) > 0.1


def test_parameters_may_be_frozen_and_get_no_gradient() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    _, gradient = frozen_vjp(model, images, second_score)
    assert torch.equal(gradient, expected)


def test_an_input_changed_in_place_by_the_model_stays_the_callers() -> None:
    images = normal(2, 3)
    gradient = slope(lambda x: x.mul_(2).relu_(), images, torch.ones(2, 3))
    assert torch.equal(images, normal(2, 3))
    assert torch.equal(gradient, 2.0 * (images > 0))


# Around the call


def test_works_under_no_grad_and_inference_mode() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    with torch.no_grad():
        assert torch.equal(frozen_vjp(model, images, second_score)[1], expected)
    with torch.inference_mode():
        gradient = frozen_vjp(model, images * 1, second_score)[1]
    assert torch.equal(gradient, expected)


def test_the_context_and_the_forward() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    expected_output, expected = frozen_vjp(model, images, second_score)
    leaf = images.clone().requires_grad_()
    with freeze(leaf):
        output = model(leaf)
    assert torch.equal(output, expected_output)
    assert torch.equal(torch.autograd.grad(second_score(output).sum(), leaf)[0], expected)
    output = frozen_forward(model, leaf)
    assert torch.equal(torch.autograd.grad(second_score(output).sum(), leaf)[0], expected)


def test_activation_checkpointing_is_frozen_too() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    model.set_grad_checkpointing(True)
    _, gradient = frozen_vjp(model, images, second_score)
    assert relative(gradient, expected) < EXACT


def test_threads_do_not_meet() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(4, torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    rows: dict[int, Tensor] = {}

    def explain(i: int) -> None:
        rows[i] = frozen_vjp(model, images[i : i + 1], second_score)[1]

    threads = [threading.Thread(target=explain, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert relative(torch.cat([rows[i] for i in range(4)]), expected) < EXACT


class Output:
    """An object with logits, as transformers' models return."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_an_output_with_logits_is_read() -> None:
    weight = normal(3, 5)

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x @ weight.T)

    output, gradient = frozen_vjp(Wrapped().eval(), normal(2, 5), second_score)
    assert output.shape == (2, 3) and torch.equal(gradient, weight[1].expand(2, 5))


def test_plain_errors() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    with pytest.raises(ModelError, match="training mode: call model"):
        frozen_vjp(model.train(), images, second_score)
    model.eval().head_drop.train()
    with pytest.raises(ModelError, match="'head_drop' \\(Dropout\\) is in training mode"):
        frozen_vjp(model, images, second_score)
    model.eval()
    with pytest.raises(ModelError, match="returned tuple; expected a tensor"):
        frozen_vjp(Calls(lambda x: (x, x)).eval(), images, second_score)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match="does not depend on its input"):
        frozen_vjp(Calls(torch.no_grad()(lambda x: x.mean((2, 3)))).eval(), images, second_score)
