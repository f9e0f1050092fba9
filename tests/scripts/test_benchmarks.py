"""Test the baselines of benchmarks/ and the tables of their comparison."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dave_fast
from benchmarks import contestants, libraries, machine, memory, plain, side_by_side
from benchmarks.contestants import Within, captum_methods, ours, peer, plain_way, why_no
from benchmarks.peers import LADDER
from dave_fast.bench import rates, whole
from dave_fast.bench.shapes import shapes_of
from dave_fast.errors import InputError
from dave_fast.models.catalog import load_model
from dave_fast.models.demo.model import build_model
from dave_fast.ops.perturb import perturb
from dave_fast.ops.robust_mean import robust_mean
from dave_fast.ops.smooth import smooth
from dave_fast.sampling import draw, normal
from tests.tiny import initial_vit

SIZE = (128, 128)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model().eval().requires_grad_(False)


def test_the_plain_model_is_the_model_and_its_gradient_the_effective_one(model):
    images = torch.randn(2, 3, *SIZE, dtype=torch.float64, requires_grad=True)
    double = build_model().double().eval().requires_grad_(False)
    logits = plain.logits(double, images)
    torch.testing.assert_close(logits, double(images), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits[:, 4].sum(), images)
    expected = dave_fast.effective_gradient(double, images.detach(), 4, precision="fp64", route="frozen")
    assert (gradient - expected).norm() < 1e-12 * expected.norm()


def test_the_plain_pixel_passes_are_the_operations():
    images = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    draws = draw(4, height=24, width=32)
    silent = draws[:]
    silent.noise.zero_()
    tokens = perturb(images, silent, (24, 32), dtype=torch.float64)
    for row, matrix in enumerate(draws.matrices):
        warped = draws.signal[row] * plain.warp(images, matrix)
        torch.testing.assert_close(warped.flatten(), tokens[row, 0], rtol=0, atol=1e-11)
    values = torch.randn(7, 3, 24, 32)
    torch.testing.assert_close(plain.masked_mean(values), robust_mean(values[None])[0])
    raw = torch.randn(3, 24, 32) / 20
    torch.testing.assert_close(plain.smooth(raw), smooth(raw[None])[0], rtol=1e-5, atol=1e-6)
    assert plain.smooth(torch.zeros(3, 24, 32)).eq(0).all()


def test_the_plain_pipeline_agrees_with_ours_at_equal_draws(model):
    image = torch.randn(3, *SIZE)
    explainer = dave_fast.DAVE(model, precision="fp32", noise_alpha=0.5)
    ours = explainer.explain(image[None], 2, 4)
    draws = draw(4, height=SIZE[0], width=SIZE[1], sampling=explainer.sampling)
    noise = normal(draws.keys, draws.samples, image.numel()).view(4, *image.shape)
    raw, _ = plain.explain_plain(model, image, 2, draws, noise)
    # a value on the outlier threshold may fall to either side
    close = (raw - ours.raw[0]).abs() < 1e-4 * raw.abs().max()
    assert close.float().mean() > 0.999


def test_arithmetic_of_the_engine_is_counted_by_hand(model):
    # 64 patches, 65 tokens, C = 144, 4 C in the MLP, 5 blocks, 768 values a patch
    unit = 2 * 65 * 144**2
    whole = 22 * unit + 4 * 2 * 65**2 * 144
    expected = 4 * whole + 3 * unit + 2 * 2 * 64 * 768 * 144
    ours = shapes_of(model, 1).gigaflops()
    assert ours == pytest.approx(expected / 1e9)
    assert plain.gigaflops_a_sample(model, torch.randn(3, *SIZE)) > ours


def kinds(*precisions):
    return [kind for precision in precisions for kind in rates.kinds_of(precision, "cpu")]


@pytest.mark.parametrize("kind", kinds("fp64", "fp32", "bf16", "int8"))
def test_ceilings_count_what_they_run(kind):
    made = rates.ceiling(kind, 8, 16, 32, at_least=1e-4)
    once = 2e-9 * 8 * (16 * 48 + 16 * 16 + 2 * 16 * 32)
    assert made.gigaflops == pytest.approx(once * round(1e-4 / once))
    made.run()


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-6), ("bf16", 0.01), ("int8", 0.03)])
def test_every_librarys_product_of_a_precision_is_the_product(precision, error):
    torch.manual_seed(0)
    dtype = rates.DTYPES[precision]
    x, weight, bias = (torch.randn(*size).to(dtype).double() for size in ((7, 400), (33, 400), (33,)))
    expected = torch.nn.functional.linear(x, weight, bias)
    for kind in kinds(precision):
        torch.manual_seed(0)
        found = rates.product(kind, 7, 400, 33)()
        assert (found.double() - expected).norm() < error * expected.norm(), kind


def test_the_ceiling_is_the_library_with_the_highest_median():
    assert rates.fastest({"a": [1.0, 9.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [1.0, 1.0, 1.5]}) == "b"
    assert rates.kinds_of("fp16", "cpu") == ("mkl-fp16",) and rates.kinds_of("bf16", "cuda") == ("cublas-bf16",)
    assert kinds("fp8") == kinds("fp32")


@pytest.fixture(scope="module")
def small():
    """Return a model, its shapes at S = 6, an image and the truth."""
    model = initial_vit(embed_dim=32, num_classes=16).requires_grad_(False)
    images = torch.randn(whole.CHECKED, 3, 32, 32)
    return model, shapes_of(model, 6), images[0], whole.find_truth(model, images, ["fp32", "fp8"], "cpu")


def test_all_contestants_make_the_same_contributions(small):
    model, shapes, image, truth = small
    field = [plain_way(model, image, 6, shapes), ours(model, image, 6, shapes, "cpu")[0]]
    field += [
        peer(model, replace(LADDER[name], compiled=False), "fp32", 6, shapes, image)
        for name in LADDER
        if "Flex" not in name and LADDER[name].eight_bits is None
    ]
    for each in field:
        found = each.contributions(truth.images, truth.draws)
        assert whole.distance((found,), (truth.contributions,)) <= 2 * truth.plain["fp32"], each.name


def test_a_peers_map_does_not_depend_on_its_micro_batch(small, monkeypatch):
    """Test micro-batches with rows of several images, the last of them padded."""
    model, shapes, image, _ = small
    made = peer(model, LADDER["P1 batched"], "fp32", 6, shapes, image)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(size))
    images = torch.stack([image, image.flip(2)])
    whole_batch, parts = made.explain(images, None), made.explain(images, 5)
    torch.testing.assert_close(parts, whole_batch, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(parts[0], parts[1])


def test_a_run_has_a_row_for_everyone_and_refuses_what_is_wrong(small):
    model, shapes, image, truth = small
    right, *missing = ours(model, image, 6, shapes, "cpu")
    wrong = plain_way(model, image, 6, shapes)
    true_contributions = wrong.contributions
    wrong.contributions = lambda images, draws: 1.01 * true_contributions(images, draws)
    settings = {"shapes": shapes, "images": 2, "device": "cpu", "repeats": 3, "latencies": 4, "budget": 20.0}
    rows = {row["name"]: row for row in whole.measure([right, wrong, *missing], truth, **settings)}
    assert rows["dave-fast fp32"]["images a second"]["repeats"] == 3
    assert rows["dave-fast fp32"]["seconds an image"]["repeats"] == 4
    assert "p99" not in rows["dave-fast fp32"]["seconds an image"]
    assert rows["dave-fast fp32"]["share of ceiling"]["median"] > 0
    assert "its error against float64 is 1.0e-02" in rows["plain"]["reason"]
    assert "images a second" not in rows["plain"]
    assert "e4m3" in rows["dave-fast fp8"]["not measured"]
    assert {"dave-fast bf16", "dave-fast int8"} < rows.keys()


def test_one_wrong_patch_of_one_sample_is_refused(small):
    _, _, _, truth = small
    found = truth.plain_contributions["fp32"].clone()
    assert whole._refused_in_a_part("fp32", found, truth) is None
    size = truth.contributions[0].square().mean().sqrt()
    found[0, 0, :8, :8] += 1e-4 * size
    assert "its error against float64 in " in whole._refused_in_a_part("fp32", found, truth)


def test_an_engine_in_fp8_is_held_against_pytorchs_forms(small):
    """Test that the engine in fp8 passes, and is refused with a scale of one product of the VJP 1.5 times too large."""
    model, shapes, _, truth = small
    made = whole.dave(model, "fp8", 6, shapes, backend="torch")
    row = {}
    assert whole._try(made, truth, row) is None and "reason" not in row
    assert row["error"] == row["plain error"] < 0.1
    (explainer,) = made.contributions.args
    explainer._cache.route(truth.images).plan.projections()[2].transposed.scale.mul_(1.5)
    assert whole._try(made, truth, row) is None
    assert row["error"] < 0.5 and f"(plain PyTorch: {truth.plain['fp8']:.1e})" in row["reason"]


def test_one_wrong_patch_of_one_sample_in_fp8_is_refused(small):
    _, _, _, truth = small
    found = truth.plain_contributions["fp8"].clone()
    assert whole._refused_in_a_part("fp8", found, truth) is None
    found[0, 0, :8, :8] *= 3
    error = whole.distance((found,), (truth.contributions,))
    assert whole.refusal("fp8", error, truth) is None
    assert "its error against float64 in " in whole._refused_in_a_part("fp8", found, truth)


def test_a_precision_without_a_plain_form_is_refused(small):
    *_, truth = small
    assert "nothing was computed plainly in bf16" in whole.refusal("bf16", 1e-9, truth)


def test_a_failing_contestant_leaves_the_other_rows(small):
    """Test that failing micro-batches are not chosen, and that a contestant that cannot run has a reason in its row."""
    model, shapes, image, truth = small
    right = ours(model, image, 6, shapes, "cpu")[0]

    def fails(images, rows):
        if rows != 4:
            raise RuntimeError("CUDA error:\n  invalid argument")
        return right.explain(images, None)

    def none(images, draws):
        raise RuntimeError("no contributions")

    some = whole.Contestant("some", "fp32", 6, fails, rows=(2, 4))
    every = whole.Contestant("every", "fp32", 6, fails, rows=(2,))
    contributions = whole.Contestant("contributions", "fp32", 6, right.explain, none)
    settings = {"shapes": shapes, "images": 1, "device": "cpu", "repeats": 1, "latencies": 1, "budget": 5.0}
    rows = {row["name"]: row for row in whole.measure([every, some, contributions, right], truth, **settings)}
    assert rows["some"]["rows"] == 4 and "images a second" in rows["some"]
    assert rows["every"]["not measured"] == "with 2 rows: RuntimeError: CUDA error: invalid argument"
    assert rows["contributions"]["not measured"] == "RuntimeError: no contributions"
    assert "images a second" in rows[right.name]


@pytest.mark.parametrize("precisions", [["fp32"], ["fp32", "bf16"]])
def test_captum_explains_with_its_passes(small, precisions, monkeypatch):
    """Test captum's methods; a CPU without bfloat16 products emulates them."""
    model, _, image, _ = small
    monkeypatch.setattr(contestants, "best_of", lambda device: precisions[-1])
    methods = captum_methods(model, image)
    expected = [f"captum {name}-50, {precision}" for precision in precisions for name in ("IG", "SmoothGrad")]
    assert [method.name for method in methods] == expected
    for method in methods:
        assert method.not_measured is None
        assert method.explain(image[None], 8).shape == (1, 3, 32, 32)


