"""Static buffers, buckets and replays; the stand-in for CUDA graphs runs the recorded work on the same buffers."""

import copy
import gc
import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

import dave_fast
from dave_fast.engine import graphs
from dave_fast.engine.buckets import OWN_BUCKETS
from dave_fast.engine.graphs import CudaCapture, Graphs, direct, fill
from dave_fast.engine.micro_batches import AHEAD, Pacer
from dave_fast.errors import InputError, ModelError
from dave_fast.sampling import draw, join
from dave_fast.targets import Contrast, Patch
from tests.tiny import random_vit

SIZE = 16


def tensors_of(output):
    return [leaf for leaf in pytree.tree_leaves(output) if leaf is not None]


class Replays:
    """A stand-in for CUDA graphs: the same output tensors, erased before the recorded work runs again."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        output = run()

        def replay():
            self.replayed += 1
            kept = tensors_of(output)
            for tensor in kept:
                tensor.fill_(torch.nan)
            for tensor, values in zip(kept, tensors_of(run()), strict=True):
                tensor.copy_(values)
            return output

        return replay


@pytest.fixture(scope="module")
def model():
    return random_vit(img_size=SIZE)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def buffered(model, capture=None, *, strict=False, most=24, **settings):
    """Return an explainer whose micro-batches run in buckets, and the capture."""
    capture = Replays() if capture is None else capture
    settings = {"precision": "fp32", "noise_alpha": 0.5, "internal_batch_size": 4} | settings
    explainer = dave_fast.DAVE(model, **settings)
    explainer._cache.make_graphs = lambda: Graphs(explainer.device, capture, strict=strict, most=most)
    explainer._cache.graphs = explainer._cache.make_graphs()
    return explainer, capture


def plain(model, **settings):
    return dave_fast.DAVE(model, **({"precision": "fp32", "noise_alpha": 0.5} | settings))


def same(found, expected):
    return (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_give_the_bits_of_running_directly(model, images, precision):
    """15 rows in buckets of 4: the last micro-batch is padded."""
    replayed = buffered(model, precision=precision)[0].explain(images, n_samples=5, seed=3)
    ran = buffered(model, direct, precision=precision)[0].explain(images, n_samples=5, seed=3)
    assert torch.equal(replayed.raw, ran.raw) and torch.equal(replayed.output, ran.output)
    if precision == "fp32":
        assert same(replayed.raw, plain(model).explain(images, n_samples=5, seed=3).raw)


@pytest.mark.parametrize("depth", ["pixels", 1, [0, "pixels"]], ids=str)
def test_every_depth_has_graphs_of_its_own_with_the_bits_of_running_directly(model, images, depth):
    bucketed, capture = buffered(model)
    bucketed.explain(images, depth=[0, "pixels", 1], n_samples=2)
    found = bucketed.explain(images, depth=depth, n_samples=2)
    again = bucketed.explain(images, depth=depth, n_samples=2)
    expected = buffered(model, direct)[0].explain(images, depth=depth, n_samples=2)
    for one in (found, again):
        assert torch.equal(one.raw, expected.raw) and torch.equal(one.maps, expected.maps)
    assert capture.replayed


def test_several_questions_replay_one_forward_walk(images):
    dense = random_vit(img_size=SIZE, num_classes=0, global_pool="")
    probe = torch.randn(24, generator=torch.Generator().manual_seed(4))
    asked = [Patch(0, 1), Patch(1, 1, probe), Contrast(Patch(0, 0, probe), Patch(1, 0)), (2, 5)]
    explainer, capture = buffered(dense)
    found = explainer.explain(images, targets=asked, n_samples=5, seed=3)
    ran = buffered(dense, direct)[0].explain(images, targets=asked, n_samples=5, seed=3)
    assert torch.equal(found.raw, ran.raw)
    assert same(found.raw, plain(dense).explain(images, targets=asked, n_samples=5, seed=3).raw)
    # 15 rows in 4 buckets: a forward replay each but the first, which is captured, and four VJPs
    forward, back = 4 + 1, 4 * len(asked)
    assert capture.captured == 2 and capture.replayed == forward + back


def test_work_is_captured_once_a_bucket(model, images):
    explainer, capture = buffered(model)
    first = explainer.explain(images, n_samples=6)
    # three images: a padded bucket of 4 for the outputs; 18 rows in 4·4 + 2: one more bucket
    assert len(explainer._cache.graphs) == 2 and capture.captured == 4
    replayed = capture.replayed
    second = explainer.explain(images + 0.1, n_samples=6)
    assert capture.captured == 4 and capture.replayed == 2 * replayed
    assert torch.equal(explainer.explain(images, n_samples=6).raw, first.raw)
    assert not torch.equal(second.raw, first.raw)


def test_one_images_samples_have_a_bucket_of_their_own(model, images):
    """7 rows in one bucket of 7; by the ladder of 16 they would be padded to 8."""
    explainer, _ = buffered(model, internal_batch_size=16)
    found = explainer.explain(images[:1], 0, n_samples=7).raw
    assert explainer._cache.route(images).own_rows == [7]
    assert sorted(size for _, size, _ in explainer._cache.graphs._buckets) == [1, 7]
    assert torch.equal(found, buffered(model, direct, internal_batch_size=7)[0].explain(images[:1], 0, n_samples=7).raw)


def test_the_number_of_graphs_is_bounded_for_any_sample_counts(model, images):
    explainer, capture = buffered(model, internal_batch_size=16)
    for samples in range(1, 17):
        explainer.explain(images[:1], 0, n_samples=samples)
    route = explainer._cache.route(images)
    assert len(route.own_rows) == OWN_BUCKETS
    # the ladder of 16 has five
    assert len(explainer._cache.graphs) <= 5 + OWN_BUCKETS
    captured = capture.captured
    for samples in range(16, 0, -1):
        found = explainer.explain(images[:1], 0, n_samples=samples).raw
        assert same(found, plain(model).explain(images[:1], 0, n_samples=samples).raw)
    assert capture.captured == captured


def test_short_memory_allows_no_bucket_besides_the_ladder(model, images):
    explainer, _ = buffered(model, internal_batch_size=16)
    explainer._cache.batches(explainer._cache.route(images))
    explainer._cache.route(images).fitting_rows = 2 * 16 + 6
    explainer.explain(images[:1], 0, n_samples=7)
    assert explainer._cache.route(images).own_rows == []
    explainer.explain(images[:1], 0, n_samples=6)
    assert explainer._cache.route(images).own_rows == [6]


def test_an_internal_batch_size_is_the_most_rows_of_any_bucket(model, images):
    explainer, _ = buffered(model, internal_batch_size=4)
    explainer.explain(images[:1], 0, n_samples=7)
    assert max(size for _, size, _ in explainer._cache.graphs._buckets) == 4


def test_padding_repeats_the_last_row():
    buffer = torch.full((4, 2), torch.nan)
    fill(buffer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert buffer.tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    fill(buffer, torch.arange(8.0).view(4, 2))
    assert buffer.flatten().tolist() == list(range(8))


def test_perturb_and_pull_back_may_stay_outside(model, images):
    inside = buffered(model)[0].explain(images, n_samples=5)
    explainer, _ = buffered(model)
    explainer._cache.ops.capturable = False
    assert torch.equal(explainer.explain(images, n_samples=5).raw, inside.raw)


@pytest.mark.parametrize("target", [2, [0, 1, 4], lambda output: output[:, 2].tanh(), [lambda row: row[0]] * 3])
def test_every_kind_of_target_runs_between_the_replays(model, images, target):
    found = buffered(model)[0].explain(images, target, n_samples=5).raw
    assert same(found, plain(model).explain(images, target, n_samples=5).raw)


def test_several_classes_share_one_replay_of_the_forward(model, images):
    explainer, capture = buffered(model)
    draws = draw(4, height=SIZE, width=SIZE, image_keys=(0,), sampling=explainer.sampling)
    targets = torch.tensor([[0, 1, 3]])
    # the output of a new route is compared with the model's own
    explainer.predict(images[:1])
    before = capture.captured, capture.replayed
    found = explainer.contributions(images[:1], draws, targets)
    assert (capture.captured - before[0], capture.replayed - before[1]) == (2, 4)
    assert same(found, plain(model).contributions(images[:1], draws, targets))


def test_rows_of_images_in_any_order(model, images):
    explainer, _ = buffered(model, internal_batch_size=2)
    draws = [draw(2, height=SIZE, width=SIZE, seed=seed, sampling=explainer.sampling) for seed in range(3)]
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    mixed, targets = join(draws)[order], torch.tensor([[0], [1], [2]])
    found = explainer.contributions(images, mixed, targets)
    assert same(found, plain(model).contributions(images, mixed, targets))


def test_the_effective_gradient_and_predictions_use_the_buckets(model, images):
    explainer, capture = buffered(model)
    assert same(explainer.effective_gradient(images, 1), plain(model).effective_gradient(images, 1))
    assert same(explainer.predict(images), plain(model).predict(images))
    assert capture.replayed == 4


def test_the_bucket_used_longest_ago_makes_room(images):
    model = random_vit(img_size=SIZE, dynamic_img_size=True)
    explainer, capture = buffered(model, most=2)
    wide = torch.randn(1, 3, SIZE, 2 * SIZE)
    for some in (images[:1], wide, images[:1]):
        found = explainer.explain(some, 0, n_samples=4).raw
        assert len(explainer._cache.graphs) <= 2
        assert same(found, plain(model).explain(some, 0, n_samples=4).raw)
    # each size: the outputs' bucket of one row, and the samples'; the first size's were gone when it came back
    assert capture.captured == 9


def test_a_changed_model_gets_new_graphs(images):
    model = random_vit(img_size=SIZE)
    explainer, _ = buffered(model)
    before = explainer.explain(images, 0, n_samples=3).raw
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    after = explainer.explain(images, 0, n_samples=3).raw
    assert not torch.allclose(before, after)
    assert torch.equal(after, buffered(copy.deepcopy(model))[0].explain(images, 0, n_samples=3).raw)


def test_threads_take_turns(model, images):
    explainer, _ = buffered(model)
    expected = [explainer.explain(images, 0, n_samples=4, seed=seed).raw for seed in range(4)]
    found = [None] * 4

    def work(seed):
        found[seed] = explainer.explain(images, 0, n_samples=4, seed=seed).raw

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def refuses(run):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_work_that_cannot_be_captured_runs_directly_with_a_note(model, images, caplog):
    explainer, _ = buffered(model, refuses)
    with caplog.at_level(logging.WARNING, "dave_fast"):
        found = explainer.explain(images, n_samples=5).raw
    assert [record.message for record in caplog.records if "not permitted" in record.message][1:] == []
    assert "launched one by one" in caplog.text
    assert torch.equal(found, buffered(model, direct)[0].explain(images, n_samples=5).raw)


def test_strict_graphs_raise_where_capture_fails(model, images):
    with pytest.raises(RuntimeError, match="not permitted"):
        buffered(model, refuses, strict=True)[0].explain(images, n_samples=5)
    explainer, _ = buffered(model, route="frozen")
    explainer._cache._graphs_wanted = True
    with pytest.raises(ModelError, match="graphs=True was asked for, but the frozen route"):
        explainer.explain(images, n_samples=2)


def test_the_frozen_route_needs_no_graphs(model, images):
    explainer, capture = buffered(model, route="frozen")
    found = explainer.explain(images, n_samples=2).raw
    assert capture.captured == 0
    assert same(found, plain(model, route="frozen").explain(images, n_samples=2).raw)


def test_a_cpu_has_no_graphs():
    assert graphs.make_graphs(torch.device("cpu"), None) is None
    assert graphs.make_graphs(torch.device("cpu"), False) is None
    with pytest.raises(InputError, match="graphs=True needs a CUDA device"):
        dave_fast.DAVE("demo", graphs=True)


def test_progress_follows_the_work_while_more_is_queued(monkeypatch):
    waited, seen = [], []

    def mark():
        number = len(marks)
        marks.append(number)
        return SimpleNamespace(synchronize=lambda: waited.append(number))

    marks = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=mark))
    pacer = Pacer(lambda done, total: seen.append((done, total)), 10, torch.device("cuda"))
    for _ in range(5):
        pacer.queued(2)
        assert len(marks) - len(waited) <= AHEAD
    assert seen == [(2, 10), (4, 10), (6, 10)]
    pacer.finish()
    assert seen[-1] == (10, 10) and waited == [0, 1, 2, 3, 4]


def test_without_progress_nothing_waits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("an event was recorded"))
    pacer = Pacer(None, 10, torch.device("cuda"))
    pacer.queued(10)
    pacer.finish()


class Held:
    """An object that counts how many of its class are alive."""

    alive = 0

    def __init__(self):
        Held.alive += 1

    def __del__(self):
        Held.alive -= 1


class Entered:
    """A context manager of a class, as PyTorch's are: those of generators keep the error of a failed block."""

    def __init__(self, enter, leave):
        self._enter, self._leave = enter, leave

    def __enter__(self):
        self._enter()

    def __exit__(self, kind, error, traceback):
        self._leave(kind is not None)


