"""Tests of fingerprints: structure is compared on the host, values by checksums of their bits."""

import functools
import sys
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from dave_fast.models import fingerprint as weights
from dave_fast.models.fingerprint import COLUMNS, GROUP, WORD, State, checksums, fingerprint, structure

LARGE = 8000  # float32 values are more than 28 KiB, of which one group of rows is summed


def model(dtype=torch.float32, values=LARGE):
    made = nn.Module()
    generator = torch.Generator().manual_seed(0)
    made.register_buffer("values", torch.randn(values, generator=generator).mul(100).to(dtype))
    return made


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.complex64]


def swap(first, second):
    def change(t):
        second_place = second % len(t)
        t[[first, second_place]] = t[[second_place, first]]

    return change


def rows(t):
    """Return a view (n, 8) of the values that fill rows of 8."""
    return t[: len(t) // 8 * 8].view(-1, 8)


def flip_a_bit(t):
    t.view(torch.uint8)[t.nbytes // 2].bitwise_xor_(64)


CHANGES = {
    "one element": lambda t: t[1].add_(1),
    "the last element": lambda t: t[-1].add_(1),
    "the sign of all": lambda t: t.neg_(),
    "twice as large": lambda t: t.mul_(2),
    "half as large": lambda t: t.copy_(t / 2),
    "the sign of one half": lambda t: t[: len(t) // 2].neg_(),
    "the sign of every second one": lambda t: t[::2].neg_(),
    "one bit": flip_a_bit,
    "two neighbours that change places": swap(0, 1),
    "two far apart that change places": swap(0, -1),
    "the order of rows": lambda t: t[: rows(t).numel()].copy_(rows(t).flip(0).flatten()),
    "a transposition": lambda t: t[: rows(t).numel()].copy_(rows(t).T.flatten()),
    "zeros": lambda t: t.zero_(),
    "a shift by one": lambda t: t.copy_(t.roll(1)),
    "two halves that change places": lambda t: t.copy_(t.roll(len(t) // 2)),
}


@pytest.mark.parametrize("values", [17, 1001, LARGE, 8 * LARGE + 3, 1 << 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_through_data_change_the_checksums(dtype, values):
    made = model(dtype, values)
    before, structure, original = checksums(made), weights.structure(made), made.values.clone()
    for name, change in CHANGES.items():
        change(made.values.data)
        assert not same(before, checksums(made)), name
        # the structure is equal, so that only the values show the change
        assert weights.structure(made) == structure, name
        made.values.data.copy_(original)
        assert same(before, checksums(made)), name


def test_a_change_that_keeps_the_sum_changes_the_checksums():
    made = model()
    before = checksums(made)
    made.values.data[0] += 64
    made.values.data[4000] -= 64
    assert not same(before, checksums(made))


def test_nan_is_compared_by_its_bits():
    made = model()
    made.values.fill_(torch.nan)
    state = State(made, values=True)
    assert state.holds(values=True)
    made.values.data[3] = 1
    assert state.holds(values=False) and not state.holds(values=True)


def test_checksums_do_not_depend_on_the_threads():
    made, threads = model(values=1 << 20), torch.get_num_threads()
    before = checksums(made)
    try:
        torch.set_num_threads(1)
        assert same(before, checksums(made))
    finally:
        torch.set_num_threads(threads)


def test_unusual_memory_layouts_have_checksums():
    """The cases are strides, odd offsets, conjugate views, expanded, sparse and meta tensors, and no tensors at all."""
    assert checksums(nn.Module()) == []
    base = torch.randn(2 * LARGE + 1)
    odd = {
        "transposed": base[: 2 * LARGE].view(2, LARGE).T,
        "offset": base[1 : LARGE + 1],
        "conjugate": torch.randn(LARGE, dtype=torch.complex64).conj(),
        "expanded": torch.randn(1).expand(LARGE),
    }
    for name, values in odd.items():
        made = nn.Module()
        made.register_buffer("values", values)
        before = checksums(made)
        assert same(before, checksums(made)), name
        values.mul_(2) if name != "expanded" else values[:1].mul_(2)
        assert not same(before, checksums(made)), name
    made.register_buffer("elsewhere", torch.empty(3, device="meta"))
    assert len(checksums(made)) == 1
    sparse = nn.Module()
    sparse.register_buffer("values", torch.eye(3).to_sparse())
    before = checksums(sparse)
    sparse.values.mul_(2)
    assert not same(before, checksums(sparse))


def test_a_tied_weight_counts_once():
    made = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])
    alone = checksums(made[:1])
    made[1].weight = made[0].weight
    assert same(checksums(made), alone)


def test_inference_tensors_have_checksums_but_no_version():
    with torch.inference_mode():
        made = model()
    before = fingerprint(made)
    assert before == fingerprint(made)
    with torch.inference_mode():
        made.values.add_(1)
    assert before != fingerprint(made)


def test_values_are_not_read_without_values_true(monkeypatch):
    state = State(model(), values=False)
    monkeypatch.setattr(weights, "checksums", lambda model: pytest.fail("the weights were read"))
    assert state.checksums() == [] and state.has([]) and state.holds(values=True)


@pytest.mark.parametrize("words", [GROUP * COLUMNS, 6 * GROUP * COLUMNS])
def test_up_to_three_summed_words_cannot_cancel(words):
    """Changes are in one row, in one column and at three corners; they sum to zero, or flip the highest bit."""
    made = model(torch.int64, words)
    before, kept = checksums(made), made.values.clone()
    top = -(1 << 63)
    for places in ((0,), (0, 1), (0, COLUMNS), (0, COLUMNS + 1), (0, 1, 2), (0, 1, COLUMNS), (0, COLUMNS, 2 * COLUMNS)):
        for amounts in ((5, -5, 0), (1, 1, -2), (top, top, top)):
            made.values.data[list(places)] += torch.tensor(amounts[: len(places)])
            assert not same(before, checksums(made)), (places, amounts)
            made.values.data.copy_(kept)
    assert same(before, checksums(made))


def test_columns_are_a_prime():
    assert all(COLUMNS % divisor for divisor in range(2, COLUMNS))


def test_checksums_are_small():
    """Checksums have a thousandth of the weights' bytes, and the remainder that is not summed."""
    made = model(values=1 << 22)
    assert sum(part.nbytes for part in checksums(made)) < made.values.nbytes / COLUMNS + WORD * (GROUP + 1) * COLUMNS


def test_a_hook_at_the_address_of_a_removed_one_changes_the_structure():
    made = nn.Linear(2, 2)

    def hook(module, args, output):
        return None

    for register in (made.register_forward_hook, made.register_forward_pre_hook, made.register_full_backward_hook):
        handle = register(hook)
        before = weights.structure(made)
        assert before == weights.structure(made)
        handle.remove()
        register(hook)
        assert before != weights.structure(made)


LIBRARY = """
from torch import nn

def inner(x):
    return 2 * x

def outer(x):
    return inner(x)

class Double(nn.Module):
    def forward(self, x):
        return outer(x)
"""


@pytest.mark.parametrize("first", ["object", "function", "partial", "class", "itself"])
def test_functions_are_followed_anew_where_another_one_stood_when_the_class_was_first_seen(first, monkeypatch):
    library = types.ModuleType("library")
    monkeypatch.setitem(sys.modules, "library", library)
    exec(LIBRARY, vars(library))
    model, outer = library.Double(), library.outer
    stand_ins = {
        "object": Mock(),
        "function": lambda x: 3 * x,
        "partial": functools.partial(outer),
        "class": type("Outer", (), {}),
        "itself": outer,
    }
    library.outer = stand_ins[first]
    structure(model)
    library.outer = outer
    before = structure(model)
    assert structure(model) == before
    library.inner = lambda x: 3 * x
    assert structure(model) != before


def holder():
    """Return a module with what is none of its own modules and tensors: in containers, in objects, as arrays."""
    made = nn.Module()
    made.table = {"settings": types.SimpleNamespace(scale=1.0)}
    made.listed = [types.SimpleNamespace(scale=1.0)]
    made.nested = [[[[[1.0]]]]]
    made.hidden = [nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))]
    made.held = types.SimpleNamespace(module=nn.Sequential(nn.Linear(2, 2)))
    made.array, made.numbers = np.ones(3), {1.0, 2.0}
    return made


HELD = {
    "an object in a table": lambda made: setattr(made.table["settings"], "scale", 2.0),
    "an object in a list": lambda made: setattr(made.listed[0], "scale", 2.0),
    "a number deep in lists": lambda made: made.nested[0][0][0][0].append(2.0),
    "a weight of a module in a list": lambda made: made.hidden[0][0].weight.detach().mul_(2),
    "a setting of a module in a list": lambda made: setattr(made.hidden[0][1], "eps", 0.5),
    "a module of a module in a list": lambda made: made.hidden[0].append(nn.GELU()),
    "a weight of a module in an object": lambda made: made.held.module[0].bias.detach().add_(1),
    "a hook of a module in an object": lambda made: made.held.module[0].register_forward_hook(print),
    "a number of an array": lambda made: made.array.fill(2),
    "a set": lambda made: made.numbers.add(3.0),
}


@pytest.mark.parametrize("name", HELD)
def test_changes_of_what_containers_and_objects_hold_change_the_structure(name):
    made = holder()
    before = structure(made)
    assert structure(made) == before
    HELD[name](made)
    assert structure(made) != before


def test_what_a_forward_writes_into_held_objects_can_be_left_out():
    made = holder()
    before, state = weights.attributes(made), structure(made)
    made.table["settings"].calls = 1
    made.hidden[0][0].calls = 1
    ignored = weights.written(made, before)
    assert structure(made) != state
    state = structure(made, ignored)
    made.table["settings"].calls = made.hidden[0][0].calls = 2
    assert structure(made, ignored) == state
