"""From a reading to layers: weights are folded in float64 and cast once at the end.

With Z = I − 11ᵀ/D, the projection that removes a token's mean:

- A norm's weight w and bias β go into the linear layer that reads it: W ← W·diag(w), b ← b + W·β. One scalar a row is
  left of the norm, 1/σ, in the forward walk and in the VJP walk. This holds for the norm ahead of a branch and for one
  inside it, on the attention's output or the hidden layer.
- A LayerNorm's centring goes into the same reader: W ← W·Z. So the reader takes rows that are not centred.
- Where everything that reads the residual stream ignores a token's mean (all norms are LayerNorms, the tail's too),
  the writers are centred as well: W ← Z·W, b ← Z·b. The stream then has no mean, 1/σ is that of an RMSNorm, and no
  low-precision digits are spent on the mean. Otherwise 1/σ is taken from the variance.
- LayerScale's γ goes into the writer before it is centred.
- Heads of keys and values that several query heads share are repeated in the weights.
- An interleaved rotary embedding becomes one whose halves turn with each other: the rows of q and k are permuted within
  each head, which leaves q·k the same.

The forward half of this is known (Jiang et al., arXiv 2305.14858). It holds for the frozen VJP too, because the
operators that remain are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan import reading
from dave_fast.plan.layers import AttentionLayer, FoldedNorm, Layer, MlpLayer, Projection, Rotation, Step
from dave_fast.plan.reading import Linear, Norm, Reading, Rotary

Pack = Callable[[Tensor], Any]


@dataclass(frozen=True)
class LayerBuilder:
    """Makes the layers of a plan from the branches of a reading.

    Attributes:
        dtype: of activations.
        stream: of biases, which are added where sums have it.
        packed: of matrices before they are packed.
        pack: makes the form that the engine's `linear` takes of a matrix (O, I) in that dtype.
        device: on which the layers' tensors are made.
        source: the reading.
        centred: whether the residual stream has no mean.
        shared: rotations and biases that layers share, by the identity of their sources.
    """

    dtype: torch.dtype
    stream: torch.dtype
    packed: torch.dtype
    pack: Pack
    device: torch.device
    source: Reading
    centred: bool
    shared: dict[int, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N, prefix tokens included."""
        return len(self.source.position) + len(self.source.prefix)

    @property
    def read(self) -> int:
        """Leading tokens that the tail reads."""
        return self.source.read or self.tokens

    def cast(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in a dtype, by default the plan's, contiguous on its device."""
        return t.to(device=self.device, dtype=dtype or self.dtype).contiguous()

    def projection(self, linear: Linear, transposed: Tensor | None = None) -> Projection:
        """Pack a linear layer for both walks.

        Args:
            linear: float64 weight (O, I) and bias (O,).
            transposed: the matrix that the VJP walk multiplies with, where that is only a part of the weight.
        """
        back = linear.weight if transposed is None else transposed
        weight, back = (self.pack(self.cast(matrix, self.packed)) for matrix in (linear.weight, back.T))
        return Projection(weight, self.cast(linear.bias, self.stream), back)

    def norm(self, norm: Norm | None) -> Norm | None:
        """Return a norm that is not folded with its tensors on the device, in the dtype of statistics."""
        if norm is None:
            return None
        weight, bias = (t.to(self.device, statistics_dtype(self.dtype)) for t in (norm.weight, norm.bias))
        return replace(norm, weight=weight, bias=bias)

    def step(self, branches: reading.Step, index: int) -> Step:
        """Return the step of this index; the last one with attention is trimmed where the tail reads few tokens."""
        last = max(i for i, step in enumerate(self.source.steps) if any(isinstance(b, reading.Attention) for b in step))
        trimmed = index == last and self.read < self.tokens
        layers = (self.attention(b, trimmed) if isinstance(b, reading.Attention) else self.mlp(b) for b in branches)
        return Step(tuple(layers), trimmed)

    def attention(self, branch: reading.Attention, trimmed: bool) -> AttentionLayer:
        """Return the layer of an attention branch, with queries apart from keys and values where it is trimmed."""
        width = branch.heads * branch.head_dim
        order = None if branch.rotary is None or branch.rotary.half else _halves(branch.head_dim)
        parts = [double(part) for part in branch.qkv]
        parts = [parts[0], *(_repeat_heads(part, branch.groups, branch.head_dim) for part in parts[1:])]
        parts = [*(_permute_heads(part, order) for part in parts[:2]), parts[2]]
        qkv = _fold_reader(_stack(parts), branch.norm)
        values = qkv.weight[2 * width :]
        whole = query = key_value = None
        if trimmed:
            query = self.projection(qkv.rows(0, width))
            key_value = self.projection(qkv.rows(width, 3 * width), values)
        else:
            whole = self.projection(qkv, values)
        return AttentionLayer(
            norm=_folded_norm(branch.norm, self.centred),
            qkv=whole,
            query=query,
            key_value=key_value,
            heads=branch.heads,
            head_dim=branch.head_dim,
            scale=branch.scale,
            q_norm=self._head_norm(branch.q_norm, order),
            k_norm=self._head_norm(branch.k_norm, order),
            rotation=self._rotation(branch.rotary),
            bias=self._bias(branch.bias, trimmed),
            inner=_folded_norm(branch.inner, False),
            writer=self._writer(branch.proj, branch),
            post=self.norm(branch.post),
        )

    def mlp(self, branch: reading.Mlp) -> MlpLayer:
        """Return the layer of an MLP branch."""
        fc1 = _fold_reader(_stack([double(part) for part in branch.fc1]), branch.norm)
        return MlpLayer(
            norm=_folded_norm(branch.norm, self.centred),
            fc1=self.projection(fc1, _value_half(fc1.weight, branch.activation)),
            activation=branch.activation,
            inner=_folded_norm(branch.inner, False),
            writer=self._writer(branch.fc2, branch),
            post=self.norm(branch.post),
        )

    def resized(self, steps: tuple[Step, ...], branches: list[reading.Step]) -> tuple[Step, ...]:
        """Return another size's steps with this size's rotations and biases; the same steps where there are none.

        Args:
            steps: of the plan for another image size, whose weights are shared.
            branches: of the reading for this size.
        """
        attentions = [b for some in branches for b in some if isinstance(b, reading.Attention)]
        if all(b.rotary is None and b.bias is None for b in attentions):
            return steps

        def resize(layer: Layer, branch: reading.Branch, trimmed: bool) -> Layer:
            if not isinstance(layer, AttentionLayer) or not isinstance(branch, reading.Attention):
                return layer
            return replace(layer, rotation=self._rotation(branch.rotary), bias=self._bias(branch.bias, trimmed))

        return tuple(
            replace(step, layers=tuple(resize(*pair, step.trimmed) for pair in zip(step.layers, some, strict=True)))
            for step, some in zip(steps, branches, strict=True)
        )

    def _writer(self, linear: Linear, branch: reading.Branch) -> Projection:
        """Return γ·W₂ with the inner norm folded in, centred where the stream is and no norm follows."""
        linear = _fold_reader(double(linear), branch.inner)
        linear = fold_gamma(linear, branch.gamma)
        return self.projection(centre_writer(linear) if self.centred and branch.post is None else linear)

    def _head_norm(self, norm: Norm | nn.Module | None, order: Tensor | None) -> Norm | nn.Module | None:
        """Return a norm of queries or keys with its components permuted, or a copy of a module."""
        if isinstance(norm, nn.Module):
            assert order is None, "a module cannot follow permuted components"
            return copy.deepcopy(norm).to(device=self.device, dtype=self.dtype).requires_grad_(False)
        if norm is None or order is None:
            return self.norm(norm)
        order = order.to(norm.weight.device)
        return self.norm(replace(norm, weight=norm.weight[order], bias=norm.bias[order]))

    def _shared(self, source: Any, make: Callable[[Any], Any]) -> Any:
        """Return `make(source)`, made once for all layers; None for None."""
        if source is not None and id(source) not in self.shared:
            self.shared[id(source)] = make(source)
        return self.shared.get(id(source))

    def _rotation(self, rotary: Rotary | None) -> Rotation | None:
        rotation: Rotation | None = self._shared(rotary, self._make_rotation)
        return rotation

    def _make_rotation(self, rotary: Rotary) -> Rotation:
        half = rotary.cos.shape[-1] // 2
        once = slice(0, half) if rotary.half else slice(0, None, 2)
        tables = []
        for table, still in ((rotary.cos, 1.0), (rotary.sin, 0.0)):
            # (heads or 1, n, head_dim/2), behind rows for the tokens that do not turn
            turning = (table if table.ndim == 3 else table[None])[..., once].double()
            staying = turning.new_full((len(turning), rotary.skip, half), still)
            rows = torch.cat([staying, turning], dim=1).transpose(0, 1)
            tables.append(rows.to(self.device, statistics_dtype(self.dtype)).contiguous())
        return Rotation(*tables)

    def _bias(self, bias: Callable[[], Tensor] | None, trimmed: bool) -> Tensor | None:
        table: Tensor | None = self._shared(bias, lambda source: self.cast(source()))
        return table if table is None or not trimmed else table[:, : self.read].contiguous()


def double(linear: Linear) -> Linear:
    """Return a linear layer in float64."""
    return Linear(linear.weight.double(), linear.bias.double())


def _stack(parts: list[Linear]) -> Linear:
    return Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


def _repeat_heads(linear: Linear, groups: int, head_dim: int) -> Linear:
    """Repeat every head `groups` times in a row."""
    if groups == 1:
        return linear
    tensors = (linear.weight, linear.bias)
    return Linear(*(t.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for t in tensors))


def _halves(head_dim: int) -> Tensor:
    """Return the order of a head's components that puts the first of each pair ahead of all the second ones."""
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])


