"""Which configuration runs, what is too large for 32 bits, and what only launchers decide."""

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from dave_fast.kernels import _launch, attention, linear
from dave_fast.kernels.linear import linear_triton

SLOW, FAST, HUGE = (triton.Config({"BLOCK": n}) for n in (1, 2, 3))


@pytest.fixture
def launches(monkeypatch):
    """What was launched and timed; HUGE does not fit the device."""
    log = []

    def timing(call, **_):
        call()
        return {1: 5.0, 2: 1.0}[log[-1].kwargs["BLOCK"]]

    def launch(configuration):
        if configuration is HUGE:
            raise OutOfResources(300000, 232448, "shared memory")
        log.append(configuration)

    monkeypatch.setattr(triton.testing, "do_bench", timing)
    monkeypatch.setattr(_launch, "_fastest", {})
    return log, launch


def test_the_fixed_configuration_runs_untimed(launches):
    log, launch = launches
    _launch.run("shape", [SLOW, FAST, HUGE], launch, tune=False)
    assert log == [SLOW]


def test_tuning_times_each_once_a_shape_and_takes_the_fastest(launches):
    log, launch = launches
    for _ in range(2):
        _launch.run("shape", [SLOW, HUGE, FAST], launch, tune=True)
    assert log == [SLOW, FAST, FAST, FAST]
    _launch.run("other shape", [SLOW, FAST], launch, tune=True)
    assert log[4:] == [SLOW, FAST, FAST]


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("glu", [False, True])
def test_candidates_suit_their_architecture(arch, dtype, glu):
    for aligned in (False, True):
        found = linear.configurations(arch, dtype, glu=glu, descriptors=aligned)
        assert len(found) > 1 and len({str(c) for c in found}) == len(found)
        assert not any(c.kwargs["DESCRIPTORS"] for c in found) or (aligned and arch >= 90)
        for c in found:
            # one stage of both operands in each of the stages; accumulators of 512 values a thread at most
            wide = c.kwargs["BLOCK_O"] * (2 if glu else 1)
            stage = (c.kwargs["BLOCK_T"] + wide) * c.kwargs["BLOCK_I"] * dtype.itemsize
            assert stage * (c.num_stages - (arch < 90)) <= (99 if arch == 86 else 227 if arch >= 90 else 163) * 1024
            assert c.kwargs["BLOCK_T"] * wide <= 128 * 32 * c.num_warps
    if not glu:
        for vjp in (False, True):
            assert len({str(c) for c in attention.configurations(arch, dtype, 64, 197, vjp=vjp)}) >= 1


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
