"""Cases of operands that do not fit: every op, its torch.library form and every compiled kernel, with operands changed.

A case is a function of its number: what fits, and then up to three operands of another length, stride, type, device,
index, value or kind. It ends in an error of a kind that callers expect, or in results that are the same again and,
where all that was given is finite, finite. `python -m tests.ops.fuzz --modules FOLDER` runs cases on the modules that
`scripts/sanitize` has built, where a read or write outside of an operand ends the process.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.activation import GATES, activate_native
from dave_fast.ops.attention import attention_native, attention_vjp_native
from dave_fast.ops.linear import OPERANDS, NativeWeight, linear_native, pack_native, pack_panels
from dave_fast.ops.norm import row_rstd_native
from dave_fast.sampling import Draws, draw

# InputError is a ValueError, BackendError a RuntimeError, as are PyTorch's own
EXPECTED = (TypeError, ValueError, RuntimeError, MemoryError)
# the ops of the walks, which the engine alone calls, check what memory safety needs
OF_WALKS = (*EXPECTED, AttributeError, IndexError)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
INTEGERS = (0, -1, 1, 2, 3, 5, 7, 2**31 - 1, 2**31, 2**32, 2**48, 2**61, 2**62, 2**63 - 1, -(2**63), 2**64, 10**30)
STRANGE = (None, "x", True, 2.0, float("nan"), [], (), [1], object())
VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e19, 3e9, -3e9, 1e-40, 0.0, 2.0**31, -1.0)
WORDS = (-1, 7, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
BACKENDS = ("native", "native", "native", "cuda", "torch", "auto", "onednn", "none", "", None, 3)
# operands within this are finite in all arithmetic that follows
MODERATE = 1e6


@dataclass
class Case:
    """A call.

    Attributes:
        name: of the op.
        call: takes the operands.
        operands: tensors, numbers, and lists of tensors.
        expected: the errors that may end it.
    """

    name: str
    call: Callable[..., Any]
    operands: list[Any]
    expected: tuple[type[Exception], ...] = EXPECTED


class Maker:
    """Makes operands that fit each other.

    Args:
        rng: decides everything.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.images, self.channels, self.samples = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 4)
        self.patch = rng.randint(1, 4), rng.randint(1, 4)
        self.size = self.patch[0] * rng.randint(1, 3), self.patch[1] * rng.randint(1, 3)
        self.dtype = rng.choice(FLOATS[:2])
        self.rows = self.images * self.samples

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal deviates."""
        seed = torch.Generator().manual_seed(self.rng.getrandbits(32))
        return torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype or self.dtype)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for a result."""
        return torch.full(shape, 7, dtype=dtype or self.dtype)

    def draws(self) -> list[Tensor]:
        """Return the tensors of draws."""
        keys = range(self.images)
        return draw(self.samples, height=self.size[0], width=self.size[1], seed=1, image_keys=keys).tensors()

    def maps(self) -> tuple[int, int, int, int]:
        """Return (B, C, H, W)."""
        return self.images, self.channels, *self.size

    def patches(self) -> int:
        """Return the number of patches."""
        return self.size[0] // self.patch[0] * (self.size[1] // self.patch[1])

    def tokens(self) -> tuple[int, int, int]:
        """Return the shape of tokens."""
        return self.rows, self.patches(), self.channels * self.patch[0] * self.patch[1]


def of_op(make: Maker, op: str) -> list[Any]:
    """Return the operands of an op by its schema, the backend last."""
    rng, images, draws = make.rng, make.numbers(*make.maps()), make.draws()
    backend = rng.choice(BACKENDS)
    stored = make.numbers(*make.tokens(), dtype=rng.choice(FLOATS))
    stack = make.numbers(make.images, make.samples, *make.maps()[1:], dtype=rng.choice(FLOATS))
    operands = {
        "perturb": lambda: [images, draws, *make.patch, rng.choice(FLOATS)],
        "pull_back": lambda: [stored, images, draws, *make.patch, rng.choice((None, *FLOATS))],
        "pull_back_mean": lambda: [stored, images, draws, *make.patch, make.samples],
        "pull_back_mean_variance": lambda: [stored, images, draws, *make.patch, make.samples],
        "robust_mean": lambda: [stack],
        "robust_mean_variance": lambda: [stack],
        "spread_mean_variance": lambda: [
            make.numbers(make.rows, make.patches()),
            draws,
            *make.size,
            *make.patch,
            make.samples,
        ],
        "shrink": lambda: [images, make.numbers(*make.maps())[:, 0].square()],
        "smooth": lambda: [images],
    }[op]()
    return [*operands, backend]


