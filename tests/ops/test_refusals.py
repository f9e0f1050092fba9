"""Test that operands of another length, stride, type, device, index or value are refused, or change nothing.

Every variant goes through the public op and through torch.ops.dave_fast; memory that a kernel would write also through
the compiled kernel itself, without the checks in Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dave_fast.errors import BackendError, InputError
from dave_fast.ops import _ext
from dave_fast.ops.attention import attention_native, attention_vjp_native
from dave_fast.ops.norm import row_rstd_native
from dave_fast.ops.patches import patch_hw
from dave_fast.ops.perturb import perturb
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.pull_back_mean import pull_back_mean
from dave_fast.ops.robust_mean import robust_mean, robust_mean_variance
from dave_fast.ops.shrink import shrink
from dave_fast.ops.smooth import smooth
from dave_fast.ops.spread_mean import spread_mean_variance
from dave_fast.sampling import ROWS, Draws, draw, normal

pytestmark = pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))

BACKENDS = ["native", "torch"]
FIELDS = list(ROWS)
IMAGES = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
TOKENS = torch.linspace(-1, 1, 4 * 4 * 48).view(4, 4, 48)
PATCHES = torch.linspace(-1, 1, 4 * 4).view(4, 4)
STACK = IMAGES.view(1, 2, 3, 8, 8)


def rows() -> Draws:
    return draw(2, height=8, width=8, image_keys=[0, 1])


def calls(draws: Any, backend: str = "native", samples: int = 2) -> list[Callable[[], Any]]:
    """Return every public op that takes draws."""
    return [
        lambda: perturb(IMAGES, draws, 4, backend=backend),
        lambda: pull_back(TOKENS, IMAGES, draws, 4, backend=backend),
        lambda: pull_back_mean(TOKENS, IMAGES, draws, 4, samples, backend=backend),
        lambda: spread_mean_variance(PATCHES, draws, (8, 8), 4, samples, backend=backend),
    ]


def library_calls(tensors: list[torch.Tensor], backend: str = "native") -> list[Callable[[], Any]]:
    """Return the same as torch.ops.dave_fast."""
    ops = torch.ops.dave_fast
    return [
        lambda: ops.perturb(IMAGES, tensors, 4, 4, torch.float32, backend),
        lambda: ops.pull_back(TOKENS, IMAGES, tensors, 4, 4, None, backend),
        lambda: ops.pull_back_mean(TOKENS, IMAGES, tensors, 4, 4, 2, backend),
        lambda: ops.pull_back_mean_variance(TOKENS, IMAGES, tensors, 4, 4, 2, backend),
        lambda: ops.spread_mean_variance(PATCHES, tensors, 8, 8, 4, 4, 2, backend),
    ]


def assert_refused(draws: list[torch.Tensor], error: type[Exception], message: str) -> None:
    """Fail unless a Draws of these tensors cannot be made, and no op of torch.library takes them."""
    with pytest.raises(error, match=message):
        Draws(*draws)
    for call in library_calls(draws):
        with pytest.raises(error, match=message):
            call()


LENGTHS = {
    "none": lambda t: t[:0],
    "one less": lambda t: t[1:].clone(),
    "one more": lambda t: torch.cat([t, t[:1]]),
    "flat": lambda t: torch.cat([t.flatten(), t.flatten()[:1]]),
    "no dimension": lambda t: t.sum(),
    "one dimension more": lambda t: t[None],
}


@pytest.mark.parametrize("change", LENGTHS)
@pytest.mark.parametrize("field", FIELDS)
def test_draws_of_another_length_are_refused(field, change):
    tensors = dict(zip(FIELDS, rows().tensors(), strict=True))
    tensors[field] = LENGTHS[change](tensors[field])
    assert_refused(list(tensors.values()), InputError, "shapes that dave_fast.sampling.Draws documents")


@pytest.mark.parametrize("count", [0, 1, 5, 7, 12])
def test_another_number_of_draws_tensors_is_refused(count):
    for call in library_calls((rows().tensors() * 2)[:count]):
        with pytest.raises(InputError, match=f"6 tensors image_index, .*; got {count}"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_draws_of_another_type_are_refused(field, dtype):
    tensors = dict(zip(FIELDS, rows().tensors(), strict=True))
    tensors[field] = torch.ones_like(tensors[field], dtype=dtype)
    assert_refused(list(tensors.values()), TypeError, f"draws.{field} must be a tensor of")


@pytest.mark.parametrize("field", FIELDS)
def test_draws_on_two_devices_are_refused(field):
    tensors = dict(zip(FIELDS, rows().tensors(), strict=True))
    tensors[field] = tensors[field].to("meta")
    with pytest.raises(InputError, match="draws must be on one device; got cpu, meta"):
        Draws(*tensors.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", range(4))
def test_draws_on_another_device_are_refused(op, backend):
    draws = Draws(*(tensor.to("meta") for tensor in rows().tensors()))
    with pytest.raises(InputError, match="draws are on meta, the images on cpu"):
        calls(draws, backend)[op]()


@pytest.mark.parametrize("field", FIELDS)
def test_draws_that_are_resized_later_are_refused(field):
    draws = rows()
    getattr(draws, field).resize_(0)
    for call in calls(draws):
        with pytest.raises(InputError, match=r"shapes that dave_fast\.sampling\.Draws documents"):
            call()


@pytest.mark.parametrize("field", FIELDS)
def test_strides_of_draws_change_nothing(field):
    draws = rows()
    wide = torch.stack([getattr(draws, field), torch.zeros_like(getattr(draws, field))], dim=-1)
    strided = dataclasses.replace(draws, **{field: wide[..., 0]})
    assert not getattr(strided, field).is_contiguous()
    for call, expected in zip(calls(strided), calls(draws), strict=True):
        for found, wanted in zip(call(), expected(), strict=True):
            assert torch.equal(found, wanted)


VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "part of a row": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
    "one value": lambda t: t.flatten()[:1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_overlapping_operands_are_read_as_they_are(backend, view):
    images, tokens, stack = (VIEWS[view](t) for t in (IMAGES, TOKENS, STACK[0]))
    whole = [t.clone(memory_format=torch.contiguous_format) for t in (images, tokens, stack)]
    draws = rows()

    def results(images: torch.Tensor, tokens: torch.Tensor, stack: torch.Tensor) -> list[torch.Tensor]:
        return [
            perturb(images, draws, 4, backend=backend),
            pull_back(tokens, images, draws, 4, backend=backend),
            robust_mean(stack[None], backend=backend),
            smooth(images, backend=backend),
            shrink(images, images[:, 0].double(), backend=backend),
        ]

    for found, expected in zip(results(images, tokens, stack), results(*whole), strict=True):
        assert torch.equal(found, expected)


OTHER_TYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", [*OTHER_TYPES, "sparse", "list"], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_another_type_are_refused(backend, dtype):
    def other(tensor: torch.Tensor) -> Any:
        if dtype == "list":
            return tensor.tolist()
        return tensor.to_sparse() if dtype == "sparse" else tensor.to(dtype)

    for call in (
        lambda: perturb(other(IMAGES), rows(), 4, backend=backend),
        lambda: pull_back(other(TOKENS), IMAGES, rows(), 4, backend=backend),
        lambda: robust_mean(other(STACK), backend=backend),
        lambda: robust_mean_variance(other(STACK), backend=backend),
        lambda: spread_mean_variance(other(PATCHES), rows(), (8, 8), 4, 2, backend=backend),
        lambda: smooth(other(IMAGES), backend=backend),
        lambda: shrink(IMAGES, other(IMAGES[:, 0]), backend=backend),
    ):
        with pytest.raises(TypeError, match="must be"):
            call()


@pytest.mark.parametrize("op", range(6))
@pytest.mark.parametrize("backend", ["native", "torch", "onednn", "none", "cuda"])
def test_tensors_without_memory_are_refused(backend, op):
    images, tokens, stack = (tensor.to("meta") for tensor in (IMAGES, TOKENS, STACK))
    call = [
        lambda: perturb(images, rows(), 4, backend=backend),
        lambda: pull_back(tokens, images, rows(), 4, backend=backend),
        lambda: robust_mean(stack, backend=backend),
        lambda: robust_mean_variance(stack, backend=backend),
        lambda: smooth(images, backend=backend),
        lambda: shrink(images, images[:, 0], backend=backend),
    ][op]
    # an op without a form in that backend takes the device's default, which a device without memory has not
    with pytest.raises(BackendError, match=r"meta|unknown"):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [-1, -2, 2, 3, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)])
def test_image_indices_outside_of_the_batch_are_refused(backend, index):
    draws = rows()
    draws.image_index[1] = index
    for call in (*calls(draws, backend)[:3], *library_calls(draws.tensors(), backend)[:4]):
        with pytest.raises(InputError, match=r"image_index must be in \[0, 2\)"):
            call()
    # without the checks in Python
    with pytest.raises(InputError, match="image_index is outside of the batch"):
        _ext.run_native("perturb", IMAGES, IMAGES.shape, draws, 4, 4, torch.zeros(4, 4, 48))
    with pytest.raises(InputError, match="image_index is outside of the batch"):
        _ext.run_native("pull_back", TOKENS, IMAGES, IMAGES.shape, draws, 4, 4, torch.zeros(4, 3, 8, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300, -1e30, 2.0**61])
def test_matrices_that_cannot_be_computed_with_are_refused(backend, place, value):
    draws = rows()
    draws.matrices[1][place] = value
    for call in (*calls(draws, backend), *library_calls(draws.tensors(), backend)):
        with pytest.raises(InputError, match=r"draws\.matrices must be finite numbers of at most 2⁶⁰"):
            call()
    with pytest.raises(InputError, match="matrices must be finite"):
        _ext.run_native("perturb", IMAGES, IMAGES.shape, draws, 4, 4, torch.zeros(4, 4, 48))


SINGULAR = {
    "zero": [[0, 0, 0], [0, 0, 0]],
    "one axis": [[1, 0, 0], [0, 0, 0]],
    "parallel": [[1, 2, 0], [2, 4, 0]],
    "tiny": [[1e-300, 0, 0], [0, 1e-300, 0]],
    "inverse too large": [[1e-19, 0, 0], [0, 1, 0]],
    "inverse too far": [[1e-10, 0, 1e10], [0, 1, 0]],
    "underflow": [[1e-200, 0, 0], [0, 1e-200, 0]],
    "cancelled": [[1, 1, 0], [1, 1 + 1e-18, 0]],
    "denormal": [[5e-324, 0, 0], [0, 1, 0]],
    "swapped": [[0, 1e-30, 0], [1e-30, 0, 0]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SINGULAR)
def test_matrices_without_an_inverse_are_refused_by_what_inverts_them(backend, name):
    draws = rows()
    draws.matrices[1] = torch.tensor(SINGULAR[name])
    for call in calls(draws, backend)[1:]:
        with pytest.raises(InputError, match="invertible"):
            call()
    with pytest.raises(InputError, match="invertible"):
        _ext.run_native("pull_back", TOKENS, IMAGES, IMAGES.shape, draws, 4, 4, torch.zeros(4, 3, 8, 8))
    assert torch.equal(perturb(IMAGES, draws, 4, backend=backend), perturb(IMAGES, draws, 4, backend="torch"))


LARGE = [1e3, 1e6, 3e9, 1e12, 1e15, 1e17, -1e3, -3e9, -1e12, -1e17]


@pytest.mark.parametrize("value", LARGE)
def test_large_matrices_have_the_same_finite_result_in_both_backends(value):
    draws = rows()
    draws.matrices[0] = torch.tensor([[value, 0, 0], [0, 1, 0]])
    draws.matrices[1] = torch.tensor([[1, 0, value], [0, 1, -value]])
    draws.matrices[2] = torch.tensor([[1, value, 0], [0, 1, 3]])
    tokens = perturb(IMAGES, draws, 4, backend="native")
    assert torch.equal(tokens, perturb(IMAGES, draws, 4, backend="torch")) and bool(tokens.isfinite().all())
    pulled = pull_back(TOKENS, IMAGES, draws, 4, backend="native")
    torch.testing.assert_close(pulled, pull_back(TOKENS, IMAGES, draws, 4, backend="torch"))
    assert bool(pulled.isfinite().all())


@pytest.mark.parametrize("keys", [(2**32, 0), (-1, -1), (2**62, 3), (0, 2**40 + 1), (-(2**63), 2**63 - 1)], ids=str)
@pytest.mark.parametrize("sample", [2**32 + 3, -1])
def test_keys_beyond_their_words_are_taken_modulo(keys, sample):
    draws = rows()
    draws.keys[:], draws.samples[:] = torch.tensor(keys), sample
    assert torch.equal(perturb(IMAGES, draws, 4, backend="native"), perturb(IMAGES, draws, 4, backend="torch"))
    within = torch.tensor(keys)[None] % 2**32, torch.tensor([sample]) % 2**32
    assert torch.equal(normal(draws.keys[:1], draws.samples[:1], 9), normal(*within, 9))


@pytest.mark.parametrize(
    "patch_size", [0, -4, (4, 0), (-1, 4), 4.0, (4.5, 2), None, "4", (4,), (4, 4, 4), [], torch.nan], ids=str
)
def test_patch_sizes_that_are_none_are_refused(patch_size):
    with pytest.raises(InputError, match="whole number ≥ 1"):
        patch_hw(patch_size)
    with pytest.raises(InputError, match="whole number ≥ 1"):
        perturb(IMAGES, rows(), patch_size)


@pytest.mark.parametrize(
    ("size", "patch"),
    [(2**31, 2**31), (2**40, 2**40), (2**62, 2**62), (2**63 - 1, 2**63 - 1), (1 << 30, 1 << 30), (8, 3), (8, 2**62)],
)
def test_sizes_beyond_memory_are_refused_before_any_is_taken(size, patch):
    draws = rows()
    for height, width, p_h, p_w in ((size, 1, patch, 1), (1, size, 1, patch)):
        with pytest.raises(InputError, match=r"fewer than 2³⁰ pixels|do not divide"):
            spread_mean_variance(PATCHES[:, :1], draws, (height, width), (p_h, p_w), 2)
        with pytest.raises(InputError, match=r"2\^30 pixels|do not fill|2\^48 values"):
            _ext.run_native(
                "spread_mean_variance",
                *(PATCHES[:, :1].contiguous(), draws, height, width, p_h, p_w, 2),
                *(torch.zeros(1), torch.zeros(1, dtype=torch.float64)),
            )


@pytest.mark.parametrize("samples", [0, -1, 3, 5, 8, 2**26, 2**31, 2**62, 2**63 - 1, -(2**63)])
def test_samples_that_do_not_divide_the_rows_are_refused(samples):
    for call in calls(rows(), samples=samples)[2:]:
        with pytest.raises(InputError, match="n_samples must divide the 4 rows"):
            call()
    means = torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match=r"samples?"):
        _ext.run_native("pull_back_mean", TOKENS, IMAGES, IMAGES.shape, rows(), 4, 4, samples, means)


@pytest.mark.parametrize("samples", [1, 5, 2**26 - 1])
def test_no_image_needs_no_sorting_network(samples):
    assert robust_mean(torch.zeros(0, samples, 4), backend="native").shape == (0, 4)
    assert pull_back_mean(TOKENS[:0], IMAGES, rows()[:0], 4, samples, backend="native").shape == (0, 3, 8, 8)


OUTPUTS = {
    "none": lambda t: t[:0],
    "shorter": lambda t: t.flatten()[1:],
    "longer": lambda t: torch.cat([t, t]),
    "wider": lambda t: t.double(),
    "integers": lambda t: t.to(torch.int32),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("change", OUTPUTS)
@pytest.mark.parametrize("op", ["perturb", "pull_back", "pull_back_mean", "robust_mean", "smooth", "shrink"])
def test_kernels_refuse_outputs_that_do_not_fit(op, change):
    maps, draws = torch.zeros(2, 8, 8), rows()
    arguments, output = {
        "perturb": ((IMAGES, IMAGES.shape, draws, 4, 4), torch.zeros(4, 4, 48)),
        "pull_back": ((TOKENS, IMAGES, IMAGES.shape, draws, 4, 4), torch.zeros(4, 3, 8, 8)),
        "pull_back_mean": ((TOKENS, IMAGES, IMAGES.shape, draws, 4, 4, 2), torch.zeros(2, 3, 8, 8)),
        "robust_mean": ((STACK, 1, 2, 192), torch.zeros(1, 192)),
        "smooth": ((IMAGES, IMAGES.shape), maps),
        "shrink": ((maps.double(), IMAGES, IMAGES.shape), maps),
    }[op]
    if change == "wider" and op in ("perturb", "pull_back"):
        pytest.skip("these store any floating type")
    with pytest.raises((InputError, BackendError), match=r"must (have|be)|another type|contiguous"):
        _ext.run_native(op, *arguments, OUTPUTS[change](output))


def test_kernels_refuse_outputs_that_share_memory():
    memory = torch.zeros(2 * 3 * 8 * 8 + 8)
    images, maps = memory[:384].view(IMAGES.shape), memory[300 : 428 - 36]
    assert images.data_ptr() + 4 * 300 == maps.data_ptr()
    contributions = torch.zeros(2, 3, 8, 8)
    for op, *arguments in (
        ("smooth", images, images.shape, memory[10:138]),
        ("robust_mean", contributions, 1, 2, 192, contributions[1]),
        ("robust_mean", contributions, 1, 2, 192, contributions[0]),
        ("shrink", torch.zeros(2, 8, 8).double(), images, images.shape, images[1, :2]),
    ):
        with pytest.raises(InputError, match="shares memory"):
            _ext.run_native(op, *arguments)


HEADS = (2, 5, 3, 8)


@pytest.mark.parametrize("name", ["q", "k", "v", "d_out", "bias"])
@pytest.mark.parametrize("change", [*OUTPUTS, "meta", "one row"])
def test_attention_refuses_operands_that_do_not_fit(name, change):
    operands = {key: torch.ones(HEADS) for key in ("q", "k", "v", "d_out")} | {"bias": torch.ones(3, 5, 5)}
    given = operands[name]
    forms = OUTPUTS | {"meta": lambda t: t.to("meta"), "one row": lambda t: t[:1]}
    operands[name] = forms[change](given)
    if change == "strided":
        # any strides are read
        assert attention_native(*(operands[key] for key in "qkv"), 0.3, operands["bias"])[0].shape == HEADS
        return
    if name == "d_out":
        _, saved = attention_native(*(operands[key] for key in "qkv"), 0.3, operands["bias"])
        with pytest.raises(BackendError, match="attention's d_out is"):
            attention_vjp_native(saved, operands["d_out"])
        return
    # any other dtype is the whole op's, and left to PyTorch, which refuses the operands that differ
    with pytest.raises((BackendError, RuntimeError), match=r"attention's|same dtype|expected"):
        attention_native(*(operands[key] for key in "qkv"), 0.3, operands["bias"])


def test_rows_without_values_have_no_norm():
    with pytest.raises(InputError, match="rows must have values"):
        row_rstd_native(torch.zeros(3, 0), 1e-6, centred=True)
