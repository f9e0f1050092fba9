"""The weights in what a training script saved: which of its dictionaries they are, and which names they have.

A script puts weights into a dictionary beside its own state, often the last ones and an average of them, and its
wrappers put prefixes before their names. Every dictionary with tensors is a candidate, but for those of an optimiser:

- an average (keys such as "ema") comes before a "teacher", that before the last weights, those before a "student";
- a prefix is taken off where all names have it;
- the candidate that fits the model is taken. Several of one rank that fit, with different values, are refused, and so
  is an average that does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.numbers import shown

# by a word of a key, between underscores; the lowest rank comes first
_RANKS = {"ema": 0, "swa": 0, "average": 0, "averaged": 0, "teacher": 1, "student": 3, "online": 3}
_AVERAGE, _LAST = 0, 2
# usual keys of the last weights, and first parts of their names
_USUAL = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
# parts of the keys of an optimiser, whose state may have the names of the weights
_NO_WEIGHTS = ("optim", "sched", "scaler", "grad", "exp_avg", "momentum_buffer")
# parts of names that wrappers of PyTorch put anywhere; no library's own names have them
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# single numbers that averages save beside the weights
_COUNTERS = ("n_averaged", "num_updates", "initted", "step", "decay")
# indices that old versions of CLIP saved; the model has its own
NOT_WEIGHTS = "position_ids"

# letters of a name, keys that lead to weights, and numbers up to which a tensor may repeat those of its file
_LONGEST, _DEEPEST, _EXPANDED = 500, 32, 2**20
# places of one dictionary that are looked at
_MOST_PLACES = 4

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """Tensors that may be a model's weights.

    Attributes:
        keys: those that lead to them, the outermost first.
        tensors: by name.
    """

    keys: tuple[str, ...]
    tensors: Tensors

    @property
    def rank(self) -> int:
        """The rank of the innermost key that has one."""
        words = (word for key in reversed(self.keys) for word in key.lower().split("_"))
        return next((_RANKS[word] for word in words if word in _RANKS), _LAST)

    @property
    def usual(self) -> bool:
        """Whether the keys are usual ones."""
        return self.rank != _LAST or all(key in _USUAL for key in self.keys)

    @property
    def place(self) -> str:
        """The keys in words."""
        return " in ".join(repr(key) for key in reversed(self.keys)) or "the names without a key"

    def same(self, other: Candidate) -> bool:
        """Return whether both have the same names and values."""
        mine, theirs = self.tensors, other.tensors
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def choose(found: Any, wanted: Tensors, where: str) -> Candidate | None:
    """Return the weights in a checkpoint by a model's names, or the likeliest ones where none fit.

    Args:
        found: what the file holds.
        wanted: the model's own weights by name.
        where: the file, for messages.

    Returns:
        The weights; None where there are no tensors.

    Raises:
        InputError: several fit.
    """
    every = [part for each in _candidates(found) for part in ([each] if _fits(each, wanted) else _roles(each))]
    # others hold no weights, but statistics or prototypes
    every = [each for each in every if 2 * len(each.tensors) >= len(wanted)] or every
    ranks = sorted({each.rank for each in every})
    for rank in ranks:
        fitting = [each for each in every if each.rank == rank and _fits(each, wanted)]
        # what stands at another place does not replace weights that do not fit
        usual = [each for each in every if each.rank == rank and each.usual]
        if any(each.usual for each in fitting) or (fitting and not usual):
            return _named(_only(fitting, where), wanted)
        if rank == _AVERAGE:
            break
    likely = [_named(each, wanted) for each in every if each.rank == ranks[0]]
    return max(likely, key=lambda each: (each.usual, len(each.tensors.keys() & wanted)), default=None)


def likeliest(found: Any, where: str) -> Candidate | None:
    """Return the weights in a checkpoint where the model's names are not known, without prefixes of wrappers.

    Returns:
        The weights; None where there are no tensors.

    Raises:
        InputError: several are as likely.
    """
    every = [part for each in _candidates(found) for part in _roles(each)]
    best = [each for each in every if each.rank == min(each.rank for each in every)]
    best = [each for each in best if each.usual] or best
    # a dictionary around others has no weights of its own
    best = [each for each in best if not any(_inside(other, each) for other in best)]
    return _only([Candidate(each.keys, _unwrapped(each.tensors)) for each in best], where) if best else None


def _only(candidates: Sequence[Candidate], where: str) -> Candidate:
    """Return one of several candidates with the same values; raise InputError where they differ."""
    first, *others = candidates
    different = [each for each in others if not first.same(each)]
    if different:
        places = " and ".join(each.place for each in (first, *different))
        raise InputError(f"{where} has several weights, {places}: save the state dict that you mean alone.")
    return first


def _inside(inner: Candidate, outer: Candidate) -> bool:
    return inner.keys[: len(outer.keys)] == outer.keys and len(inner.keys) > len(outer.keys)


def _candidates(found: Any, keys: tuple[str, ...] = (), seen: Counter[int] | None = None) -> Iterator[Candidate]:
    """Yield the dictionaries with tensors, each a few times; below the key of an average also lists, numbered.

    Raises:
        InputError: a dictionary has names that are no weights', or a tensor more numbers than its file has.
    """
    seen = Counter() if seen is None else seen
    # a dictionary may hold itself, or be held by many
    if seen[id(found)] >= _MOST_PLACES or len(keys) > _DEEPEST:
        return
    seen[id(found)] += 1
    if isinstance(found, list | tuple) and Candidate(keys, {}).rank == _AVERAGE:
        found = {str(index): each for index, each in enumerate(found)}
    if not isinstance(found, Mapping):
        return
    tensors = {name: each for name, each in found.items() if isinstance(name, str) and isinstance(each, Tensor)}
    tensors = {name: each for name, each in tensors.items() if name.rpartition(".")[2] != NOT_WEIGHTS}
    for name, each in tensors.items():
        _check_tensor(name, each)
    if any(each.dim() for each in tensors.values()):
        yield Candidate(keys, tensors)
    for key, each in found.items():
        if isinstance(key, str) and not any(word in key.lower() for word in _NO_WEIGHTS):
            yield from _candidates(each, (*keys, key), seen)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if len(name) > _LONGEST:
        raise InputError(f"a weight has the name {shown(name)}; expected at most {_LONGEST} letters.")
    plain = tensor.layout == torch.strided and not tensor.is_meta
    # strides of zero show the same few numbers as many
    if plain and tensor.numel() > max(_EXPANDED, tensor.untyped_storage().nbytes()):
        raise InputError(
            f"the weight {name} is {tuple(tensor.shape)}, and its file has {tensor.untyped_storage().nbytes()} bytes "
            "of it: save contiguous tensors."
        )


def _roles(candidate: Candidate) -> list[Candidate]:
    """Return the models of a module that holds several, such as a teacher and a student; else the candidate alone."""
    tensors = candidate.tensors
    while (common := _common_part(tensors)) is not None:
        tensors = _of_part(tensors, common)
    tensors = _without_counters(tensors)
    parts = sorted({name.partition(".")[0] for name in tensors})
    ranked = [Candidate((*candidate.keys, part), _of_part(tensors, part)) for part in parts]
    if not all(each.usual and each.tensors for each in ranked) or all(each.keys[-1] in _USUAL for each in ranked):
        return [candidate]
    return ranked


def _fits(candidate: Candidate, wanted: Tensors) -> bool:
    found = _named(candidate, wanted).tensors
    return {name: each.shape for name, each in found.items()} == {name: each.shape for name, each in wanted.items()}


def _named(candidate: Candidate, wanted: Tensors) -> Candidate:
    """Return a candidate by the names, freed of prefixes, that agree best with those of a model."""
    forms: list[Tensors] = []
    for given in (candidate.tensors, _without_wrappers(candidate.tensors)):
        tensors = given
        forms += [tensors, _without_counters(tensors)]
        while (common := _common_part(tensors)) is not None:
            tensors = _of_part(tensors, common)
            forms += [tensors, _without_counters(tensors)]
        forms += _backbone(candidate.rank, forms[-1])

    def agreement(tensors: Tensors) -> tuple[int, int]:
        return len(tensors.keys() & wanted), -len(tensors)

    return Candidate(candidate.keys, max(forms, key=agreement))


def _backbone(rank: int, tensors: Tensors) -> list[Tensors]:
    """Return the backbone of a teacher or student of self-supervised training, whose heads serve training alone."""
    parts = {name.partition(".")[0] for name in tensors}
    found = "backbone" in parts and all(part.endswith("head") for part in parts - {"backbone"})
    return [_of_part(tensors, "backbone")] if found and rank != _LAST else []


def _unwrapped(tensors: Tensors) -> Tensors:
    """Return the tensors by names without the prefixes of wrappers, with which no library's own names begin."""
    tensors = _without_counters(_without_wrappers(tensors))
    return _unwrapped(_of_part(tensors, "module")) if _common_part(tensors) == "module" else tensors


def _common_part(tensors: Tensors) -> str | None:
    """Return what all names have ahead of their first point; None where they differ or a name has no point."""
    firsts = {name.partition(".")[0] if "." in name else None for name in _without_counters(tensors)}
    return firsts.pop() if len(firsts) == 1 else None


def _of_part(tensors: Tensors, part: str) -> Tensors:
    return {name.removeprefix(f"{part}."): each for name, each in tensors.items() if name.startswith(f"{part}.")}


def _without_wrappers(tensors: Tensors) -> Tensors:
    """Return the tensors by names without wrappers anywhere; as they are where two would have the same name."""
    renamed = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): each for name, each in tensors.items()
    }
    return renamed if len(renamed) == len(tensors) else tensors


def _without_counters(tensors: Tensors) -> Tensors:
    return {name: each for name, each in tensors.items() if each.dim() or name not in _COUNTERS}