def public(op: str, *operands: Any) -> Any:
    """Call the public op with the operands of its schema."""
    function = _library._public(op)
    *given, backend = operands
    if op in ("robust_mean", "robust_mean_variance", "shrink", "smooth"):
        return function(*given, backend=backend)
    given = [Draws(*operand) if isinstance(operand, list) else operand for operand in given]
    if op == "spread_mean_variance":
        values, draws, height, width, p_h, p_w, samples = given
        return function(values, draws, (height, width), (p_h, p_w), samples, backend=backend)
    place = 2 if op == "perturb" else 3
    before, (p_h, p_w, *after) = given[:place], given[place:]
    if op in ("perturb", "pull_back"):
        return function(*before, (p_h, p_w), dtype=after[0], backend=backend)
    return function(*before, (p_h, p_w), *after, backend=backend)


def of_kernel(make: Maker, op: str, *, cuda: bool) -> list[Any]:
    """Return the operands of a compiled kernel, its outputs and scratch memory included."""
    rng, images, draws = make.rng, make.numbers(*make.maps()), make.draws()
    (height, width), pixels = make.size, make.size[0] * make.size[1]
    stored = make.numbers(*make.tokens(), dtype=rng.choice(FLOATS))
    given = stored, images, *[list(images.shape)], draws, *make.patch
    raw, variance = make.out(*make.maps()), make.out(make.images, *make.size, dtype=torch.float64)
    kind = rng.choice(FLOATS)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    stack = make.numbers(make.images, make.samples, *make.maps()[1:], dtype=kind)
    means, plane = make.out(*make.maps(), dtype=wide), (make.images, make.samples, make.channels, pixels)
    tile = rng.randint(1, pixels)

    def tiled(channels: int, extra: int) -> list[Any]:
        return [tile, make.out((make.samples + extra) * channels * tile)] if cuda else []

    def scratch(count: int, dtype: torch.dtype) -> list[Any]:
        return [make.out(count, dtype=dtype)] if cuda else []

    return {
        "perturb": lambda: [*given[1:], make.out(*make.tokens(), dtype=kind)],
        "pull_back": lambda: [*given, make.out(make.rows, *make.maps()[1:], dtype=kind)],
        "pull_back_mean": lambda: [*given, make.samples, *tiled(make.channels, 0), raw],
        "pull_back_mean_variance": lambda: [*given, make.samples, *tiled(make.channels, 2), raw, variance],
        "robust_mean": lambda: [stack, *plane[:2], make.channels * pixels, means],
        "robust_mean_variance": lambda: [stack, *plane, *scratch(2 * means.numel(), wide), means, variance],
        "spread_mean_variance": lambda: [
            *(make.numbers(make.rows, make.patches()), draws, height, width, *make.patch, make.samples),
            *(*tiled(1, 2), make.out(make.images, 1, *make.size), variance),
        ],
        "shrink": lambda: [
            *(variance.clone(), images, list(images.shape), *scratch(2 * variance.numel(), torch.float64)),
            make.out(make.images, *make.size),
        ],
        "smooth": lambda: [
            *(images, list(images.shape), *scratch(make.images * (pixels + 1), make.dtype)),
            make.out(make.images, *make.size),
        ],
        "normal": lambda: [draws[4], draws[5], 9, make.out(make.rows, 9, dtype=torch.float32)],
        "pack_linear": lambda: packing(make),
        "linear": lambda: product(make),
    }[op]()


def packing(make: Maker) -> list[Any]:
    """Return the operands of the kernel that packs a weight, the packed words last."""
    operand, outs, ins = make.rng.randrange(len(OPERANDS)), make.rng.randint(1, 90), make.rng.choice((1, 5, 389))
    sizes = operand, outs, ins, _ext.module().linear_panel()
    words = torch.zeros(_ext.module().packed_length(*sizes), dtype=torch.int32)
    return [make.numbers(outs, ins, dtype=torch.float32), *sizes, words]


