"""Test that every case of every op agrees with float64, and that a wrong form is refused and not timed."""

import pytest
import torch

from dave_fast.bench import timing
from dave_fast.bench.agreement import EXACT, check, distance, loader, poisoned, reference
from dave_fast.bench.cases import CASES, PACKS, cases_of
from dave_fast.bench.ops import YOURS, bench_op, registered
from dave_fast.bench.shapes import build_model, shapes_of
from dave_fast.errors import BackendError, InputError, ModelError, UnknownModelError
from dave_fast.ops import _registry

HERE = "tests.bench.kernels"


def shapes(model="model", samples=5, rows=3):
    return shapes_of(build_model(f"{HERE}:{model}"), samples, rows=rows)


def operands(case, dtype=torch.float32):
    return case.operands(torch.Generator().manual_seed(1), dtype)


def test_every_op_of_the_registry_has_cases():
    assert set(CASES) | set(PACKS.values()) == set(_registry.IMPLEMENTATIONS)


@pytest.mark.parametrize("model", ["model", "gated_model"])
@pytest.mark.parametrize("op", CASES)
def test_every_case_agrees_by_every_backend(op, model):
    for case in cases_of(op, shapes(model)):
        for backend in _registry.IMPLEMENTATIONS[op]:
            if _registry.why_not(op, backend, "cpu") is None:
                agreement, results = check(case, loader(backend, "cpu"), operands(case), torch.float32)
                assert agreement.reason is None, (case.name, backend)
                assert results and case.gigabytes(operands(case), results) > 0


@pytest.mark.parametrize("op", [op for op in CASES if op != "linear_fp8"])
def test_float64_is_held_to_exactness(op):
    for case in cases_of(op, shapes()):
        agreement, _ = check(case, reference, operands(case, torch.float64), torch.float64)
        assert agreement.error <= EXACT


