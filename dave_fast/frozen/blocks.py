"""The blocks of any model at whose input the frozen route tells evidence, and where their tokens lie in the image.

A block is an item of an nn.ModuleList, nn.Sequential or nn.ModuleDict in which attention runs, at any depth of nesting;
an item in which other blocks begin is a stage, and counts by its blocks. The tensor that enters a block has to be a cut
of the frozen model: without it no path leads from the output to the image. Only then does Σ tokens ⊙ cotangent, with
the biases behind it, give the output.

One forward pass of a float64 copy with frozen operators decides it, and measures the layout of the tokens
(`dave_fast.frozen.layout`); it takes as long as eight images. In that pass attention counts a thousandth, so that a
token depends mostly on its own patch behind any number of blocks, and a prefix token on next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils import _pytree as pytree

from dave_fast.errors import ModelError
from dave_fast.frozen.layout import ROWS, Layout, changes, layout_of
from dave_fast.frozen.mode import FrozenMode, run_frozen
from dave_fast.frozen.proof import ATTENTION
from dave_fast.given.isolation import class_name, isolated
from dave_fast.ops.precision import statistics_dtype

_SEQUENCES = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# factor of attention's operators while layouts are measured
_LITTLE = 1e-3
_FUSED = "scaled_dot_product_attention"


class NoBlocksError(ModelError):
    """A model without blocks whose tokens have a place in the image; the message ends a sentence with the reason."""


@dataclass(frozen=True)
class BlockInput(Layout):
    """The tensor that enters a block, and the layout of its tokens.

    Attributes:
        path: dotted path of the block's module.
    """

    path: str


@dataclass(frozen=True)
class Entered:
    """What entered a block in a forward pass.

    Attributes:
        tokens: a constant copy, since models may work in place.
        edge: where autograd has the gradient of these tokens: an input of `torch.autograd.grad`.
    """

    tokens: Tensor
    edge: GradientEdge


@contextmanager
def watching(model: nn.Module, blocks: Sequence[BlockInput]) -> Iterator[list[Entered]]:
    """Fill the list, within this context, with what enters each block in one forward pass of the model.

    Args:
        model: for which `find_blocks` found the blocks, or a copy of it; its hooks are removed at the end.
        blocks: in the order of execution.

    Raises:
        ModelError: not every block ran once, in this order.
    """
    entered: list[Entered] = []
    ran: list[str] = []
    caller = get_ident()

    def keep(block: BlockInput, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        # passes of other threads run over the same modules; one that begins as the hook is removed gives no kwargs
        tokens = _entering(args, kwargs) if get_ident() == caller else None
        if tokens is not None:
            ran.append(block.path)
            entered.append(Entered(tokens.detach().clone(), get_gradient_edge(tokens)))

    with _before({block.path: partial(keep, block) for block in blocks}, model):
        yield entered
    if ran != [block.path for block in blocks]:
        raise ModelError(
            f"the blocks of {class_name(model)} ran as {', '.join(ran) or 'none'} in this forward pass, and in another "
            f"as {', '.join(block.path for block in blocks)}: a model whose blocks the image chooses has no evidence "
            "at a depth"
        )


def _entering(args: Any, kwargs: Any) -> Tensor | None:
    """Return the first tensor among the arguments of a module that depends on the image."""
    leaves = pytree.tree_leaves((args, kwargs))
    return next((x for x in leaves if isinstance(x, Tensor) and x.requires_grad), None)


@contextmanager
def _before(hooks: Mapping[str, Callable[..., None]], model: nn.Module) -> Iterator[None]:
    """Call hook(module, args, kwargs) ahead of each module of the paths, within this context."""
    handles = []
    try:
        for path, hook in hooks.items():
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def evidence(tokens: Tensor, cotangent: Tensor, block: BlockInput) -> Tensor:
    """Return Σ_channels tokens ⊙ cotangent of each token: prefix tokens, then patch tokens row by row.

    Args:
        tokens: what entered the block: R on its axis of rows.
        cotangent: of the same shape.
        block: of `find_blocks`.

    Returns:
        (R, N) in float64 for float64 tokens, otherwise in float32.
    """
    exact = statistics_dtype(tokens.dtype)
    products = tokens.to(exact) * cotangent.to(exact)
    summed = products.movedim((block.batch, block.channels), (0, -1)).sum(-1).flatten(1)
    return summed if block.order is None else summed[:, list(block.order)]


def find_blocks(model: nn.Module, image: Tensor) -> tuple[BlockInput, ...]:
    """Return the blocks of a model in the order in which they run, each with the layout of its tokens.

    Blocks that some of the image's influence on the output passes by are left out. The model itself is not called.

    Args:
        model: any module that the proof of the frozen route accepts.
        image: (B, C, H, W), of which the first is used; any image of several values, such as normal deviates.

    Raises:
        NoBlocksError: there are none, one runs more than once, or the tokens of one are not those of a grid that
            divides the image.
    """
    copy = isolated(model, torch.float64)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        calls = _cuts(copy, changes(image[:1].detach().double()))
    known: dict[int, Layout] = {}
    return tuple(_placed(call, image.shape[-2:], known) for call in calls)


def _placed(call: _Call, size: Sequence[int], known: dict[int, Layout]) -> BlockInput:
    layout = layout_of(call.tokens, size, known)
    if layout is None:
        shape = str(tuple(call.tokens.shape)).replace(str(ROWS), "B", 1)
        raise NoBlocksError(
            f"the tensor {shape} that enters its block {call.path!r} has no tokens that are those of a grid that "
            f"divides images of {size[0]}×{size[1]}"
        )
    return BlockInput(**vars(layout), path=call.path)


# Which modules are blocks


@dataclass(eq=False)
class _Call:
    """A call of an item of a sequence: what enters it, the calls of blocks inside, and whether attention runs there."""

    path: str
    tokens: Tensor
    edge: tuple[Node, int]
    inner: list[_Call] = field(default_factory=list)
    attends: bool = False


def _cuts(copy: nn.Module, images: Tensor) -> list[_Call]:
    """Return the calls of blocks in a forward pass on images (B, C, H, W)."""
    leaf = images.clone().requires_grad_()
    # no backward pass follows, so that the graph need not keep values
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_dropped, _dropped):
        calls, output = _traced(copy, leaf)
    attending = [call for call in calls if call.attends]
    if not attending:
        raise NoBlocksError(
            f"no item of an nn.ModuleList or nn.Sequential of {class_name(copy)} has attention in it and runs by itself"
        )
    source, _ = _edge(leaf)
    cuts = {call.edge for call in attending if not _passed_by(output, call.edge, source)}
    cutting = [call for call in attending if call.edge in cuts]
    if not cutting:
        raise NoBlocksError(
            f"the output of {class_name(copy)} depends on the image by a path around the tokens that enter "
            f"{attending[0].path!r}, and around those of every other block"
        )
    chosen: dict[tuple[Node, int], _Call] = {}
    for call in cutting:
        if all(inner.edge == call.edge for inner in call.inner if inner.edge in cuts):
            chosen.setdefault(call.edge, call)
    paths = [call.path for call in calls]
    for call in chosen.values():
        if paths.count(call.path) > 1:
            raise NoBlocksError(f"its block {call.path!r} runs {paths.count(call.path)} times in a forward pass")
    return list(chosen.values())


def _dropped(saved: Any) -> Any:
    return None


class _Damped(FrozenMode):
    """A mode in which attention counts little; `attends` is called where it runs."""

    def __init__(self, inputs: Tensor, attends: Callable[[], None]) -> None:
        super().__init__(inputs)
        self._attends = attends

    def operator(self, tensor: Tensor) -> Tensor:
        """Return the tensor as a constant, the weights of attention times a small number."""
        if self._name not in ATTENTION:
            return super().operator(tensor)
        self._attends()
        # of the fused function the operators are queries and keys
        return super().operator(tensor) * (1 if self._name == _FUSED else _LITTLE)

    def _call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], live: list[Tensor]) -> Any:
        result = super()._call(func, args, kwargs, live)
        return result * _LITTLE if self._name == _FUSED else result


def _traced(copy: nn.Module, leaf: Tensor) -> tuple[list[_Call], Tensor]:
    """Return the calls of all items of sequences that a tensor of the image's graph enters, and the output."""
    calls: list[_Call] = []
    running: list[_Call | None] = []

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = _entering(args, kwargs)
        call = None if tokens is None else _Call(path, tokens.detach().clone(), _edge(tokens))
        running.append(call)
        if call is not None:
            calls.append(call)

    def leave(*_: Any) -> None:
        call = running.pop()
        if call is not None and call.attends:
            for outer in filter(None, running):
                outer.inner.append(call)
        elif call is not None:
            calls.remove(call)

    def attends() -> None:
        for call in filter(None, running):
            call.attends = True

    items = _items(copy)
    leaving = [module.register_forward_hook(leave) for module in items.values()]
    try:
        with _before({path: partial(enter, path) for path in items}, copy):
            return calls, run_frozen(copy, leaf.clone(), _Damped(leaf, attends))
    finally:
        for handle in leaving:
            handle.remove()


def _items(model: nn.Module) -> dict[str, nn.Module]:
    """Return the items of all sequences, each module once, by their paths."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _SEQUENCES):
            for name, child in module.named_children():
                found.setdefault(id(child), (f"{path}.{name}".lstrip("."), child))
    return dict(found.values())


def _edge(tensor: Tensor) -> tuple[Node, int]:
    """Return where a tensor stands in autograd's graph."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _passed_by(output: Tensor, edge: tuple[Node, int], source: Node) -> bool:
    """Return whether autograd's graph leads from the output to a node by a path without an edge."""
    pending, seen = [_edge(output)], {edge}
    while pending:
        at = pending.pop()
        if at[0] is source:
            return True
        if at not in seen:
            seen.add(at)
            pending += [(node, number) for node, number in at[0].next_functions if node is not None]
    return False
