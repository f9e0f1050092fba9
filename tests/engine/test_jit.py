"""Both walks through Triton's JIT for sm_90, on a stand-in for the device: every form compiles and fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp
from torch import nn

triton = pytest.importorskip("triton")

from tests.fake_gpu import Kernel, Launch, build, fake_gpu, walk  # noqa: E402

ROWS = 2
VITS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
# what other families launch beside
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_giant_patch14_dinov2": {"img_size": 224},
    "vit_small_patch16_224": {"mlp_layer": partial(GluMlp, act_layer=nn.GELU)},
    "vit_base_patch16_224": {"qk_norm": True},
    "vit_base_patch14_reg4_dinov2": {"img_size": 224},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_huge_patch14_224": {},
    "eva02_base_patch14_224": {},
    "beit_base_patch16_224": {},
    "vit_relpos_base_patch16_224": {},
}
# bytes a thread; other versions allot registers in their own way
SPILLS = 0 if triton.__version__ in ("3.6.0", "3.8.0", "3.9.0") else 64
# of rows of 588 numbers (patches of 14 px), which are no multiple of 16, of eight bits with a norm inside the MLP, and
# of two forms in float32 with Triton 3.6
RARE_SPILLS = 96


@pytest.fixture(scope="module")
def gpu() -> Iterator[list[Launch]]:
    """One stand-in for all models, so that forms which they share are compiled once."""
    with fake_gpu(arch=90) as launches:
        yield launches


def launched(gpu: list[Launch], name: str, precision: str, **settings: Any) -> list[Launch]:
    """Return the launches of a model of two blocks, the last one trimmed to the tokens that the head reads."""
    engine = build(timm.create_model(name, depth=2, **settings).eval(), precision)
    # what found eight-bit scales runs once a model: that it compiles is enough
    gpu.clear()
    walk(engine, ROWS)
    return gpu


def serialised(kernel: Kernel) -> bool:
    """Return whether ptxas made the kernel's products wait for each other."""
    # a bias is added between the products: Triton 3.6 and 3.8 have no form in which the forward does not wait
    biased = kernel.name.startswith("_attention") and "bias" in dict(kernel.types)
    return "C7515" in kernel.resources.warnings and not biased


def check(launches: Iterable[Launch], most: int = SPILLS) -> None:
    """Assert that at most `most` bytes a thread spill and no products wait; the launch refuses what CUDA refuses."""
    kernels = {launch.kernel for launch in launches}
    assert {"_linear_kernel", "_attention_kernel", "_attention_vjp_kernel"} <= {kernel.name for kernel in kernels}
    bad = [kernel for kernel in kernels if kernel.resources.spills > most or serialised(kernel)]
    assert not bad, "\n".join(f"{k.name} {dict(k.constants)} {dict(k.types)}: {k.resources}" for k in bad)


def test_vit_b_in_bfloat16(gpu):
    launches = launched(gpu, "vit_base_patch16_224", "bf16")
    check(launches)
    attention = [each.kernel for each in launches if each.kernel.name.startswith("_attention")]
    assert len(attention) == 4 and all(kernel.resident >= 2 for kernel in attention)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
@pytest.mark.parametrize("size", [224, 448, 672])
@pytest.mark.parametrize("name", VITS)
def test_vits_of_every_size(name, size, precision, gpu):
    check(launched(gpu, name, precision, img_size=size))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, precision, gpu):
    check(launched(gpu, name, precision, **FAMILIES[name]), most=RARE_SPILLS)


def test_more_rows_and_heads_than_a_grids_second_axis_has():
    from dave_fast.kernels.attention import attention_triton, attention_vjp_triton

    q, k, v, d_out = torch.empty(4, 2**14, 1, 4, 16, dtype=torch.float16)
    with fake_gpu() as launches:
        _, saved = attention_triton(q, k, v, 0.25)
        attention_vjp_triton(saved, d_out)
    assert [launch.grid for launch in launches] == [(2**16, 1, 1)] * 2


def test_the_stand_in_refuses_what_a_gpu_refuses(monkeypatch):
    from dave_fast.kernels import attention
    from dave_fast.kernels.norm import _row_rstd_kernel

    x = torch.empty(1, 64, 1, 128, dtype=torch.bfloat16)
    row = {"CENTRED": True, "SQUARES": False, "BLOCK_T": 1, "BLOCK_D": 64}
    tiles = {"BLOCK_Q": 128, "BLOCK_N": 128, "D_STEP": 128, "PEELED": False}
    monkeypatch.setattr(attention, "configurations", lambda *_, **__: [triton.Config(tiles, num_warps=8, num_stages=5)])
    with fake_gpu() as launches:
        with pytest.raises(RuntimeError, match=r"grid \(1, 65536, 1\) is larger"):
            _row_rstd_kernel[(1, 65536)](x, torch.empty(64), 64, 64, 64, 64, 1e-6, **row)
        with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
            attention.attention_triton(x, x, x, 0.1)
    assert not launches


def test_nothing_of_the_stand_in_is_left():
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as drivers

    from dave_fast.kernels import _launch
    from dave_fast.kernels.attention import _attention_kernel
    from dave_fast.ops import _registry

    def state() -> list[Any]:
        places = (_launch, _registry, nvidia, drivers)
        return [dict(vars(place)) for place in places] + [dict(_attention_kernel.device_caches), triton.knobs.cache.dir]

    before = state()
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    with fake_gpu():
        walk(build(model, "bf16"), 1)
    with pytest.raises(KeyError, match="fp64"), fake_gpu():
        build(model, "fp64")
    assert state() == before