def _permute_heads(linear: Linear, order: Tensor | None) -> Linear:
    if order is None:
        return linear
    order = order.to(linear.weight.device)
    weight, bias = (t.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1) for t in (linear.weight, linear.bias))
    return Linear(weight, bias)


def _value_half(weight: Tensor, activation: str) -> Tensor:
    """Return the rows of a gated MLP's first weight that make the value; all rows where there is no gate."""
    if "_glu" not in activation:
        return weight
    first, last = weight.chunk(2)
    return first if activation.endswith("_glu_last") else last


def fold_gamma(linear: Linear, gamma: Tensor | None) -> Linear:
    """Return γ·W and γ·b in float64."""
    linear = double(linear)
    if gamma is None:
        return linear
    return Linear(linear.weight * gamma.double()[:, None], linear.bias * gamma.double())


def remove_mean(rows: Tensor) -> Tensor:
    """Subtract each row's mean."""
    return rows - rows.mean(-1, keepdim=True)


def _folded_norm(norm: Norm | None, centred: bool) -> FoldedNorm | None:
    """Return what is left of a norm to compute, for rows that are centred or not."""
    return None if norm is None else FoldedNorm(norm.eps, centred or not norm.centres)


def _fold_reader(linear: Linear, norm: Norm | None) -> Linear:
    """Return W·diag(w), times Z where the norm centres, and b + W·β."""
    if norm is None:
        return linear
    scale, shift = norm.weight.to(linear.weight), norm.bias.to(linear.weight)
    weight = linear.weight * scale
    return Linear(remove_mean(weight) if norm.centres else weight, linear.bias + linear.weight @ shift)


def centre_writer(linear: Linear) -> Linear:
    """Return Z·W and Z·b."""
    return Linear(linear.weight - linear.weight.mean(0), linear.bias - linear.bias.mean())