def test_captums_model_runs_in_bfloat16_between_float32_images_and_gradients(small):
    model, _, image, _ = small
    seen = []
    inner = Within(model, torch.bfloat16)
    for block in inner.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        block.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].dtype))
    images = image[None].clone().requires_grad_()
    output = inner(images)
    (gradient,) = torch.autograd.grad(output[0, 0], images)
    assert seen == 4 * [torch.bfloat16]
    assert output.dtype == gradient.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32


def test_reasons_why_a_precision_is_not_measured():
    assert why_no("fp32", "cpu") is None
    assert "NVIDIA" in why_no("tf32", "cpu")
    assert "e4m3" in why_no("fp8", "cpu")


def rows_of(**images_a_second: list[float]) -> list[dict]:
    return [
        {"name": name, "samples": 8, "images a second": whole.spread(values)}
        for name, values in images_a_second.items()
    ]


def test_ratios_are_taken_repeat_by_repeat():
    rows = rows_of(plain=[1.0, 0.5], ours=[4.0, 5.0])
    side_by_side.ratios(rows, "plain")
    assert rows[1]["times plain"]["all"] == [4, 10]
    side_by_side.ratios(rows, "nobody")
    assert set(rows[0]) == {"name", "samples", "images a second"}
    rows[1] = rows_of(others=[4.0, 5.0])[0] | {"samples": 50}
    side_by_side.ratios(rows, "plain")
    assert "times plain" not in rows[1]