def test_the_products_of_a_block_are_all_there():
    s = shapes()
    cases = {case.name: case for case in cases_of("linear", s)}
    tokens, width = s.rows * s.tokens, s.width
    # 24 C² a token forward, 20 back
    assert sum(case.gigaflops for case in cases.values()) == pytest.approx(44e-9 * tokens * width**2)
    case = cases["values back"]
    found = case.bind(reference, operands(case), torch.float32)()
    given = operands(case)
    expected = (given["x"] @ given["weight"].T) * given["row_scale"][:, None] + given["residual"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bytes_are_those_that_are_read():
    s = shapes()
    inner, tokens = s.heads * s.head_dim, s.rows * s.tokens

    def read(op, dtype=torch.float32, name=None):
        (case,) = [case for case in cases_of(op, s) if case.name == (name or op)]
        return 1e9 * case.gigabytes(operands(case, dtype), ())

    # queries alone and the tables; queries, keys and the cotangent
    assert read("rotate") == pytest.approx(4 * (tokens * inner + s.tokens * s.head_dim))
    assert read("attention_vjp") == pytest.approx(4 * 3 * tokens * inner)
    # x, weights, scales, and the gate, which narrow results have in eight bits
    numbers = tokens * s.width + s.hidden * s.width
    assert read("linear", name="fc2 back") == pytest.approx(4 * (numbers + tokens + tokens * s.hidden))
    narrow = read("linear", torch.bfloat16, "fc2 back")
    assert narrow == pytest.approx(2 * numbers + 4 * tokens + tokens * s.hidden)
    # one row reads one image
    (case,) = cases_of("perturb", shapes(samples=1))
    assert 1e9 * case.gigabytes(operands(case), ()) == pytest.approx(4 * 3 * s.image[1] * s.image[2])


def test_a_row_for_every_backend_with_its_share():
    rows = bench_op("attention", shapes(), precision="fp32", repeats=2, budget=2)
    assert {row["backend"] for row in rows} == set(_registry.IMPLEMENTATIONS["attention"])
    timed = [row for row in rows if "seconds" in row]
    assert timed
    for row in timed:
        assert row["seconds"]["repeats"] >= 1 and row["GFLOP/s"] > 0 and row["share"]["median"] > 0
    for row in rows:
        assert "seconds" in row or row["not measured"]


def test_kernels_of_your_own_are_paired_with_what_they_need():
    with registered({"linear": f"{HERE}:own_linear", "attention_vjp": f"{HERE}:own_attention_vjp"}, "cpu"):
        for op in ("linear", "attention_vjp"):
            for row in bench_op(op, shapes(), precision="fp32", backend=YOURS, repeats=1, budget=1):
                assert row["reason"] is None and "seconds" in row
    assert YOURS not in _registry.BACKENDS
    assert all(YOURS not in forms for forms in _registry.IMPLEMENTATIONS.values())


@pytest.mark.parametrize(("kernel", "said"), [("wrong_row_rstd", "1.0e-03"), ("careless_row_rstd", "nan")])
def test_a_wrong_kernel_is_refused_and_not_timed(kernel, said):
    with registered({"row_rstd": f"{HERE}:{kernel}"}, "cpu"):
        rows = bench_op("row_rstd", shapes(), precision="fp32", repeats=1, budget=1)
    refused = {row["backend"]: row for row in rows}[YOURS]
    assert said in refused["reason"] and "seconds" not in refused


def test_a_kernel_that_fails_while_it_is_timed_is_refused():
    with registered({"row_rstd": f"{HERE}:tired_row_rstd"}, "cpu"):
        rows = bench_op("row_rstd", shapes(), precision="fp32", repeats=5, budget=5)
    refused, *others = [row for row in rows if row["backend"] == YOURS and row["case"] == "row_rstd"]
    assert not others and refused["reason"].startswith("after it was timed: its error") and "seconds" not in refused
    assert all("seconds" in row and row["reason"] is None for row in rows if row["backend"] == "torch")


def test_poison_reaches_every_way_to_make_a_buffer_and_ends_with_the_context():
    with poisoned():
        assert torch.empty(2).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(1).new_empty(3).isnan().all() and torch.empty(2, dtype=torch.int32).eq(7).all()
    assert not torch.empty(0).numel()
    assert "poisoning" not in repr(torch.empty)


def test_distance_sees_nan_shapes_and_eight_bits():
    truth = (torch.linspace(0, 1, 5, dtype=torch.float64),)
    assert distance((torch.tensor([0.0, 0.25, torch.nan, 0.75, 1.0]),), truth) != 0
    assert torch.tensor(distance((truth[0] * torch.nan,), truth)).isnan()
    assert distance((truth[0][:4],), truth) == distance((), truth) == float("inf")
    assert distance(((truth[0] * 255).round().to(torch.uint8),), truth) < 3e-3


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: build_model("no_such_model"), UnknownModelError, "timm has no model"),
        (lambda: build_model("tests.nowhere:model"), InputError, "cannot be loaded"),
        (lambda: build_model(f"{HERE}:torch.int"), InputError, "cannot be loaded"),
        (lambda: build_model("collections:OrderedDict"), InputError, "expected a torch.nn.Module"),
        (lambda: build_model("demo", 64), InputError, "128 pixels"),
        (lambda: shapes_of(torch.nn.Linear(2, 2), 5), ModelError, "only models of the engine"),
        (lambda: bench_one("cuda"), BackendError, "no backend 'cuda'|has no 'cuda' form|cannot run"),
    ],
)
def test_ops_that_cannot_be_timed_are_reported(ask, error, words):
    with pytest.raises(error, match=words):
        ask()


def bench_one(backend):
    return bench_op("row_rstd", shapes(), precision="fp32", backend=backend)


def test_an_unknown_op_cannot_be_registered():
    with pytest.raises(InputError, match="no op 'soften'"), registered({"soften": f"{HERE}:own_linear"}, "cpu"):
        pass


def test_turns_start_with_another_each_time_and_stop_at_the_budget():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    seconds = timing.in_turns(calls, 3, warmup=0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert len(timing.in_turns(calls, 50, budget=0.0)["a"]) == 1


def test_a_99th_percentile_needs_a_hundred_runs():
    assert "p99" not in timing.spread([1.0] * 99)
    many = timing.spread([float(i) for i in range(101)])
    assert many["p99"] == 99 and many["median"] == 50