class Capturing:
    """A stand-in for PyTorch's capture on a CPU: ending one in which nothing was launched is an error, as there."""

    def __init__(self, patch):
        self.streams, self.active = ["caller's"], False
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, lambda device: stream)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        patch.setattr(torch.cuda, "stream", lambda stream: Entered(self._push, self._restore))
        patch.setattr(torch.cuda, "graph", lambda graph, **settings: Entered(self._begin, self._end))

    def _push(self):
        self.streams.append("capturing")

    def _restore(self, failed):
        del self.streams[1:]

    def _begin(self):
        self._push()
        self.active = True

    def _end(self, failed):
        self.active = False
        if failed:
            # and the stream stays current
            raise RuntimeError("CUDA Graph is empty")
        self.streams.pop()


def test_an_error_in_a_capture_is_raised_and_its_memory_freed(monkeypatch):
    capturing = Capturing(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))

    def work():
        held = Held()
        if capturing.active:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return held

    # no cycle through the error may keep what the work held until garbage is collected
    gc.disable()
    raised = None
    try:
        capture(work)
    except RuntimeError as error:
        raised = type(error)
    finally:
        gc.enable()
    assert raised is torch.OutOfMemoryError and Held.alive == 0 and capturing.streams == ["caller's"]


def test_an_error_at_the_end_of_a_capture_is_raised(monkeypatch):
    Capturing(monkeypatch)

    def end(failed):
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **settings: Entered(lambda: None, end))
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        CudaCapture(torch.device("cuda"))(lambda: torch.zeros(1))


def test_memory_that_runs_out_within_a_capture_halves_the_micro_batch(model, images, monkeypatch, caplog):
    capturing = Capturing(monkeypatch)
    explainer, _ = buffered(model, CudaCapture(torch.device("cuda")), internal_batch_size=8)
    route = explainer._cache.route(images)
    forward = route.forward

    def scarce(tokens, levels):
        if capturing.active and len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(tokens, levels)

    route.forward = scarce
    with caplog.at_level(logging.WARNING, "dave_fast"):
        explainer.explain(images, 1, n_samples=8)
    assert "8 rows a micro-batch; going on with 4" in caplog.text
    assert "launched one by one" not in caplog.text
    assert max(size for _, size, _ in explainer._cache.graphs._buckets) == 4
