"""Tests of copies of a caller's model, and of what is said where a model cannot be read or run."""

import threading
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from dave_fast.errors import ModelError, NotFrozenError
from dave_fast.given.isolation import class_name, form_of, isolated
from dave_fast.given.own_forward import check_readable, logits_of, own_errors, own_output
from tests.tiny import random_vit

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Keeper(nn.Module):
    """A model that has tensors wherever a module can have them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("index", torch.arange(4))
        self.plain = torch.full((4,), 0.5)
        self.listed = [torch.ones(4), {"deep": (torch.ones(4),)}]
        self.learnable = torch.ones(4, requires_grad=True)
        self.with_graph = self.learnable * 2
        self.lock = threading.Lock()
        self.numbers = (i for i in range(9))

    def forward(self, x):
        return self.layer(x) * self.plain


def every_tensor(module):
    return [
        module.layer.weight,
        module.layer.bias,
        module.turns,
        module.index,
        module.plain,
        module.listed[0],
        module.listed[1]["deep"][0],
        module.learnable,
        module.with_graph,
    ]


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_tensors_are_copied_and_converted(dtype):
    model = Keeper()
    made = isolated(model, dtype)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    for own, copied in zip(every_tensor(model), every_tensor(made), strict=True):
        kind = own.dtype if own.dtype == torch.int64 else wide if own.is_complex() else dtype or torch.float32
        assert copied.dtype == kind and copied.data_ptr() != own.data_ptr()
        assert not copied.requires_grad and copied.grad_fn is None
        assert torch.equal(copied.to(own.dtype), own) or dtype in (torch.bfloat16, torch.float16)
    assert made.turns.imag.abs().sum() > 1
    assert not made.training and model.training
    assert made.lock is model.lock and made.numbers is model.numbers


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    made = isolated(model, torch.float64)
    assert made[1].weight is made[0].weight is not model[0].weight


def test_a_model_made_in_inference_mode_is_copied_as_any_other():
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    made = isolated(model)
    assert not made.weight.is_inference() and torch.equal(made.weight, model.weight)


def by_closure(module):
    old = module.forward
    module.forward = lambda x: 3 * old(x)


def by_partial(module):
    module.forward = partial(lambda factor, old, x: factor * old(x), 3, module.forward)


def by_default(module):
    def forward(x, layer=module):
        return 3 * type(layer).forward(layer, x)

    module.forward = forward


def by_method(module):
    module.forward = (lambda self, x: 3 * nn.Linear.forward(self, x)).__get__(module)


def by_nested_function(module):
    old = module.forward

    def inner(x):
        return old(x)

    def forward(x):
        return 3 * inner(x)

    module.forward = forward


def by_tensor(module):
    factor, old = torch.full((1,), 3.0), module.forward
    module.forward = lambda x: factor * old(x)


def by_hook(module):
    module.register_forward_hook(lambda _, args, output, layer=module: output + 2 * nn.Linear.forward(layer, *args))


def by_global(module):
    global GLOBAL_FORWARD
    GLOBAL_FORWARD = module.forward
    module.forward = lambda x: 3 * GLOBAL_FORWARD(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "patch",
    [by_closure, by_partial, by_default, by_method, by_nested_function, by_tensor, by_hook, by_global],
)
def test_a_function_on_a_module_calls_the_copy_and_not_the_model(patch, dtype):
    model = nn.Sequential(nn.Linear(4, 4))
    patch(model[0])
    made = isolated(model, dtype)
    expected = 3 * nn.functional.linear(torch.ones(1, 4), model[0].weight, model[0].bias)
    with torch.no_grad():
        # a call of the model itself would give zero, and fail for the dtype
        model[0].weight.zero_()
        model[0].bias.zero_()
        found = made(torch.ones(1, 4, dtype=dtype))
    assert found.dtype == dtype
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_hooks_and_attributes_that_a_class_drops_are_put_back():
    class Drops(nn.Linear):
        def __deepcopy__(self, memo):
            made = nn.Linear(self.in_features, self.out_features)
            made.load_state_dict(self.state_dict())
            return made

    model = nn.Sequential(Drops(2, 2))
    model[0].register_forward_hook(lambda module, args, output: 5 * output)
    model[0].note = "kept"
    made = isolated(model)
    assert made[0].note == "kept"
    assert torch.equal(made(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_checkpointing_is_switched_off_in_the_copy_alone():
    model = random_vit()
    model.set_grad_checkpointing(True)
    assert not isolated(model).grad_checkpointing and model.grad_checkpointing


def test_a_copy_with_other_modules_is_refused():
    class Loses(nn.Sequential):
        def __deepcopy__(self, memo):
            return nn.Sequential()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Loses(nn.Linear(2, 2))

    with pytest.raises(ModelError, match=r"Outer cannot be copied.*other modules \(inner\.0\)"):
        isolated(Outer())


def test_memory_that_runs_out_is_no_fault_of_the_model(monkeypatch):
    def shortage(*args):
        raise MemoryError

    monkeypatch.setattr(nn.Linear, "__deepcopy__", shortage, raising=False)
    with pytest.raises(MemoryError):
        isolated(nn.Linear(2, 2))


class Short:
    """An object that finds no memory for its copy."""

    def __deepcopy__(self, memo):
        raise MemoryError


def held_by_an_attribute(model, short):
    model.kept = short


def held_in_a_list(model, short):
    model.kept = [short]


def held_by_a_hook(model, short):
    model.register_forward_hook(lambda module, args, output: (output, short)[0])


@pytest.mark.parametrize("keep", [held_by_an_attribute, held_in_a_list, held_by_a_hook])
def test_an_object_without_memory_for_its_copy_is_not_taken_for_one_that_cannot_be_copied(keep):
    model = nn.Linear(2, 2)
    keep(model, Short())
    with pytest.raises(MemoryError):
        isolated(model)


def lazy():
    return nn.LazyLinear(2)


def meta():
    return nn.Linear(2, 2, device="meta")


def scripted():
    # deprecated, and still brought
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(2, 2))


def with_integers():
    model = nn.Linear(2, 2)
    scale = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    model.register_buffer("packed", scale)
    return model


def subclassed():
    class Packed(torch.Tensor):
        pass

    model = nn.Linear(2, 2)
    model.register_buffer("packed", torch.ones(2).as_subclass(Packed))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lazy, "has no values yet"),
        (meta, "weight' is on the meta device"),
        (scripted, "is TorchScript"),
        (with_integers, "packed' is quantised"),
        (subclassed, r"packed' is quantised or of another kind \(Packed\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
def test_weights_that_cannot_be_read_are_refused_with_what_to_give(make, words, inside):
    model = nn.Sequential(make()) if inside else make()
    with pytest.raises(ModelError, match=words) as caught:
        check_readable(model)
    assert "Give the model " in str(caught.value)


def test_readable_models_are_not_refused():
    for model in (random_vit(), Keeper(), random_vit().half(), nn.Sequential()):
        check_readable(model)


class Output:
    def __init__(self, logits):
        self.logits = logits


LOGITS = torch.ones(1, 2)


@pytest.mark.parametrize("output", [LOGITS, Output(LOGITS), {"logits": LOGITS, "features": None}])
def test_logits_are_found(output):
    assert logits_of(nn.Identity(), output) is LOGITS


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "NoneType"),
        ((LOGITS,), "tuple"),
        ({"out": LOGITS}, "dict with out"),
        (Output(None), "Output"),
        (3, "int"),
    ],
)
def test_other_outputs_are_refused_by_their_class(output, words):
    with pytest.raises(ModelError, match=f"Identity returned {words}; expected a tensor"):
        logits_of(nn.Identity(), output)


def test_an_exception_of_the_model_is_chained_and_ours_are_not():
    words = "forward pass of Identity raised KeyError: 'x'"
    with pytest.raises(ModelError, match=words) as caught, own_errors(nn.Identity(), "forward pass"):
        raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
    for error in (NotFrozenError("ours"), MemoryError(), RuntimeError("CUDA out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, own_errors(nn.Identity(), "forward pass"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_output_of_the_model_itself(dtype):
    model = random_vit().to(dtype).train()
    found = own_output(model, IMAGES)
    assert model.training
    with torch.no_grad():
        assert torch.equal(found, model.eval()(IMAGES.to(dtype)))
    assert form_of(model) == (torch.device("cpu"), dtype)
    assert form_of(nn.Identity()) == (torch.device("cpu"), torch.float32)


def test_the_class_that_messages_name():
    from dave_fast.models.adapter import Adapter

    assert class_name(random_vit()) == "VisionTransformer"
    assert class_name(Adapter(random_vit(), kind="classifier")) == "VisionTransformer"
