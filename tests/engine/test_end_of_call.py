"""Reads of the device by the host: one copy at the end of a call, whatever the model, rows and micro-batches.

The rehearsal of a GPU is an explainer on the CPU that defers its checks and runs in buckets, as one on a GPU does.
"""

import copy

import pytest
import torch

import dave_fast
from dave_fast import transfers
from dave_fast.engine import end_of_call
from dave_fast.engine.aggregation import attributions
from dave_fast.engine.graphs import Graphs, direct
from dave_fast.errors import ModelError, NonFiniteError
from dave_fast.explain import explainer as explainer_module
from dave_fast.models.catalog import is_private
from dave_fast.models.spec import ModelSpec
from dave_fast.ops import _ext
from dave_fast.sampling import draw, join
from dave_fast.targets import Contrast, Similarity
from tests.engine.waits import looks
from tests.tiny import random_vit

SIZE = 16


def tiny(depth=2):
    return random_vit(img_size=SIZE, depth=depth)


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def plain(model, **settings):
    return dave_fast.DAVE(model, **({"precision": "fp32", "noise_alpha": 0.5} | settings))


def rehearsal(model, **settings):
    made = plain(model, **({"internal_batch_size": 4} | settings))
    made._cache.defers = True
    made._cache.make_graphs = lambda: Graphs(made.device, direct, strict=True)
    return made


def counted(explainer, images, **asked):
    """Return the reads of the second call; the first one makes the walks."""
    explainer.explain(images, **asked)
    with looks() as found:
        explainer.explain(images, **asked)
    return found


# the count is of what runs on a GPU: kernels that look at nothing
needs_kernels = pytest.mark.skipif(
    _ext.unavailable() is not None, reason="PyTorch's forms of the pixel ops look at the draws, on a GPU too"
)

ASKED = {
    "predicted class": {},
    "an int": {"target": 3},
    "an int an image": {"target": [0, 1, 2]},
    "questions": {"targets": [1, Contrast(2, 3), Similarity(torch.ones(5))]},
    "a callable": {"target": lambda output: output[:, 1].tanh()},
}


@needs_kernels
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_looks_do_not_grow_with_tensors_rows_micro_batches_or_images(images, asked):
    few = counted(rehearsal(tiny()), images, n_samples=4, **asked)
    assert few == counted(rehearsal(tiny()), images, n_samples=40, **asked)
    assert few == counted(rehearsal(tiny()), images, n_samples=40, **asked, internal_batch_size=60)
    assert few == counted(rehearsal(tiny(depth=5)), images, n_samples=4, **asked)
    if asked.get("target") != [0, 1, 2]:
        assert few == counted(rehearsal(tiny()), images[:1], n_samples=4, **asked)


@needs_kernels
def test_a_call_looks_at_nothing_but_draws_flags_and_checksums(images):
    found = counted(rehearsal(tiny()), images, n_samples=40, target=3)
    # the angles and image indices of the draws, and the indices of the unperturbed images: all are on the host
    # at the end: the checksums of the one device, the flags of pixels, output and attribution, the range of the images
    assert found == {"tolist": 4, "equal": 1, "_local_scalar_dense": 3}


@needs_kernels
def test_contributions_look_once_at_their_targets_and_not_at_every_micro_batch(model, images):
    explainer = rehearsal(model)
    targets = torch.tensor([[0, 1], [2, 3], [4, 0]])
    totals = []
    for samples in (2, 20):
        rows = join([draw(samples, height=SIZE, width=SIZE, seed=s, sampling=explainer.sampling) for s in range(3)])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
        explainer.contributions(images, rows[order], targets)
        with looks() as found:
            explainer.contributions(images, rows[order], targets)
        totals.append(found)
    assert totals[0] == totals[1] and totals[0].total() < 10


def test_looks_are_counted():
    values = torch.arange(4.0)
    with looks() as found:
        values.sum().item()
        bool(values[0] > 1)
        values[values > 2].tolist()
        values.nonzero()
        torch.equal(values, values)
        values.unique()
    assert found["_local_scalar_dense"] == 2 and found["index"] == found["tolist"] == 1
    assert found["nonzero"] >= 1 and found["equal"] == 1 and found["_unique2"] == 1


def test_the_end_is_one_copy(model, images, monkeypatch):
    copies = []
    monkeypatch.setattr(end_of_call, "moved", lambda tensors, device: copies.append(len(tensors)) or list(tensors))
    explainer = rehearsal(model)
    explainer.explain(images, n_samples=2)
    # classes, probabilities, range; flags of pixels, output and attribution; the checksums of one device
    assert copies == [3 + 3 + 1]


def test_deferred_checks_give_the_bits_of_those_made_at_once(model, images):
    now, later = plain(model, internal_batch_size=4), rehearsal(model)
    for asked in ASKED.values():
        first, second = now.explain(images, n_samples=4, **asked), later.explain(images, n_samples=4, **asked)
        assert torch.equal(first.target, second.target)
        assert torch.equal(first.probability.nan_to_num(-1), second.probability.nan_to_num(-1))
        assert (first.raw - second.raw).abs().max() <= 2e-6 * first.raw.abs().max()


