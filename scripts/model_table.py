"""Write the table of docs/models.md: which of timm's ViT-like architectures are explained, and by which route.

    python scripts/model_table.py                  prove everything again (minutes) and write docs/models.json and .md
    python scripts/model_table.py --routes         update only which of them the engine has a plan for
    python scripts/model_table.py --only swin_transformer beit     prove again the architectures of these timm modules

An architecture of timm's registry is ViT-like if one of its modules is named after attention (ATTENTION below), channel
gates of convolutional networks left out. Architectures whose modules differ in sizes only (`structure`) share one
proof, on the smallest of them: built by timm's own entry point with the smallest depth that has every kind of module,
random weights without trivial values (tests/variants.py), and the smallest image that the model takes. Explained means
that the affine replay passes in float64 (dave_fast/frozen/proof.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dave_fast.errors import DaveFastError  # noqa: E402
from dave_fast.frozen.proof import affine_replay  # noqa: E402
from dave_fast.plan.families import why_not  # noqa: E402
from tests.variants import randomise  # noqa: E402

JSON, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
ATTENTION = re.compile("Attention|Attn|MHSA|MLA|LambdaLayer|HSMSSD")
# gates on the channels of convolutional networks (ResNeSt, SKNet), which do not mix positions
CHANNEL_GATES = {"SplitAttn", "SelectiveKernelAttn"}
BEGIN, END = "<!-- scripts/model_table.py -->", "<!-- end -->"
FAILS = "it does not run"
DEPTHS = ("depth", "depths", "layers", "num_layers")
IMAGE_SIZES = (112, 128, 224)

Structure = frozenset[tuple[str, tuple[Any, ...]]]


def family(name: str) -> str:
    """Return the timm module of an architecture."""
    return str(model_entrypoint(name).__module__).rpartition(".")[2]


def vit_like(model: nn.Module) -> bool:
    """Return whether a model is ViT-like."""
    kinds = {type(m).__name__ for m in model.modules()} - CHANNEL_GATES
    return any(ATTENTION.search(kind) for kind in kinds)


def structure(model: nn.Module) -> Structure:
    """Return the structure of a model without its sizes: each kind of module with its flags, functions and parts."""

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
    """Build a model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return make()


@contextmanager
def cut(name: str, depth: int) -> Iterator[None]:
    """Let timm build the architectures of this family with at most `depth` blocks in a stage, within this context."""
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
    """The form of an architecture for its proof.

    Attributes:
        name: of the architecture.
        depth: of its stages; None for the registered one.
        side: of the image in pixels; None for the registered one.
    """

    name: str
    depth: int | None
    side: int | None

    def build(self) -> nn.Module:
        """Build the model with timm's initial weights."""
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
        """Draw an image of normal numbers, of the model's size."""
        channels, height, width = model.pretrained_cfg["input_size"]
        if self.side is not None:
            height = width = self.side
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, channels, height, width, generator=generator)


def smallest(name: str) -> Small:
    """Return the smallest form of an architecture that has its structure and takes an image."""
    whole = structure(on_meta(Small(name, None, None).build))

    def keeps(small: Small, *, run: bool) -> bool:
        try:
            model = on_meta(small.build)
            if run:
                model(small.image(model).to("meta"))
                if any(side % patch for side, patch in zip(small.image(model).shape[-2:], _patch(model), strict=True)):
                    return False
        # families raise many types of errors for a setting; one that fails as registered becomes a row of the table
        except Exception:
            return False
        return structure(model) == whole

    cuts = (Small(name, depth, None) for depth in (1, 2, 3, 4))
    small = next((cut for cut in cuts if keeps(cut, run=False)), Small(name, None, None))
    sides = (dataclasses.replace(small, side=side) for side in IMAGE_SIZES)
    return next((side for side in sides if keeps(side, run=True)), small)


def _patch(model: nn.Module) -> tuple[int, int]:
    """Return the sides of a patch in pixels; 1 for a model without a patch embedding of that name."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return (size, size) if isinstance(size, int) else tuple(size)[:2]


def prove(small: Small) -> dict[str, Any]:
    """Prove one structure, and return a row of the table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small.build()
        # matrices of gain one, because a larger gain costs float64 digits in deep convolutional stacks
        randomise(model, gain=1.0)
    row: dict[str, Any] = {"route": "frozen" if why_not(model) else "engine", "error": None, "reason": None}
    try:
        report = affine_replay(model, small.image(model))
        row["error"] = float(f"{max(report.errors):.1e}")
        if not report.passed:
            row |= {"route": "refused", "error": None, "reason": report.culprit}
        elif not report.has_attention:
            row |= {"route": "refused", "reason": "no operator of it mixes positions"}
    except DaveFastError as error:
        row |= {"route": "refused", "reason": f"{type(error).__name__}: {error}"}
    except Exception as error:
        # errors of timm's own constructor or forward become a row, so that the others are still proved
        row |= {"route": "refused", "reason": f"{FAILS}: {type(error).__name__}: {error}"}
    return row


