"""The fidelity of each precision on trained and on random weights, and the devices on which it is refused."""

import pytest
import timm
import torch
from PIL import Image

import dave_fast
from dave_fast.errors import InputError, ModelError
from dave_fast.images import preprocessing
from dave_fast.models.demo.scenes import draw_scenes
from dave_fast.ops import _ext
from dave_fast.ops.fp8 import Fp8Weight
from dave_fast.ops.linear import NativeWeight
from dave_fast.ops.precision import choose_precision, why_no_fp8
from tests.tolerances import LOW_PRECISION_RATIO, PEARSON
from tests.variants import ENGINE


def pearson(found, expected):
    """Return the correlation of each map (B, H, W) with the other of its image."""
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (found, expected))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@pytest.fixture(scope="module")
def scenes():
    found = draw_scenes(2, seed=7, split="test", size=128)
    read = preprocessing(dave_fast.DAVE("demo", precision="fp32").model)
    return torch.stack([read(Image.fromarray(image))[0] for image in found.images])


@pytest.fixture(scope="module")
def single(scenes):
    return dave_fast.DAVE("demo", precision="fp32").explain(scenes, n_samples=50)


@pytest.mark.usefixtures("emulated_bytes")
@pytest.mark.parametrize(
    ("precision", "backend"), [("bf16", "auto"), ("int8", "auto"), ("int8", "torch"), ("fp8", "torch")]
)
def test_final_maps_of_the_demo_model_keep_to_float32(scenes, single, precision, backend):
    found = dave_fast.DAVE("demo", precision=precision, backend=backend).explain(scenes, single.target, n_samples=50)
    assert pearson(found.maps, single.maps).min() >= PEARSON[precision]
    assert torch.equal(found.output.argmax(1), single.target)


@pytest.mark.slow
def test_raw_of_a_random_vit_b_is_as_near_to_float64_as_plain_bfloat16():
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224").eval()
    images = torch.randn(1, 3, 224, 224)

    def raw(precision, **settings):
        explainer = dave_fast.DAVE(model, precision=precision, noise_alpha=0.5, **settings)
        return explainer.explain(images, 3, n_samples=4).raw.double()

    exact = raw("fp64", route="engine")

    def error(found):
        return ((found - exact).norm() / exact.norm()).item()

    plain = error(raw("bf16", route="frozen"))
    assert error(raw("bf16", route="engine")) <= LOW_PRECISION_RATIO * plain


def test_every_gemm_of_the_blocks_has_e4m3_operands_and_activations_stay_bfloat16():
    explainer = dave_fast.DAVE(ENGINE["vit"].build(), precision="fp8", backend="torch", noise_alpha=0.5)
    images = ENGINE["vit"].images(2)
    found = explainer.explain(images, n_samples=3)
    assert found.raw.isfinite().all() and explainer.route == "engine"
    plan = explainer._cache.route(images).plan
    assert plan.dtype == torch.bfloat16
    eight = [isinstance(w, Fp8Weight) for p in plan.projections() for w in (p.weight, p.transposed)]
    assert not any(eight[:2]) and all(eight[2:]) and len(eight) > 2


def test_fp8_without_hardware_is_refused_unless_the_reference_is_asked_for(monkeypatch):
    with pytest.raises(InputError, match=r"a CPU does not multiply e4m3.*backend='torch'"):
        dave_fast.DAVE("demo", precision="fp8")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 (compute capability 8.0) has no e4m3" in why_no_fp8(cuda)
    assert choose_precision("fp8", cuda, "torch") == "fp8"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_precision("fp8", cuda) == "fp8"


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("route", ["auto", "frozen"])
@pytest.mark.parametrize(("has", "advice"), [(True, "bf16"), (False, "fp32")])
def test_eight_bits_need_the_engine(monkeypatch, has, advice, route, precision):
    monkeypatch.setattr("dave_fast.ops.precision.has_bf16", lambda device: has)
    model = ENGINE["vit"].build() if route == "frozen" else torch.nn.Sequential(torch.nn.Flatten())
    explainer = dave_fast.DAVE(model, precision=precision, backend="torch", route=route, noise_alpha=0.5)
    with pytest.raises(ModelError, match=f"{precision}' needs the engine's GEMMs, but .*Use precision='{advice}'"):
        explainer.explain(ENGINE["vit"].images(1))


@pytest.mark.parametrize(("has", "advice"), [(True, "bf16"), (False, "fp32")])
def test_int8_is_refused_without_the_core_without_its_instructions_and_on_a_gpu(monkeypatch, has, advice):
    monkeypatch.setattr("dave_fast.ops.precision.has_bf16", lambda device: has)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    words = rf"precision='int8' was asked for, but {{}}: use '{advice}', or backend='torch' to see"
    with pytest.raises(InputError, match=words.format("dave-fast multiplies .* CPUs alone, and this is a CUDA")):
        choose_precision("int8", cuda)
    with monkeypatch.context() as patch:
        patch.setattr(_ext, "multiplies_bytes", lambda: False)
        with pytest.raises(InputError, match=words.format("this CPU has neither AVX512-VNNI nor AVX-VNNI nor Arm's.*")):
            dave_fast.DAVE(ENGINE["vit"].build(), precision="int8", noise_alpha=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(_ext, "unavailable", lambda: "the extension dave_fast._native was not built")
        with pytest.raises(InputError, match=words.format("the extension dave_fast._native was not built")):
            dave_fast.DAVE(ENGINE["vit"].build(), precision="int8", noise_alpha=0.5)
        # emulated, which needs neither
        assert choose_precision("int8", cpu, "torch") == choose_precision("int8", cuda, "torch") == "int8"


@pytest.mark.usefixtures("emulated_bytes")
def test_int8_in_pytorch_is_that_in_cpp_but_for_roundings():
    """Every product has the same bits; activations, norms and attention have other roundings."""
    images = ENGINE["vit"].images(2)
    raw = [
        dave_fast.DAVE(ENGINE["vit"].build(), precision=precision, backend=backend, noise_alpha=0.5)
        .explain(images, 1, n_samples=3)
        .raw
        for precision, backend in (("int8", "auto"), ("int8", "torch"), ("fp32", "auto"))
    ]
    error, emulated = ((found - raw[2]).norm() / raw[2].norm() for found in raw[:2])
    assert 0.005 < error < 1.5 * emulated and emulated < 1.5 * error


@pytest.mark.usefixtures("emulated_bytes")
def test_every_product_of_the_blocks_has_operands_of_bytes_and_the_stream_stays_float32():
    explainer = dave_fast.DAVE(ENGINE["vit"].build(), precision="int8", noise_alpha=0.5)
    images = ENGINE["vit"].images(2)
    assert explainer.explain(images, n_samples=3).raw.isfinite().all() and explainer.route == "engine"
    plan = explainer._cache.route(images).plan
    assert plan.dtype == torch.bfloat16 and plan.stream == torch.float32
    operands = [w.operand for p in plan.projections() for w in (p.weight, p.transposed) if isinstance(w, NativeWeight)]
    assert operands.count("int8") == 2 * (len(plan.projections()) - 1)
