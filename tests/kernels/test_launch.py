"""Test the launchers: the choice of a candidate, sizes beyond 32 bits, shared memory."""

from itertools import product

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from dave_fast.kernels import _launch, linear
from dave_fast.kernels.linear import linear_triton

SLOW, FAST, HUGE = (triton.Config({"BLOCK": n}) for n in (1, 2, 3))
LIBRARY = _launch.Library("library")
CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Return the lists of launched and timed candidates, with nothing measured before; HUGE does not fit the device."""
    log = []

    def timing(call, **_):
        call()
        return {str(SLOW): 5.0, str(FAST): 1.0, str(LIBRARY): 3.0}[str(log[-1])]

    def launch(candidate):
        if candidate is HUGE:
            raise OutOfResources(300000, 232448, "shared memory")
        log.append(candidate)
        return "result"

    monkeypatch.setattr(triton.testing, "do_bench", timing)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setenv("DAVE_FAST_CACHE_DIR", str(tmp_path))
    new_process(monkeypatch)
    yield log, launch
    _launch.choices.cache_clear()


def new_process(monkeypatch, tune="0"):
    """Clear what this process has read and chosen, but no files."""
    monkeypatch.setenv("DAVE_FAST_AUTOTUNE", tune)
    monkeypatch.setattr(_launch, "_taken", {})
    _launch.choices.cache_clear()


def test_without_tuning_the_first_candidate_runs_untimed(launches):
    log, launch = launches
    assert _launch.run("problem", 100, CPU, [SLOW, FAST, HUGE], launch) == "result"
    assert log == [SLOW]


def test_tuning_times_each_once_a_shape_and_takes_the_fastest(launches, monkeypatch):
    log, launch = launches
    new_process(monkeypatch, tune="1")
    for _ in range(2):
        _launch.run("problem", 100, CPU, [SLOW, HUGE, LIBRARY, FAST], launch)
    assert log == [SLOW, LIBRARY, FAST, FAST, FAST]
    _launch.run("other problem", 100, CPU, [SLOW, LIBRARY], launch)
    assert log[5:] == [SLOW, LIBRARY, LIBRARY]


def test_choices_are_found_by_the_next_process_for_near_numbers_of_rows(launches, monkeypatch):
    log, launch = launches
    new_process(monkeypatch, tune="1")
    _launch.run("problem", 100, CPU, [SLOW, FAST], launch)
    new_process(monkeypatch)
    del log[:]
    for rows in (100, 149, 151, 60):
        _launch.run("problem", rows, CPU, [SLOW, FAST], launch)
    assert log == [FAST, FAST, SLOW, SLOW]
    # a stored choice that is no longer a candidate
    new_process(monkeypatch)
    _launch.run("problem", 100, CPU, [SLOW, LIBRARY], launch)
    assert log[-1] is SLOW


def test_timing_trials_do_not_change_the_operands(launches, monkeypatch):
    log, launch = launches
    new_process(monkeypatch, tune="1")
    launched = []
    _launch.run("problem", 100, CPU, [SLOW, FAST], lambda candidate: launched.append(candidate), trial=launch)
    assert log == [SLOW, FAST] and launched == [FAST]


def test_nothing_is_saved_when_no_candidate_can_be_timed(launches, monkeypatch, caplog):
    _, launch = launches
    new_process(monkeypatch, tune="1")
    with pytest.raises(OutOfResources):
        _launch.run("problem", 100, CPU, [HUGE, HUGE], launch)
    assert "the candidate BLOCK: 3" in caplog.text and not _launch.choices(CPU).all()


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("glu", [False, True])
def test_candidates_suit_their_architecture(arch, dtype, glu):
    for aligned, few, twice in product((False, True), repeat=3):
        found = linear.configurations(arch, dtype, glu=glu, descriptors=aligned, few=few, twice=twice)
        assert len(found) > 1 and len({str(c) for c in found}) == len(found)
        assert not any(c.kwargs["DESCRIPTORS"] for c in found) or (aligned and arch >= 90)
        for c in found:
            # one stage of both operands in each of the stages; accumulators of 512 values a thread at most
            wide = c.kwargs["BLOCK_O"] * (2 if glu else 1)
            stage = (c.kwargs["BLOCK_T"] + wide) * c.kwargs["BLOCK_I"] * dtype.itemsize
            assert stage * (c.num_stages - (arch < 90)) <= (99 if arch == 86 else 227 if arch >= 90 else 163) * 1024
            assert c.kwargs["BLOCK_T"] * wide <= 128 * 32 * c.num_warps
            # parts of sums of squares: a tile's halves are whole ones
            assert c.kwargs["BLOCK_O"] % (linear.FEW_PART if few else linear.PART) == 0 or glu or dtype == torch.float32


def test_rows_further_apart_than_32_bits_reach(device):
    rows, stride = 4200, 2**19 + 16
    x = (
        torch.zeros(rows * stride, dtype=torch.uint8, device=device)
        .view(torch.float8_e4m3fn)
        .view(rows, stride)[:, :32]
    )
    x[-1] = torch.ones(32, device=device).to(x.dtype)
    matrix = torch.eye(32, device=device).to(x.dtype)
    found = linear_triton(x, matrix, dtype=torch.float16)
    assert found[-1].eq(1).all() and found[:-1].eq(0).all()


def test_candidates_that_were_not_timed_are_timed_beside_the_others(launches, monkeypatch):
    log, launch = launches
    new_process(monkeypatch, tune="1")
    _launch.run("problem", 100, CPU, [SLOW, LIBRARY], launch)
    new_process(monkeypatch, tune="1")
    del log[:]
    _launch.run("problem", 100, CPU, [SLOW, LIBRARY, FAST], launch)
    assert log == [SLOW, LIBRARY, FAST, FAST]


def test_only_offered_candidates_are_launched(launches, monkeypatch):
    log, launch = launches
    new_process(monkeypatch, tune="1")
    _launch.run("problem", 100, CPU, [SLOW, FAST], launch)
    new_process(monkeypatch)
    del log[:]
    _launch.run("problem", 100, CPU, [SLOW, FAST], launch)
    # operands of another memory layout, in the same process
    _launch.run("problem", 100, CPU, [SLOW, LIBRARY], launch)
    assert log == [FAST, SLOW]