def test_ratios_do_not_count_for_a_slow_baseline_or_other_maps():
    rows = rows_of(plain=[1.0])
    rows[0]["share of ceiling"] = whole.spread([0.675])
    reasons = side_by_side.verdict({"engine": rows, "agreement": {"bf16": 0.5, "fp8": 0.995}})
    assert len(reasons) == 2
    assert "68%" in reasons[0]
    assert "bf16" in reasons[1]


@pytest.mark.parametrize(
    ("given", "isa", "name"),
    [
        ([], "avx2", "side_by_side_vit_base_patch16_224_avx2.json"),
        (["--model", "timm/vit", "--size", "518"], None, "side_by_side_timm_vit_518.json"),
        (["--out", "x/a.json"], "avx2", "a.json"),
        (["--out", "x/a.json", "--isa", "all"], "avx2", "a_avx2.json"),
    ],
)
def test_results_are_named_by_model_size_and_instruction_set(given, isa, name):
    assert side_by_side.place_of(side_by_side.parser().parse_args(given), isa).name == name


def test_peers_are_measured_in_fp32_in_the_best_precision_and_in_eight_bits():
    usual = ("fp32", "bf16")
    assert contestants.precisions_of(LADDER["P1 batched"], usual) == ["fp32", "bf16"]
    assert contestants.precisions_of(LADDER["P4 in integers"], usual) == ["int8"]


