"""Memory that runs out: smaller micro-batches with the same result, and an error at one row."""

import logging

import pytest
import torch

import dave_fast
from dave_fast.engine.graphs import Graphs, direct
from dave_fast.errors import OutOfMemoryError, is_out_of_memory
from tests.tiny import random_vit

SHORTAGES = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "torch-c++": RuntimeError("std::bad_alloc"),
    "native": MemoryError("std::bad_alloc"),
}


class Scarce:
    """A route's forward walk with memory for `most` rows."""

    def __init__(self, forward, most, error):
        self.forward, self.most, self.error = forward, most, error
        self.tried = []

    def __call__(self, tokens, levels):
        self.tried.append(len(tokens))
        if len(tokens) > self.most:
            raise self.error
        return self.forward(tokens, levels)


@pytest.fixture(scope="module")
def model():
    return random_vit(img_size=16)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def explainer(model, **settings):
    return dave_fast.DAVE(model, **({"precision": "fp32", "noise_alpha": 0.5} | settings))


def scarce(made, images, most, error):
    """Return the explainer's route, with memory for `most` rows."""
    route = made._cache.route(images)
    route.forward = Scarce(route.forward, most, error)
    return route


@pytest.mark.parametrize("error", SHORTAGES.values(), ids=SHORTAGES)
@pytest.mark.parametrize("route", ["engine", "frozen"])
def test_the_micro_batch_is_halved_and_the_result_is_the_same(model, images, route, error, caplog):
    expected = explainer(model, route=route, internal_batch_size=2).explain(images, 1, n_samples=8)
    made = explainer(model, route=route, internal_batch_size=10)
    walks = scarce(made, images, 3, error)
    with caplog.at_level(logging.WARNING, "dave_fast"):
        found = made.explain(images, 1, n_samples=8)
    assert torch.equal(found.raw, expected.raw) and torch.equal(found.maps, expected.maps)
    # two images' outputs fit; ten rows do not, nor five
    assert walks.forward.tried[:3] == [2, 10, 5] and set(walks.forward.tried[3:]) == {2}
    assert "10 rows a micro-batch; going on with 5" in caplog.text
    assert "5 rows a micro-batch; going on with 2" in caplog.text


def test_the_size_is_remembered(model, images):
    made = explainer(model, internal_batch_size=8)
    walks = scarce(made, images, 4, SHORTAGES["cpu"])
    first = made.explain(images, 1, n_samples=8)
    walks.forward.tried.clear()
    second = made.explain(images, 1, n_samples=8)
    assert max(walks.forward.tried) == 4
    assert torch.equal(first.raw, second.raw)


def test_progress_still_counts_every_row_once(model, images):
    made = explainer(model, internal_batch_size=8)
    scarce(made, images, 4, SHORTAGES["cpu"])
    seen = []
    made.explain(images, 1, n_samples=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_several_classes_survive_out_of_memory(model, images):
    draws = dave_fast.sampling.draw(6, height=16, width=16)
    targets = torch.tensor([[0, 3]])
    expected = explainer(model).contributions(images[:1], draws, targets)
    made = explainer(model)
    scarce(made, images, 3, SHORTAGES["native"])
    found = made.contributions(images[:1], draws, targets)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("times", [1, 100])
def test_a_shortage_for_the_result_is_answered_as_one_of_the_walk(model, images, monkeypatch, times):
    draws, targets = dave_fast.sampling.draw(6, height=16, width=16), torch.tensor([[0, 3]])
    expected = explainer(model, internal_batch_size=3).contributions(images[:1], draws, targets)
    real, shortages = torch.Tensor.new_empty, iter(range(times))

    def new_empty(tensor, *size, **settings):
        if size[0] == expected.shape and next(shortages, None) is not None:
            raise SHORTAGES["cuda"]
        return real(tensor, *size, **settings)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    made = explainer(model)
    if times == 1:
        found = made.contributions(images[:1], draws, targets)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    else:
        with pytest.raises(OutOfMemoryError):
            made.contributions(images[:1], draws, targets)
    # the tensor was asked for in the way that the test spoils
    assert next(shortages, None) != 0


def test_buckets_are_given_up_before_smaller_ones_are_made(model, images):
    made = explainer(model, internal_batch_size=8)
    made._cache.make_graphs = lambda: Graphs(made.device, direct, strict=True)
    walks = scarce(made, images, 4, SHORTAGES["cuda"])
    found = made.explain(images, 1, n_samples=8)
    assert max(walks.forward.tried[walks.forward.tried.index(8) + 1 :]) == 4
    expected = explainer(model, internal_batch_size=4).explain(images, 1, n_samples=8)
    assert torch.equal(found.raw, expected.raw)


@pytest.mark.parametrize(
    ("route", "words"), [("engine", r"takes [\d.]+ MiB by the formula"), ("frozen", "what autograd saves")]
)
def test_one_row_that_does_not_fit_is_refused_with_its_bytes(model, images, route, words):
    made = explainer(model, route=route)
    scarce(made, images, 0, SHORTAGES["cpu"])
    with pytest.raises(OutOfMemoryError, match=words) as raised:
        made.explain(images, n_samples=4)
    assert "MiB are free on cpu" in str(raised.value) and raised.value.__cause__ is SHORTAGES["cpu"]


def test_other_errors_are_not_taken_for_out_of_memory(model, images):
    made = explainer(model)
    scarce(made, images, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        made.explain(images, n_samples=4)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_pytorchs_own_shortage_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_a_shortage_while_depths_are_accounted_for_is_answered_by_smaller_micro_batches(model, images):
    expected = explainer(model).depths(images, 1)
    made = explainer(model)
    route = made._cache.route(images)
    vjp, shortages = route.vjp, iter([SHORTAGES["cpu"]])

    def scarce_once(saved, cotangent, levels):
        error = next(shortages, None)
        if error is not None:
            raise error
        return vjp(saved, cotangent, levels)

    route.vjp = scarce_once
    made.predict(images)
    found = made.depths(images, 1)
    assert next(shortages, None) is None
    assert torch.allclose(found.patches, expected.patches, rtol=1e-5)