def inventory() -> dict[Structure, list[str]]:
    """Group the ViT-like architectures by structure, those with fewest weights first."""
    groups: dict[Structure, list[tuple[int, str]]] = defaultdict(list)
    for name in timm.list_models():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = on_meta(lambda name=name: timm.create_model(name, num_classes=7))
        if vit_like(model):
            groups[structure(model)].append((sum(p.numel() for p in model.parameters()), name))
    return {kind: [name for _, name in sorted(members)] for kind, members in groups.items()}


def prove_all(families: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, in the order of timm's modules and names; those of these families, or all.

    Architectures of several families may share a structure, and then a row.
    """
    asked = (names for names in inventory().values() if not families or any(family(n) in families for n in names))
    groups = sorted(asked, key=lambda names: (family(names[0]), names[0]))
    for number, names in enumerate(groups, 1):
        started = time.perf_counter()
        row = proved(names)
        seconds = time.perf_counter() - started
        print(f"{number}/{len(groups)} {row['name']}: {row['route']}, {row['reason'] or row['error']}, {seconds:.1f} s")
        yield row


def proved(names: list[str]) -> dict[str, Any]:
    """Return the row of architectures of one structure, proved on the first, the smallest."""
    small = smallest(names[0])
    found = prove(small)
    if found["reason"] and found["reason"].startswith(FAILS) and small.side:
        # on the meta device an index out of range raises no error
        small = dataclasses.replace(small, side=None)
        found = prove(small)
    gc.collect()
    return {"family": family(names[0]), "architectures": sorted(names), **dataclasses.asdict(small), **found}


def small_of(row: dict[str, Any]) -> Small:
    """Return the form that a row was proved on."""
    return Small(row["name"], row["depth"], row["side"])


def route_now(row: dict[str, Any]) -> str:
    """Return the route of a row's model by whether the engine has a plan, without a new proof."""
    if row["route"] in ("refused", "open"):
        return str(row["route"])
    return "frozen" if why_not(on_meta(small_of(row).build)) else "engine"


def read() -> dict[str, Any]:
    """Read the committed data."""
    return json.loads(JSON.read_text()) if JSON.exists() else {"rows": []}


def write(rows: list[dict[str, Any]]) -> None:
    """Write the data, and the table in the page."""
    rows = sorted(rows, key=lambda row: (row["family"], row["name"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    JSON.write_text(f'{{"timm": "{timm.__version__}", "rows": [\n{lines}\n]}}\n')
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(rows, timm.__version__) + END + rest.partition(END)[2])


def table(rows: list[dict[str, Any]], version: str) -> str:
    """Return the section of docs/models.md between its marks, for a version of timm."""
    count: Counter[str] = Counter()
    for row in rows:
        count[row["route"]] += len(row["architectures"])
    total = sum(count.values())
    explained = count["engine"] + count["frozen"]
    lines = [
        "",
        f"timm {version}: {total} ViT-like architectures of {len(rows)} structures. Explained: {explained} "
        f"({explained / total:.1%}), {count['engine']} of them by the engine; refused: {count['refused']}; "
        f"open, their proof not run yet: {count['open']}.",
        "",
        "| timm module | architectures of one structure | route | replay's error |",
        "|---|---|---|---|",
    ]
    for row in rows:
        names = ", ".join(f"**{name}**" if name == row["name"] else name for name in row["architectures"])
        outcome = row["reason"].replace("|", "\\|") if row["reason"] else f"{row['error']:.0e}"
        lines.append(f"| {row['family']} | {names} | {row['route']} | {outcome} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="modules of timm, such as swin_transformer")
    parser.add_argument("--routes", action="store_true", help="keep the proofs, ask again for plans")
    parser.add_argument("--open", action="store_true", help="prove what has no proof yet")
    options = parser.parse_args()
    rows = read()["rows"]
    if options.open:
        for at, row in enumerate(rows):
            if row["route"] == "open":
                first = row["name"]
                rows[at] = proved([first, *(name for name in row["architectures"] if name != first)])
                print(f"{first}: {rows[at]['route']}, {rows[at]['reason'] or rows[at]['error']}", flush=True)
                write(rows)
        return
    if options.routes:
        write([{**row, "route": route_now(row)} for row in rows])
        return
    proved_again = list(prove_all(options.only))
    names = {name for row in proved_again for name in row["architectures"]}
    write([row for row in rows if options.only and names.isdisjoint(row["architectures"])] + proved_again)


if __name__ == "__main__":
    main()
