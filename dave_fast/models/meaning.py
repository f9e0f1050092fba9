"""The meaning of a model's output: classes or an embedding, and how a score becomes a probability.

Everything that names a class or a probability asks here, and gives the output itself where it has it, since a model's
attributes may be older than its head. What a model says of itself is read from three attributes, which an `Adapter` has
and which may be set on any module:

    kind    "classifier" or "embedding"; without it a model without a head, or of num_classes 0, gives embeddings
    link    "softmax", one of several classes; "sigmoid", each class for itself; None, no probability (a regression);
            without it the `problem_type` of the model's `config`, else "softmax"
    pretrained_cfg["classifier"]    timm's name, or names, of the head

A single score is never a softmax, which would be 1 whatever the score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.given.wrappers import last_part
from dave_fast.models.spec import LINK_WORDS, Link

Kind = Literal["classifier", "embedding"]

# by the `problem_type` of a transformers configuration
_PROBLEMS: dict[str, Link] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": None,
}
# usual names of a head, where it is the last child and the configuration does not name it
_HEADS = ("head", "heads", "classifier", "fc", "mlp_head", "linear_head")


def kind_of(model: Any) -> Kind:
    """Return the kind of any module: its own `kind`, else by its head, else by its number of classes."""
    model = last_part(model)
    kind = getattr(model, "kind", None)
    if kind in ("classifier", "embedding"):
        return kind
    heads = _heads(model)
    if not heads:
        return "embedding" if getattr(model, "num_classes", None) == 0 else "classifier"
    return "classifier" if any(_width(head) or _has_values(head) for head in heads) else "embedding"


def require_classifier(model: nn.Module, name: str) -> None:
    """Raise InputError for a model that gives embeddings."""
    if kind_of(model) == "embedding":
        raise InputError(
            f"{name} gives embeddings and has no classes. Explain a similarity (DAVE.explain with a callable as the "
            "target), or give a model with a head (one whose head cannot be recognised says model.kind = 'classifier')."
        )


def link_of(model: Callable[..., Any], classes: int) -> Link:
    """Return how the scores of a model become probabilities, where its output is (B, classes)."""
    if kind_of(model) == "embedding":
        return None
    link = _declared_link(model)
    return "sigmoid" if link == "softmax" and classes == 1 else link


def link_of_problem(problem_type: Any) -> Link:
    """Return the link that the `problem_type` of a transformers configuration stands for; a softmax without one."""
    return _PROBLEMS.get(problem_type, "softmax") if isinstance(problem_type, str) else "softmax"


def has_classes(model: Callable[..., Any], output: Tensor) -> bool:
    """Return whether a model's output (B, ...) holds the scores (B, K) of classes."""
    return output.dim() == 2 and kind_of(model) != "embedding"


def most_probable(model: Callable[..., Any], output: Tensor, k: int) -> Tensor:
    """Return the k classes of the highest scores of each image, (k, B) int64, the highest first.

    Raises InputError where the output (B, ...) has no classes, or fewer than k.
    """
    if not has_classes(model, output):
        raise InputError(f"the model's output is {tuple(output.shape)}; top_k needs a classifier's: (B, K).")
    if k > output.shape[1]:
        raise InputError(f"top_k is {k}, and the model has {output.shape[1]} classes.")
    return output.float().topk(k).indices.T.contiguous()


def probabilities(model: Callable[..., Any], output: Tensor) -> Tensor:
    """Return the probability of every score of a model's output (B, ...), float32 or float64; NaN without a link."""
    return as_probabilities(output, link_of(model, output.shape[1]) if has_classes(model, output) else None)


def as_probabilities(output: Tensor, link: Link) -> Tensor:
    """Return the probability of every score of an output (B, ...) by its link, float32 or float64; NaN without one."""
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if link is None:
        return torch.full_like(output, torch.nan)
    return output.softmax(1) if link == "softmax" else output.sigmoid()


def probability_of(model: Callable[..., Any], output: Tensor, classes: Tensor) -> Tensor:
    """Return the probabilities (B, K) float32 of classes (B, K); NaN for −1, and where there are none."""
    if not has_classes(model, output):
        return torch.full(classes.shape, torch.nan, device=classes.device)
    chosen = probabilities(model, output).gather(1, classes.clamp(min=0)).float()
    return chosen.masked_fill(classes < 0, torch.nan)


def head_width(model: Any) -> int | None:
    """Return the number of outputs of a model's first head; None where no head, or none of a known width, is found."""
    widths = map(_width, _heads(last_part(model)))
    return next((width for width in widths if width is not None), None)


def has_own_head(model: Any) -> bool:
    """Return whether each layer that the configuration names as the head is there, a single layer of the same width.

    All of timm's are. A head of several modules in such a place has replaced it; another single layer of as many
    outputs cannot be told from the first one.
    """
    model = last_part(model)
    names = _named_heads(model)
    modules = dict(model.named_modules()) if names else {}
    widths = {_own_width(modules.get(name)) for name in names}
    return None not in widths and len(widths) <= 1


def _declared_link(model: Any) -> Link:
    model = last_part(model)
    link = getattr(model, "link", "")
    # a module may use the name for something else
    if link is None or (isinstance(link, str) and link in LINK_WORDS):
        return LINK_WORDS[link or "none"]
    return link_of_problem(getattr(getattr(model, "config", None), "problem_type", None))


def _named_heads(model: Any) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        return ()
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _heads(model: Any) -> list[nn.Module]:
    """Return the modules in the places of the head; empty where they are not known."""
    if not isinstance(model, nn.Module):
        return []
    names = _named_heads(model)
    if not names:
        # a single layer, at the end of a sequence, is its own head
        name, last = next(reversed(list(model.named_children())), (_HEADS[0], model))
        return [last] if name in _HEADS and (last is not model or _own_width(model)) else []
    return [found for name in names if (found := _nearest(model, name)) is not model]


def _nearest(module: nn.Module, path: str) -> nn.Module:
    """Return the module of a path, or the last one on it that is there."""
    for name in path.split("."):
        child = dict(module.named_children()).get(name)
        if child is None:
            break
        module = child
    return module


def _width(module: nn.Module) -> int | None:
    """Return the number of outputs of a module's last layer that tells it."""
    return next((width for each in reversed(list(module.modules())) if (width := _own_width(each)) is not None), None)


def _own_width(module: Any) -> int | None:
    width = getattr(module, "out_features", getattr(module, "out_channels", None))
    return width if isinstance(width, int) else None


def _has_values(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
