"""The engine on a GPU: graphs against the same kernels launched one by one, memory that runs out, precisions."""

import pytest
import timm
import torch

import dave_fast
from dave_fast.engine.buckets import MOST_ROWS
from dave_fast.errors import OutOfMemoryError
from dave_fast.ops.precision import why_no_fp8
from tests.tolerances import LOW_PRECISION_RATIO
from tests.variants import ENGINE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = ["vit", "deit-distilled", "vit-average", "clip", "dinov2-giant-swiglu", "siglip", "vit-max-pool"]


def pair(name, **settings):
    """Return an explainer with graphs and one without; both have the same buckets."""
    model = ENGINE[name].build()
    return [dave_fast.DAVE(model, device="cuda", noise_alpha=0.5, graphs=g, **settings) for g in (True, False)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_graphs_give_the_bits_of_launching_one_by_one(name, precision):
    images = ENGINE[name].images(3)
    replayed, launched = pair(name, precision=precision, internal_batch_size=8)
    for samples in (16, 5):
        found, expected = (explainer.explain(images, n_samples=samples) for explainer in (replayed, launched))
        assert torch.equal(found.raw, expected.raw) and torch.equal(found.output, expected.output)
    # replays of what is captured by now
    assert torch.equal(replayed.explain(images, n_samples=5).raw, expected.raw)


@pytest.mark.parametrize("name", ["vit", "vit-average", "siglip"])
def test_graphs_give_the_bits_of_launching_one_by_one_at_several_depths(name):
    images = ENGINE[name].images(3)
    replayed, launched = pair(name, internal_batch_size=8)
    # several sets of levels in turns, each a graph of its own over the same memory
    for depth in (["pixels", 0, 1], 1, "pixels", ["pixels", 0, 1]):
        found, expected = (explainer.explain(images, 1, n_samples=5, depth=depth) for explainer in (replayed, launched))
        assert torch.equal(found.maps, expected.maps) and torch.equal(found.raw, expected.raw)


@pytest.mark.parametrize("name", ["vit", "vit-average", "eva02", "beit"])
def test_evidence_on_a_gpu_is_that_of_float64(name):
    model, images = ENGINE[name].build(), ENGINE[name].images(3)
    told = {
        (device, precision): dave_fast.DAVE(model, device=device, precision=precision, noise_alpha=0.0).depths(
            images, 1
        )
        for device, precision in (("cuda", "fp32"), ("cpu", "fp32"), ("cpu", "fp64"))
    }
    truth = told["cpu", "fp64"].patches
    own, plain = ((told[device, "fp32"].patches.cpu().double() - truth).norm() for device in ("cuda", "cpu"))
    assert own <= LOW_PRECISION_RATIO * plain + 1e-6 * truth.norm()


@pytest.mark.parametrize("target", [lambda output: output[:, 1].tanh(), [lambda row: row[1]] * 2], ids=["all", "each"])
def test_callable_targets_between_the_graphs(target):
    images = ENGINE["vit"].images(2)
    replayed, launched = pair("vit")
    assert torch.equal(*(explainer.explain(images, target, n_samples=9).raw for explainer in (replayed, launched)))


def test_a_changed_model_is_captured_anew():
    images = ENGINE["vit"].images(1)
    replayed, _ = pair("vit")
    before = replayed.explain(images, 0, n_samples=4).raw
    with torch.no_grad():
        replayed.model.blocks[0].mlp.fc1.weight.mul_(1.5)
    after = replayed.explain(images, 0, n_samples=4).raw
    fresh = dave_fast.DAVE(replayed.model, device="cuda", noise_alpha=0.5, graphs=True)
    assert not torch.allclose(before, after) and torch.equal(after, fresh.explain(images, 0, n_samples=4).raw)


def test_a_micro_batch_that_does_not_fit_is_halved():
    model = timm.create_model("vit_small_patch16_224").eval()
    total = torch.cuda.mem_get_info()[1]
    explainer = dave_fast.DAVE(model, device="cuda", precision="bf16", noise_alpha=0.5)
    images = torch.randn(1, 3, 224, 224)
    expected = explainer.explain(images, 1, n_samples=64).raw
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**29) / total))
    try:
        small = dave_fast.DAVE(
            model, device="cuda", precision="bf16", noise_alpha=0.5, internal_batch_size=1 << 12, graphs=False
        )
        found = small.explain(images, 1, n_samples=64).raw
    except OutOfMemoryError as error:
        pytest.fail(f"half a gigabyte holds more than one row: {error}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precision_against_float64(precision):
    if precision == "fp8" and why_no_fp8(torch.device("cuda")) is not None:
        pytest.skip(why_no_fp8(torch.device("cuda")))
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images(4)

    def raw(precision, **settings):
        return dave_fast.DAVE(model, precision=precision, noise_alpha=0.5, **settings).explain(images, 1).raw.cpu()

    exact = raw("fp64", device="cpu")

    def error(found):
        return ((found - exact).norm() / exact.norm()).item()

    # bf16 against plain PyTorch's, fp8 against its own reference
    other = {"bf16": ("bf16", {"route": "frozen"}), "fp8": ("fp8", {"backend": "torch"})}[precision]
    plain = raw(other[0], device="cuda", **other[1])
    assert error(raw(precision, device="cuda")) <= LOW_PRECISION_RATIO * error(plain)


def test_micro_batches_are_sized_for_this_chip():
    model = timm.create_model("vit_base_patch16_224").eval()
    explainer = dave_fast.DAVE(model, device="cuda", precision="bf16", noise_alpha=0.3)
    rows = explainer.fitting_rows(torch.randn(1, 3, 224, 224))
    assert 1 < rows <= MOST_ROWS
    route = explainer._cache.route(torch.zeros(1, 3, 224, 224))
    assert route.row_cost(rows) / rows < route.row_cost(1)
