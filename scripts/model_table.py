"""The table of docs/models.md: which of timm's ViT-like architectures are explained, and by which route.

    python scripts/model_table.py                  prove everything again (minutes) and write docs/models.json and .md
    python scripts/model_table.py --routes         ask only which of them the engine has a plan for now
    python scripts/model_table.py --only swin      prove the structures of one timm module and print them

The list. An architecture of timm's registry is ViT-like when one of its modules is named after attention (ATTENTION
below), channel gates of convolutional networks left out. Architectures whose modules agree in everything but sizes
(`structure`) share one proof, given on the smallest of them: built by timm's own entry point with its depth cut as far
as no kind of module is lost, random weights that are nowhere trivial (tests/variants.py), and an image as small as
the model takes. Explained means that the affine replay passes in float64 (dave_fast/replay.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import inspect
import json
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dave_fast import plan  # noqa: E402
from dave_fast.errors import DaveFastError  # noqa: E402
from dave_fast.replay import prove_frozen  # noqa: E402
from tests.variants import randomise  # noqa: E402

JSON, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
ATTENTION = re.compile("Attention|Attn|MHSA|MLA|LambdaLayer|HSMSSD")
# gates on the channels of convolutional networks (ResNeSt, SKNet): no positions are mixed
CHANNEL_GATES = {"SplitAttn", "SelectiveKernelAttn"}
DEPTHS = ("depth", "depths", "layers", "num_layers")
IMAGE_SIZES = (112, 128, 224)

Structure = frozenset[tuple[str, tuple[Any, ...]]]


def family(name: str) -> str:
    """The module of timm that an architecture comes from."""
    return str(model_entrypoint(name).__module__).rpartition(".")[2]


def vit_like(model: nn.Module) -> bool:
    """The criterion of the list."""
    kinds = {type(m).__name__ for m in model.modules()} - CHANNEL_GATES
    return any(ATTENTION.search(kind) for kind in kinds)


def structure(model: nn.Module) -> Structure:
    """What a model is made of, whatever its sizes: each kind of module with its switches, functions and parts."""

    def switches(module: nn.Module) -> Iterator[tuple[str, object]]:
        for name, value in sorted(vars(module).items()):
            if name == "training" or name.startswith("_"):
                continue
            if value is None or isinstance(value, bool | str):
                yield name, value
            elif callable(value):
                yield name, getattr(value, "__name__", type(value).__name__)
        for parts in (module._parameters, module._buffers):
            yield from ((name, part is not None) for name, part in sorted(parts.items()))
        yield from ((name, type(part).__name__) for name, part in sorted(module._modules.items()) if not name.isdigit())

    return frozenset((type(m).__qualname__, tuple(switches(m))) for m in model.modules())


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without the memory of its weights."""
    with torch.device("meta"):
        return make()


@contextmanager
def cut(name: str, depth: int) -> Iterator[None]:
    """Within it timm builds the architectures of this family with at most `depth` blocks a stage."""
    module: Any = importlib.import_module(model_entrypoint(name).__module__)
    build = module.build_model_with_cfg

    def shorter(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return min(value, depth)
        if isinstance(value, list | tuple):
            return type(value)(shorter(v) for v in value)
        return value

    def build_shorter(*args: Any, **kwargs: Any) -> Any:
        short = {k: shorter(v) if k in DEPTHS else _cut_config(v, shorter) for k, v in kwargs.items()}
        return build(*args, **short)

    module.build_model_with_cfg = build_shorter
    try:
        yield
    finally:
        module.build_model_with_cfg = build


def _cut_config(value: Any, shorter: Callable[[Any], Any]) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return dataclasses.replace(value, **{k: shorter(getattr(value, k)) for k in DEPTHS if hasattr(value, k)})


@dataclasses.dataclass(frozen=True)
class Small:
    """How an architecture is built for its proof: depth of its stages, side of the image, None as registered."""

    name: str
    depth: int | None
    side: int | None

    def build(self) -> nn.Module:
        """The model, with timm's initial weights."""
        settings: dict[str, Any] = {"num_classes": 7}
        if self.side is not None:
            settings["img_size"] = self.side
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.depth is None:
                return timm.create_model(self.name, **settings).eval()
            with cut(self.name, self.depth):
                return timm.create_model(self.name, **settings).eval()

    def image(self, model: nn.Module) -> torch.Tensor:
        """One image of normal deviates, of the size that the model is built for."""
        channels, height, width = model.pretrained_cfg["input_size"]
        if self.side is not None:
            height = width = self.side
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, channels, height, width, generator=generator)


def smallest(name: str) -> Small:
    """The smallest form in which an architecture keeps its structure."""
    whole = structure(on_meta(Small(name, None, None).build))
    for depth in (1, 2, 3, 4, None):
        small = Small(name, depth, None)
        if depth is None or _keeps(small, whole):
            break
    for side in IMAGE_SIZES:
        if _keeps(dataclasses.replace(small, side=side), whole):
            return dataclasses.replace(small, side=side)
    return small


def _keeps(small: Small, whole: Structure) -> bool:
    try:
        return structure(on_meta(small.build)) == whole
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
        # This family does not take the setting.
        return False


def prove(small: Small) -> dict[str, Any]:
    """The proof of one structure, as a row of the table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small.build()
        randomise(model)
    row: dict[str, Any] = {"route": "frozen" if plan.why_not(model) else "engine", "error": None, "reason": None}
    try:
        report = prove_frozen(model, small.image(model))
        row |= {"error": float(f"{max(report.errors):.1e}"), "operators": report.operators}
        if not report.has_attention:
            row |= {"route": "refused", "reason": "no operator of it mixes positions"}
    except DaveFastError as error:
        row |= {"route": "refused", "reason": str(error)}
    return row


def inventory(only: str | None = None) -> dict[Structure, list[str]]:
    """Every ViT-like architecture, by structure; the one with the fewest parameters first."""
    groups: dict[Structure, list[tuple[int, str]]] = defaultdict(list)
    for name in timm.list_models():
        if only is not None and family(name) != only:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = on_meta(lambda name=name: timm.create_model(name, num_classes=7))
        if vit_like(model):
            groups[structure(model)].append((sum(p.numel() for p in model.parameters()), name))
    return {kind: [name for _, name in sorted(members)] for kind, members in groups.items()}


def prove_all(only: str | None = None) -> list[dict[str, Any]]:
    """The rows of the table, in the order of timm's modules and names."""
    rows = []
    groups = sorted(inventory(only).values(), key=lambda names: (family(names[0]), names[0]))
    for number, names in enumerate(groups, 1):
        started = time.perf_counter()
        small = smallest(names[0])
        made = {"proved_on": names[0], "depth": small.depth, "side": small.side}
        row = {"family": family(names[0]), "architectures": sorted(names), **made, **prove(small)}
        gc.collect()
        seconds = time.perf_counter() - started
        print(f"{number}/{len(groups)} {names[0]}: {row['route']} {row['error']} {seconds:.1f} s", row["reason"] or "")
        rows.append(row)
    return rows


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="a module of timm, such as swin_transformer")
    parser.add_argument("--routes", action="store_true", help="keep the proofs, ask again for plans")
    options = parser.parse_args()
    prove_all(options.only)


if __name__ == "__main__":
    main()
