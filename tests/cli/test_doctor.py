"""Test `doctor`: what it finds on machines that lack something, and that it asks no network."""

from __future__ import annotations

import json
import os
import socket
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dave_fast.cli import doctor, info
from dave_fast.cli.app import app
from dave_fast.cli.doctor import ABSENT, OK, SLOW, examine
from dave_fast.ops import _ext, _registry


def found(name):
    """Return the findings of a name."""
    return [each for each in examine() if each.name == name]


def test_everything_is_named_once_and_what_can_be_done_is_said():
    findings = examine()
    assert len({each.name for each in findings}) == len(findings)
    assert {each.name for each in findings} >= {"native core", "bfloat16", "threads", "PyTorch", "GPU", "default model"}
    assert all(each.todo for each in findings if each.state == ABSENT)


def test_no_network_is_asked(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert examine()


def test_a_core_that_is_not_built(monkeypatch):
    monkeypatch.setattr(_ext, "unavailable", lambda: "it was not built")
    (core,) = found("native core")
    assert core.state == SLOW and "it was not built" in core.text and core.todo.startswith("pip install -e ")
    monkeypatch.setattr(_ext, "build_command", lambda: None)
    assert "in a checkout" in found("native core")[0].todo


def test_a_core_with_lesser_instructions(monkeypatch):
    monkeypatch.setattr(_ext, "unavailable", lambda: None)
    core = SimpleNamespace(usable_isas=lambda: ["avx2", "baseline"], multiplies_bytes=lambda whichever: False)
    monkeypatch.setattr(_ext, "module", lambda: core)
    for isa, state in (("baseline", SLOW), ("avx2", OK)):
        monkeypatch.setattr(_ext, "isa", lambda isa=isa: isa)
        assert found("native core")[0].state == state


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16(monkeypatch, has):
    monkeypatch.setattr("dave_fast.ops.precision.has_bf16", lambda device: has)
    assert found("bfloat16")[0].state == (OK if has else SLOW)


@pytest.mark.parametrize("fastest", ["int8", "bf16"])
def test_int8_is_told_where_it_is_the_fastest(monkeypatch, fastest):
    monkeypatch.setattr("dave_fast.ops.precision.fastest_precision", lambda device: fastest)
    assert [each.state for each in found("int8")] == [OK] * (fastest == "int8")


@pytest.mark.parametrize(
    ("threads", "allowed", "cores", "variable", "state", "words"),
    [
        (8, 8, 8, None, OK, "8 of 8 cores"),
        (4, 8, 8, None, OK, "4 of 8 cores"),
        (1, 8, 8, None, SLOW, "1 of 8 cores"),
        (1, 8, 8, "1", SLOW, "unset OMP_NUM_THREADS"),
        (4, 8, 8, "4", SLOW, "unset OMP_NUM_THREADS"),
        (8, 8, 8, "8", OK, "8 of 8 cores"),
        (2, 2, 64, None, SLOW, "2 of 2 cores that this process may use of 64"),
        (1, 1, 1, None, OK, "1 of 1 cores"),
    ],
)
def test_threads(monkeypatch, threads, allowed, cores, variable, state, words):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(allowed), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    (finding,) = found("threads")
    assert finding.state == state and words in f"{finding.text} {finding.todo}"


def test_a_pytorch_without_libraries(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    (finding,) = found("PyTorch")
    assert finding.state == SLOW and "without oneDNN and MKL" in finding.text
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert found("PyTorch")[0].state == OK


@pytest.mark.parametrize(
    ("smi", "cuda", "state", "words"),
    [(None, None, OK, "none"), ("smi", None, SLOW, "is for CPUs"), ("smi", "12.8", SLOW, "for CUDA 12.8 cannot use")],
)
def test_gpus_that_pytorch_does_not_use(monkeypatch, smi, cuda, state, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "Path", lambda place: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: smi)
    (finding,) = found("GPU")
    assert finding.state == state and words in finding.text


def test_a_gpu_without_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("DAVE_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a chip")
    monkeypatch.setattr(_ext, "cuda_unavailable", lambda: "not built")
    monkeypatch.setitem(_registry.BACKENDS, "triton", SimpleNamespace(unavailable=lambda: "Triton is not installed"))
    states = {each.name: each for each in doctor._gpu()}
    assert states["GPU"].text == "a chip"
    assert [states[name].state for name in ("CUDA kernels", "Triton kernels", "kernels' candidates")] == [SLOW] * 3
    assert "nvcc" in states["CUDA kernels"].todo and "DAVE_FAST_AUTOTUNE=1" in states["kernels' candidates"].todo


def test_the_default_model_in_the_cache_and_not(monkeypatch):
    for there, offline, state in (("file", False, OK), (None, False, OK), (None, True, ABSENT)):
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, there=there: there)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert found("default model")[0].state == state


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(info.EXTRAS, "ray", ("no-such-package",))
    (finding,) = found("extra ray")
    assert finding.state == ABSENT and finding.text == "without no-such-package"
    assert finding.todo == "pip install '.[ray]' in a checkout of dave-fast"


def test_text_and_json_say_the_same():
    as_json, as_text = CliRunner().invoke(app, ["doctor", "--json"]), CliRunner().invoke(app, ["doctor"])
    assert as_json.exit_code == as_text.exit_code == 0
    listed = json.loads(as_json.stdout)
    assert listed and set(listed[0]) == {"name", "state", "text", "todo"}
    for each in listed:
        assert each["name"] in as_text.stdout and each["state"] in as_text.stdout