def product(make: Maker) -> list[Any]:
    """Return the operands of the kernel of linear, y last."""
    *given, words = packing(make)
    matrix, operand, outs, ins, panel = given
    _ext.module().pack_linear(_ext.memory(matrix), operand, outs, ins, panel, _ext.memory(words))
    rng, rows = make.rng, make.rng.randint(1, 9)

    def mixed(*shape: int) -> Tensor | None:
        return make.numbers(*shape, dtype=rng.choice(FLOATS[:3:2])) if rng.random() < 0.6 else None

    bias, scale = (make.numbers(n, dtype=torch.float32) if rng.random() < 0.6 else None for n in (outs, rows))
    activation = rng.choice((-1, -1, *range(len(GATES))))
    beside = [bias, scale, *((None, None) if activation >= 0 else (mixed(rows, outs), mixed(rows, outs)))]
    x, y, gate = (make.out(rows, n, dtype=rng.choice(FLOATS[:3:2])) for n in (ins, outs, outs))
    new_gate = gate if activation >= 0 else None
    return [x, rows, ins, words, operand, outs, ins, panel, beside, activation, new_gate, y]


def run_kernel(op: str, cuda: bool, *operands: Any) -> list[Tensor]:
    """Run a kernel as `_ext.run_native` does, without what ops check before; return what it wrote last."""

    def whole(operand: Any) -> Any:
        if isinstance(operand, list):
            return [whole(each) for each in operand]
        return operand.contiguous() if isinstance(operand, Tensor) else operand

    def passed(operand: Any) -> Any:
        if isinstance(operand, list):
            return [passed(each) for each in operand]
        return _ext.memory(operand) if isinstance(operand, Tensor) else operand

    # kept until the kernel has run
    given = whole(list(operands))
    sent = passed(given)
    if cuda:
        getattr(_ext.cuda_module(), op)(0, 0, *sent)
    else:
        getattr(_ext.module(), op)(*sent, *([] if op == "pack_linear" else [1]))
    return [operand for operand in given[-1:] if isinstance(operand, Tensor)]


def attend(q: Any, k: Any, v: Any, d_out: Any, scale: Any, bias: Any) -> Any:
    """Run attention and its VJP."""
    out, saved = attention_native(q, k, v, scale, bias)
    return out, attention_vjp_native(saved, d_out)


def multiply(
    x: Any, matrix: Any, bias: Any, row_scale: Any, gate: Any, residual: Any, activation: Any, operand: Any
) -> Any:
    """Run linear with an epilogue, for weights packed as an operand, or as their own dtype is."""
    weight = pack_native(matrix) if operand is None else pack_panels(matrix, operand)
    if activation is not None:
        return linear_native(x, weight, bias, row_scale=row_scale, activation=activation)
    given = {"row_scale": row_scale, "gate": gate, "residual": residual}
    if isinstance(weight, NativeWeight):
        # written over the residual where it fits; the caller's stays as it is
        given["residual"] = residual.clone() if isinstance(residual, Tensor) else residual
        return linear_native(x, weight, bias, **given, overwrite=True)
    return linear_native(x, weight, bias, **given)