def test_work_is_gone_on_with_by_equal_settings_only(tmp_path):
    path = tmp_path / "made_with.json"
    machine.keep_to(path, {"weights": "a", "sizes": (4, 8)})
    machine.keep_to(path, {"weights": "a", "sizes": [4, 8]})
    with pytest.raises(InputError, match=r"holds another run; sizes: \[4, 8\] before, \[4\] now"):
        machine.keep_to(path, {"weights": "a", "sizes": (4,)})


@pytest.mark.parametrize("name", libraries.PAIRS)
def test_timms_model_beside_another_librarys_is_the_same_function(name):
    theirs, own = libraries.pair_of(name, "toy", 32)
    image = torch.randn(1, 3, 32, 32)
    expected = own(image).detach()
    assert (load_model(theirs)[0](image) - expected).norm() < 1e-5 * expected.norm()


def test_libraries_are_measured_beside_timm(capsys):
    libraries.main(
        ["--shape", "toy", "--size", "32", "--samples", "2", "--repeats", "2", "--only", "vit", "--no-write"]
    )
    told = capsys.readouterr().out
    assert told.startswith("ViTForImageClassification") and "of timm's" in told


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.slow
def test_memory_of_an_explanation_holds_its_samples(monkeypatch, capsys):
    monkeypatch.setattr(memory, "PRECISIONS", ("fp32",))
    memory.main(["--model", "demo", "--samples", "200"])
    (taken,) = re.findall(r"demo fp32: (\d+) MiB\n", capsys.readouterr().out)
    samples = 200 * 3 * SIZE[0] * SIZE[1] * 4 >> 20
    assert samples < int(taken) < 10 * samples
