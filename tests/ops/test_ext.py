"""Test the loading of the native extension: reasons of failures, explicit choices that raise, "auto" without it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dave_fast.errors import BackendError, InputError
from dave_fast.ops import _ext, _registry
from dave_fast.ops.robust_mean import robust_mean, robust_mean_ref
from dave_fast.sampling import Draws

PIXEL_OPS = ("perturb", "pull_back", "robust_mean", "robust_mean_variance", "spread_mean_variance", "shrink", "smooth")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Clear the caches of the extension's loader and of the registry before and after the test."""
    caches = [_ext._load, _registry.BACKENDS["native"].unavailable]
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("error", "message"),
    [(ModuleNotFoundError("gone"), "was not built"), (ImportError("libgomp.so.1: version GOMP_9 not found"), "GOMP_9")],
    ids=["not-built", "not-loadable"],
)
def test_without_the_extension(monkeypatch, error, message):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(_ext, "import_module", fail)
    assert message in _ext.unavailable()
    assert _ext.isa() is None
    with pytest.raises(BackendError, match=message):
        _ext.module()
    for op in PIXEL_OPS:
        assert _registry.choose(op) == "torch"
        with pytest.raises(BackendError, match=f"'native' was asked for and cannot run '{op}'.*{message}"):
            _registry.choose(op, "native")
    contributions = torch.randn(1, 5, 4)
    assert torch.equal(robust_mean(contributions), robust_mean_ref(contributions))
    with pytest.raises(BackendError, match=message):
        robust_mean(contributions, backend="native")


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that $CXX names; no other is on the path."""
    program = tmp_path / "c++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("DAVE_FAST_BUILD_EXT", raising=False)
    return program


@pytest.mark.usefixtures("forgotten", "compiler")
def test_a_core_that_is_not_built_in_a_checkout_is_warned_of_once_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "dave_fast._native", None)
    root = Path(__file__).resolve().parents[2]
    with pytest.warns(RuntimeWarning, match=f"the native core is not built here.*pip install -e {root} builds") as said:
        assert [_registry.choose(op) for op in PIXEL_OPS] == ["torch"] * len(PIXEL_OPS)
    assert len(said) == 1


@pytest.mark.parametrize("why", ["chosen", "no compiler", "no checkout"])
def test_no_warning_where_the_core_was_left_out_or_cannot_be_built(monkeypatch, tmp_path, compiler, why):
    if why == "chosen":
        monkeypatch.setenv("DAVE_FAST_BUILD_EXT", "0")
    elif why == "no compiler":
        compiler.unlink()
    else:
        monkeypatch.setattr(_ext, "__file__", str(tmp_path / "site-packages/dave_fast/ops/_ext.py"))
        assert _ext.build_command() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ext._warn_of_missing_core()


needs_extension = pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))


@needs_extension
def test_auto_chooses_the_extension():
    for op in PIXEL_OPS:
        assert _registry.choose(op) == "native"
        assert _registry.bind(op).__name__ == f"{op}_native"


@needs_extension
def test_the_extension_reports_its_instruction_set():
    native = _ext.module()
    assert native.usable_isas()[-1] == "baseline"
    assert _ext.isa() in native.usable_isas()
    assert _ext.threads() == torch.get_num_threads()
    with pytest.raises(ValueError, match=r"'mmx' is unknown or not in this machine; it has .*baseline"):
        native.use_isa("mmx")


@needs_extension
@pytest.mark.usefixtures("forgotten")
def test_the_environment_chooses_the_instruction_set(monkeypatch):
    best = _ext.isa()
    monkeypatch.setenv("DAVE_FAST_ISA", "baseline")
    _ext._load.cache_clear()
    try:
        assert _ext.isa() == "baseline"
    finally:
        _ext.module().use_isa(best)
    monkeypatch.setenv("DAVE_FAST_ISA", "mmx")
    _ext._load.cache_clear()
    # an explicit choice never falls back silently
    with pytest.raises(BackendError, match="DAVE_FAST_ISA: instruction set 'mmx'"):
        _ext.unavailable()


@needs_extension
def test_addresses_are_checked_before_memory_is_touched():
    index, keys = torch.tensor([3]), torch.zeros(1, 2, dtype=torch.int64)
    matrix, one = torch.eye(2, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    image, tokens = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4)
    draws = Draws(index, matrix[None], one, one, keys, index)
    with pytest.raises(InputError, match="image_index is outside of the batch"):
        _ext.run_native("perturb", image, image.shape, draws, 2, 2, tokens)
    with pytest.raises(BackendError, match="contiguous CPU"):
        _ext.memory(torch.zeros(3, 3).T)


@needs_extension
def test_the_extension_shares_openmp_with_torch():
    # in a process of its own: other tests load libraries that bring a runtime of theirs
    code = "import dave_fast.ops._ext as e; e.module(); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = {line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line}
    assert len(runtimes) <= 1, runtimes