def of_walk(make: Maker, op: str) -> Case:
    """Return a call of an op of the walks."""
    rng, dtype = make.rng, make.rng.choice((torch.float32, torch.float32, torch.bfloat16))
    rows, queries, heads, dim = rng.randint(1, 2), rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 9)
    tokens = rng.choice((1, 3, 17, 401))

    def numbers(*shape: int) -> Tensor:
        return make.numbers(*shape, dtype=dtype)

    if op == "attention":
        q, d_out = numbers(rows, queries, heads, dim), numbers(rows, queries, heads, dim)
        k, v = numbers(rows, tokens, heads, dim), numbers(rows, tokens, heads, dim)
        bias = numbers(heads, queries, tokens) if rng.random() < 0.5 else None
        return Case(op, attend, [q, k, v, d_out, 0.3, bias], OF_WALKS)
    if op == "row_rstd":
        centred = rng.random() < 0.5
        return Case(op, lambda x, eps: row_rstd_native(x, eps, centred=centred), [numbers(rows, dim), 1e-6], OF_WALKS)
    if op == "activate":
        name = rng.choice(list(GATES)) + rng.choice(("", "_glu", "_glu_last"))
        return Case(op, lambda u: activate_native(u.clone(), name), [numbers(rows, 2 * dim)], OF_WALKS)

    def mixed(*shape: int) -> Tensor:
        return make.numbers(*shape, dtype=rng.choice(FLOATS[:3:2]))

    dim = rng.choice((dim, dim, 389))
    operands = [mixed(rows, dim), numbers(tokens, dim), mixed(tokens), make.numbers(rows, dtype=torch.float32)]
    operands += [mixed(rows, tokens), mixed(rows, tokens), rng.choice((None, *GATES)), rng.choice((None, *OPERANDS))]
    return Case(op, multiply, operands, OF_WALKS)


def valid(rng: random.Random) -> Case:
    """Return a call whose operands fit."""
    make = Maker(rng)
    form = rng.choice(("public", "library", "kernel", "kernel", "walk"))
    if form == "walk":
        return of_walk(make, rng.choice(("attention", "row_rstd", "activate", "linear", "linear")))
    op = rng.choice(list(_library.SCHEMAS))
    if form == "public":
        return Case(op, lambda *given: public(op, *given), of_op(make, op))
    if form == "library":
        return Case(f"torch.ops.{op}", getattr(torch.ops.dave_fast, op), of_op(make, op))
    cuda = rng.random() < 0.4
    op = rng.choice(("normal", "pack_linear", "linear", "linear")) if not cuda and rng.random() < 0.3 else op
    return Case(
        f"{'_cuda' if cuda else '_native'}.{op}",
        lambda *given: run_kernel(op, cuda, *given),
        of_kernel(make, op, cuda=cuda),
    )


def changed(rng: random.Random, operand: Any, others: Sequence[Any]) -> Any:
    """Return an operand that is another, or of another kind, than the one that fits."""
    if rng.random() < 0.03:
        return rng.choice(STRANGE)
    if isinstance(operand, list) and operand:
        if rng.random() < 0.15:
            return rng.choice((operand[:-1], operand + operand[:1], operand[::-1], []))
        place = rng.randrange(len(operand))
        return [changed(rng, each, operand) if i == place else each for i, each in enumerate(operand)]
    if isinstance(operand, Tensor):
        return changed_tensor(rng, operand, [other for other in others if isinstance(other, Tensor)])
    if isinstance(operand, bool) or operand is None or isinstance(operand, str):
        return rng.choice(BACKENDS)
    if isinstance(operand, int):
        return rng.choice((rng.choice(INTEGERS), operand + 1, operand - 1))
    if isinstance(operand, float):
        return rng.choice(VALUES)
    return rng.choice((*FLOATS, *OTHERS))