@pytest.mark.parametrize("route", ["engine", "frozen"])
def test_a_write_through_data_is_noticed_by_the_call_itself(model, images, route):
    explainer = rehearsal(model, route=route)
    before = explainer.explain(images, 0, n_samples=2).raw
    model.blocks[0].mlp.fc2.weight.data.neg_()
    found = explainer.explain(images, 0, n_samples=2)
    fresh = rehearsal(copy.deepcopy(model), route=route)
    assert not torch.allclose(before, found.raw)
    assert torch.equal(found.raw, fresh.explain(images, 0, n_samples=2).raw)
    model.head.weight.data.mul_(2)
    assert torch.equal(explainer.predict(images), rehearsal(copy.deepcopy(model), route=route).predict(images))
    model.head.weight.data.mul_(2)
    gradient = explainer.effective_gradient(images, 1)
    assert torch.equal(gradient, rehearsal(copy.deepcopy(model), route=route).effective_gradient(images, 1))
    model.head.weight.data.mul_(2)
    rows = draw(3, height=SIZE, width=SIZE, sampling=explainer.sampling)
    asked = (images[:1], rows, torch.tensor([[2]]))
    fresh = rehearsal(copy.deepcopy(model), route=route)
    assert torch.equal(explainer.contributions(*asked), fresh.contributions(*asked))


@pytest.mark.parametrize("make", [plain, rehearsal])
def test_signs_and_powers_of_two_in_float64_are_noticed(model, images, make):
    model = copy.deepcopy(model).double()
    # large enough to be summed, an even number of words
    model.register_buffer("unused", torch.randn(1 << 16, dtype=torch.float64))
    explainer = make(model)
    explainer.explain(images, 0, n_samples=2)
    for change in (torch.Tensor.neg_, lambda t: t.mul_(2), lambda t: t.mul_(0.5), lambda t: t.copy_(t.flip(0))):
        walks = explainer._cache.route(images)
        change(model.unused.data)
        explainer.explain(images, 0, n_samples=2)
        assert explainer._cache.route(images) is not walks


def test_an_unchanged_model_is_walked_once(model, images):
    explainer = rehearsal(model)
    explainer.explain(images, n_samples=2)
    walks = explainer._cache.route(images)
    for _ in range(2):
        explainer.explain(images, n_samples=2)
    assert explainer._cache.route(images) is walks


def test_nan_weights_do_not_count_as_changed(images):
    """A buffer that nothing reads holds NaN, which differs from itself."""
    model = tiny()
    model.register_buffer("unused", torch.full((5000,), torch.nan))
    for explainer in (plain(model), rehearsal(model)):
        explainer.explain(images, n_samples=2)
        walks = explainer._cache.route(images)
        explainer.explain(images, n_samples=2)
        assert explainer._cache.route(images) is walks


def test_weights_that_change_during_every_try_are_refused(model, images):
    explainer = rehearsal(model)
    explainer.explain(images, n_samples=2)

    def write(done, total):
        model.head.weight.data.add_(1)

    with pytest.raises(ModelError, match="changed twice during one call"):
        explainer.explain(images, n_samples=2, progress=write)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda model, images: images[1].fill_(torch.nan), "the pixels of image 1"),
        (lambda model, images: model.head.bias.data.fill_(torch.inf), "the model's output of image 0, 1, 2"),
    ],
    ids=["pixels", "output"],
)
def test_non_finite_values_are_named_at_the_end(model, images, break_it, words):
    break_it(model, images)
    with pytest.raises(NonFiniteError, match=words):
        rehearsal(model).explain(images, n_samples=2)


def test_attributions_that_are_not_finite_are_named(model, images, monkeypatch):
    explainer = rehearsal(model)
    explainer.explain(images, n_samples=2)

    def spoilt(*args, **settings):
        found = attributions(*args, **settings)
        found.raw[2] = torch.inf
        return found

    monkeypatch.setattr(explainer_module, "attributions", spoilt)
    with pytest.raises(NonFiniteError, match="the attribution of image 2"):
        explainer.explain(images, n_samples=2)


def test_weights_of_a_named_model_are_not_read_at_every_call(monkeypatch):
    read = []
    monkeypatch.setattr("dave_fast.models.fingerprint.checksums", lambda model: read.append(model) or [])
    explainer = dave_fast.DAVE("demo", precision="fp32")
    explainer.predict(torch.zeros(1, 3, 128, 128))
    assert read == []
    with torch.no_grad():
        before = explainer.predict(torch.zeros(1, 3, 128, 128))
        # what leaves a trace is still noticed
        explainer.model.head.weight.mul_(2)
        assert not torch.equal(before, explainer.predict(torch.zeros(1, 3, 128, 128)))


def test_private_models_are_those_that_a_name_loads():
    assert is_private("demo") and is_private(ModelSpec("vit_base_patch16_224")) and is_private("hf:a/b")
    assert not is_private(torch.nn.Linear(1, 1)) and not is_private("package.module:function")


def test_packed_tensors_come_back_whatever_their_dtypes():
    tensors = [
        torch.tensor([True, False, True]),
        torch.randn(2, 3),
        torch.arange(5),
        torch.tensor(1.5, dtype=torch.float64),
        torch.randn(3).to(torch.bfloat16),
        torch.zeros(0, 4),
    ]
    found = transfers.unpacked(transfers.packed(tensors), tensors)
    for tensor, other in zip(tensors, found, strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other)
