"""Test the measurement of every instruction set: names, the environment of the processes, what they return."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dave_fast.bench import isas
from dave_fast.errors import BackendError, InputError
from dave_fast.ops import _ext

USABLE = ["avx512bf16", "avx512", "avx2", "baseline"]


@pytest.fixture
def machine(monkeypatch):
    """A machine whose core can use USABLE and uses AVX2, which multiplies neither bfloat16 nor bytes."""
    core = SimpleNamespace(usable_isas=lambda: USABLE, isa=lambda: "avx2")
    core.multiplies_bfloat16, core.multiplies_bytes = lambda: False, lambda whichever: whichever
    monkeypatch.setattr(_ext, "module", lambda: core)
    monkeypatch.setattr(_ext, "unavailable", lambda: None)
    return core


@pytest.mark.parametrize(
    ("text", "names"), [("all", USABLE), ("avx2", ["avx2"]), ("baseline,avx512", ["avx512", "baseline"])]
)
def test_names_are_sorted_from_the_best(machine, text, names):
    assert isas.chosen(text) == names


@pytest.mark.parametrize("text", ["avx10", "avx2,", "", "all,avx2"])
def test_names_that_the_machine_lacks_are_refused_with_its_own(machine, text):
    with pytest.raises(InputError, match="expected all, or of avx512bf16, avx512, avx2, baseline"):
        isas.chosen(text)


def test_libraries_are_held_to_lesser_instructions_and_not_to_the_best(machine):
    assert isas.variables("avx512bf16") == {"DAVE_FAST_ISA": "avx512bf16"}
    assert isas.variables("avx2") == {
        "DAVE_FAST_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }


@pytest.mark.parametrize(("precision", "words"), [("bf16", "bfloat16"), ("int8", "bytes")])
def test_a_precision_is_not_measured_where_the_instruction_set_in_use_would_emulate_it(machine, precision, words):
    assert f"avx2 does not multiply {words}" in isas.why_not(precision, "cpu")
    assert isas.why_not("fp32", "cpu") is isas.why_not(precision, "cuda") is None
    # the machine's best is used as it is: without the instruction somebody asked for it
    machine.isa = lambda: USABLE[0]
    assert isas.why_not(precision, "cpu") is None


def used():
    return _ext.isa(), os.environ.get("DAVE_FAST_ISA")


def ended():
    os._exit(3)


def measures_for_an_hour():
    print("begun", flush=True)
    time.sleep(3600)


def test_a_killed_run_leaves_no_process_that_measures():
    run = "from tests.bench.test_isas import isas, measures_for_an_hour as f; isas.each(isas.chosen('all')[-1:], f)"
    if _ext.unavailable() is not None:
        pytest.skip("there is no native core, which alone has instruction sets")
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        # the process that measures has the pipe open until it ends
        assert parent.communicate(timeout=60)[0] == ""


def test_a_process_uses_its_instruction_set_and_leaves_ours():
    if _ext.unavailable() is not None:
        pytest.skip("there is no native core, which alone has instruction sets")
    before = used()
    assert isas.each(["baseline"], used) == {"baseline": ("baseline", "baseline")}
    assert used() == before


def test_a_process_that_ends_is_told(machine):
    with pytest.raises(BackendError, match="that measured avx2 ended"):
        isas.each(["avx2"], ended)


def test_results_are_named_by_the_instruction_set():
    assert isas.named(Path("out/linear.json"), "avx2") == Path("out/linear_avx2.json")