def changed_tensor(rng: random.Random, tensor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return a tensor of another length, stride, type, device or value; or another operand, whose memory it shares."""
    if tensor.is_meta or tensor.is_sparse or tensor.dtype == torch.float8_e4m3fn:
        return tensor
    kind = rng.choice(("length", "stride", "type", "value", "value", "other", "device"))
    if kind == "length":
        more = torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor[None]
        shapes = [tensor[:0], tensor[:1], tensor[:-1], more] if tensor.ndim else [more]
        return rng.choice([*shapes, tensor.flatten(), tensor[None], tensor.flatten()[:-1], tensor.sum()])
    if kind == "stride":
        if not tensor.ndim or not tensor.numel():
            return tensor
        wide = torch.cat([tensor, tensor], dim=-1)
        shapes = [tensor[:1].expand_as(tensor), tensor.flip(0), wide[..., : tensor.shape[-1]], wide[..., ::2]]
        shapes += [tensor.mT.contiguous().mT] if tensor.ndim > 1 else []
        shapes += [tensor.flatten()[:1].expand(tensor.shape), torch.cat([tensor, tensor])[1:]]
        return rng.choice(shapes)
    if kind == "type":
        return (tensor.real if tensor.is_complex() else tensor).to(rng.choice((*FLOATS, *OTHERS)))
    if kind == "device":
        return tensor.to("meta") if rng.random() < 0.5 else tensor.to_sparse()
    if kind == "other" and others:
        return rng.choice(list(others))
    if not tensor.numel():
        return tensor
    found = tensor.clone(memory_format=torch.contiguous_format)
    flat = found.view(-1)
    for _ in range(rng.randint(1, 3)):
        values = VALUES if tensor.is_floating_point() else WORDS if tensor.dtype == torch.int64 else (0, 1)
        flat[rng.randrange(flat.numel())] = rng.choice(values)
    return found


def tensors_of(operand: Any) -> list[Tensor]:
    """Return the tensors in an operand or a result."""
    if isinstance(operand, Tensor):
        return [operand]
    return [t for each in operand for t in tensors_of(each)] if isinstance(operand, list | tuple) else []


def is_moderate(operands: Sequence[Any]) -> bool:
    """Return whether results of these operands have to be finite."""
    numbers = [operand for operand in operands if isinstance(operand, float)]
    tensors = [t for t in tensors_of(list(operands)) if t.dtype.is_floating_point or t.dtype.is_complex]
    known = all(t.dtype in FLOATS and t.layout == torch.strided and not t.is_meta for t in tensors)
    return (
        known
        and all(1e-6 <= number <= MODERATE for number in numbers)
        and all(bool((t.double().abs() <= MODERATE).all()) for t in tensors)
    )


def run(number: int) -> str:
    """Run one case; return how it ended: "refused" or "defined".

    Raises:
        AssertionError: it ended in another way.
    """
    rng = random.Random(number)
    case = valid(rng)
    for _ in range(rng.randint(0, 3)):
        place = rng.randrange(len(case.operands))
        case.operands[place] = changed(rng, case.operands[place], case.operands)
    described = f"case {number}: {case.name}({', '.join(map(describe, case.operands))})"
    try:
        first = tensors_of(case.call(*case.operands))
        second = tensors_of(case.call(*case.operands))
    except case.expected:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{described} raised {error!r}") from error
    for once, again in zip(first, second, strict=True):
        if once.device.type != "cpu":
            continue
        assert torch.equal(once.nan_to_num(7), again.nan_to_num(7)), f"{described} is not the same again"
        # the kernels of a GPU tell an image outside of the batch by NaN; half precision overflows; packed words of one
        # operand are NaN as those of another
        anything = case.name.startswith(("_cuda", "_native.linear", "_native.pack_linear"))
        if once.dtype in FLOATS[:2] and not anything and is_moderate(case.operands):
            assert bool(once.isfinite().all()), f"{described} is not finite"
    return "defined"


def describe(operand: Any) -> str:
    """Return an operand in a few words."""
    if isinstance(operand, list):
        return f"[{', '.join(map(describe, operand))}]"
    if not isinstance(operand, Tensor):
        return repr(operand)
    return f"{str(operand.dtype).removeprefix('torch.')}{list(operand.shape)}"


def take_modules(folder: Path) -> None:
    """Let this process use the two modules of a folder, the one of CUDA for CPU tensors."""
    for name in ("_native", "_cuda"):
        (path,) = folder.glob(f"{name}.*.so")
        spec = spec_from_file_location(f"dave_fast.{name}", path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[f"dave_fast.{name}"] = module
    _ext.queue = lambda device: (0, 0)
    _registry.BACKENDS["cuda"] = _registry.Backend("cuda", ("cpu",), lambda: None)


def main() -> None:
    """Run the cases that the command line asks for, by the kernels of each instruction set in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--modules", type=Path)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.modules is not None:
        take_modules(chosen.modules)
    start, ended = time.perf_counter(), {"refused": 0, "defined": 0}
    isas = _ext.module().usable_isas()
    for number in range(chosen.first, chosen.first + chosen.cases):
        _ext.module().use_isa(isas[number % len(isas)])
        # where the process ends, its last line names the case
        print(f"\rcase {number}", end="", flush=True)
        ended[run(number)] += 1
    print(f"\nfuzz passed: {ended} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
