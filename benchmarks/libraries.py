"""The engine's time for models of other libraries, compared with that for timm's model of the same shape and weights.

    python -m benchmarks.libraries [--shape base] [--size 224] [--samples 8] [--repeats 9] [--only vit dinov2]

Both models of a pair compute the same function: the random weights of the library's are copied into timm's, by their
readings. So both plans have the same layers, and what may differ is all around them: the comparison of a model with its
last state, and the tail. The goal is a ratio within 10 % of 1. The two run in turns, and ratios are taken turn by turn;
the relative difference of their attributions (`raw`, equal draws) is told beside them, and that of the library's on the
frozen route, which is timed, too. Patches have 16 pixels.

Writes benchmarks/results/<device>/libraries.json.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.time_to_quality import median_ratio
from dave_fast import DAVE
from dave_fast.bench.timing import in_turns, spread
from dave_fast.models.catalog import load_model
from dave_fast.plan.families import read
from dave_fast.plan.reading import Attention, Linear, Norm, Reading

PATCH, CLASSES = 16, 10
# width, blocks, heads; "toy" tries the benchmark out
SHAPES = {"base": (768, 12, 12), "small": (384, 12, 6), "tiny": (192, 12, 3), "toy": (48, 2, 3)}
GOAL = 1.1


@dataclass(frozen=True)
class Pair:
    """A model of another library, and timm's of the same shape.

    Attributes:
        make: width, blocks, heads, side of the image -> the library's model.
        name: of timm's.
        tails: what follows the last block: path in the library's model -> path in timm's.
        settings: of timm's beside its shape.
    """

    make: Callable[[int, int, int, int], nn.Module]
    name: str
    tails: dict[str, str]
    settings: dict[str, Any]


def _of_transformers(kind: str, config: str, tower: bool = False, **settings: Any) -> Callable[..., nn.Module]:
    def make(width: int, blocks: int, heads: int, side: int) -> nn.Module:
        shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
        shape |= {"image_size": side, "patch_size": PATCH, "intermediate_size": 4 * width}
        if config.startswith("Dinov2"):
            del shape["intermediate_size"]
        shape = {"vision_config": shape, "num_labels": CLASSES} if tower else {**shape, "num_labels": CLASSES}
        made: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**shape, **settings))
        return made

    return make


def _torchvision(width: int, blocks: int, heads: int, side: int) -> nn.Module:
    return torchvision.models.VisionTransformer(side, PATCH, blocks, heads, width, 4 * width, num_classes=CLASSES)


def _open_clip(width: int, blocks: int, heads: int, side: int) -> nn.Module:
    tower = {"layers": blocks, "width": width, "head_width": width // heads, "patch_size": PATCH, "image_size": side}
    text = {"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(CLASSES, tower, text, quick_gelu=True)


_VIT = "vit_base_patch16_224"
_CLIP = {"num_classes": CLASSES}
PAIRS = {
    "vit": Pair(
        _of_transformers("ViTForImageClassification", "ViTConfig", layer_norm_eps=1e-6),
        _VIT,
        {"vit.layernorm": "norm", "classifier": "head"},
        {},
    ),
    "deit": Pair(
        _of_transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", layer_norm_eps=1e-6),
        "deit_base_distilled_patch16_224",
        {"deit.layernorm": "norm", "cls_classifier": "head", "distillation_classifier": "head_dist"},
        {},
    ),
    "dinov2": Pair(
        _of_transformers("Dinov2Model", "Dinov2Config", layerscale_value=0.5),
        "vit_base_patch14_dinov2",
        {"layernorm": "norm"},
        {"init_values": 0.5, "num_classes": 0},
    ),
    "dinov2 with registers": Pair(
        _of_transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", layerscale_value=0.5),
        "vit_base_patch14_reg4_dinov2",
        {"layernorm": "norm"},
        {"init_values": 0.5, "num_classes": 0},
    ),
    "dinov3": Pair(
        _of_transformers("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
        "vit_base_patch16_dinov3",
        {"norm": "norm"},
        {"num_classes": 0, "global_pool": "token"},
    ),
    "beit": Pair(
        _of_transformers(
            "BeitForImageClassification", "BeitConfig", use_relative_position_bias=True, layer_norm_eps=1e-6
        ),
        "beit_base_patch16_224",
        {"beit.pooler.layernorm": "fc_norm", "classifier": "head"},
        {},
    ),
    "clip": Pair(
        _of_transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=CLASSES),
        "vit_base_patch16_clip_quickgelu_224",
        {"vision_model.post_layernorm": "norm", "visual_projection": "head"},
        {},
    ),
    "siglip": Pair(
        _of_transformers("SiglipForImageClassification", "SiglipConfig", tower=True),
        "vit_base_patch16_siglip_gap_224",
        {"vision_model.post_layernorm": "norm", "classifier": "head"},
        {"act_layer": "gelu_tanh"},
    ),
    "torchvision": Pair(_torchvision, _VIT, {"encoder.ln": "norm", "heads.head": "head"}, {}),
    "open_clip": Pair(_open_clip, "vit_base_patch16_clip_quickgelu_224", {"visual.ln_post": "norm"}, {}),
}


@torch.no_grad()
def pair_of(name: str, shape: str, side: int) -> tuple[nn.Module, nn.Module]:
    """Return a library's model with random weights and timm's model of the same function."""
    pair, (width, blocks, heads) = PAIRS[name], SHAPES[shape]
    torch.manual_seed(0)
    theirs = pair.make(width, blocks, heads, side).eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    settings = {"embed_dim": width, "depth": blocks, "num_heads": heads, "img_size": side, "patch_size": PATCH}
    ours: Any = timm.create_model(pair.name, **{"num_classes": CLASSES, **settings, **pair.settings}).eval()
    _copy_body(read(load_model(theirs)[0]), ours)
    for path, own in pair.tails.items():
        source, target = theirs.get_submodule(path), ours.get_submodule(own)
        target.weight.copy_(source.weight)
        if target.bias is not None:
            target.bias.zero_() if source.bias is None else target.bias.copy_(source.bias)
    if name == "open_clip":
        ours.head.weight.copy_(theirs.visual.proj.T)
        ours.head.bias.zero_()
    if name == "beit":
        for block, own_block in zip(theirs.beit.layers, ours.blocks, strict=True):
            table = block.relative_position_bias.relative_position_bias_table
            own_block.attn.relative_position_bias_table.copy_(table)
    return theirs, ours


def _copy_body(reading: Reading, ours: Any) -> None:
    """Copy what was read of a model up to its last block into one of timm's; readings hold a model's own tensors."""
    own, rows = read(ours), list(reading.prefix.to(torch.float32))
    for token in ("cls_token", "dist_token", "reg_token"):
        held = getattr(ours, token, None)
        for at in range(0 if held is None else held.shape[1]):
            held[0, at] = rows.pop(0)
    assert not rows, "timm's model has fewer tokens"
    if getattr(ours, "pos_embed", None) is not None:
        ours.pos_embed.zero_()
        ours.pos_embed[0, -len(reading.position) :] = reading.position
        if ours.patch_embed.proj.bias is not None:
            ours.patch_embed.proj.bias.zero_()
    else:
        # without positions all rows are the projection's bias
        ours.patch_embed.proj.bias.copy_(reading.position[0])
    own.projection.weight.copy_(reading.projection.weight)
    _copy(reading.norm_pre, own.norm_pre)
    for step, own_step in zip(reading.steps, own.steps, strict=True):
        for branch, target in zip(step, own_step, strict=True):
            parts = ("qkv", "proj") if isinstance(branch, Attention) else ("fc1", "fc2")
            for part in ("norm", "gamma", *parts):
                _copy(getattr(branch, part), getattr(target, part))


def _copy(source: Any, target: Any) -> None:
    if isinstance(source, tuple):
        for each, other in zip(source, target, strict=True):
            _copy(each, other)
    elif isinstance(source, Tensor):
        target.copy_(source)
    elif isinstance(source, Linear | Norm):
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)
    else:
        assert source is None and target is None, "the models differ"


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time both models of a pair, and compare what is told of them."""
    theirs, ours = pair_of(name, args.shape, args.size)
    image = torch.randn(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    settings = {"precision": args.precision, "noise_alpha": 0.1}
    explainers = {
        "library": DAVE(theirs, route="engine", **settings),
        "timm": DAVE(ours, route="engine", **settings),
        "frozen": DAVE(theirs, route="frozen", **settings),
    }
    calls = {one: partial(each.explain, image, 0, n_samples=args.samples) for one, each in explainers.items()}
    raw, first = {}, {}
    for one, call in calls.items():
        begun = time.perf_counter()
        raw[one] = call().raw.double()
        first[one] = time.perf_counter() - begun
    timed = {one: [call] for one, call in calls.items()}
    seconds = in_turns(timed, args.repeats, explainers["timm"].device, host=True)
    ratios = {
        one: median_ratio([mine / other for mine, other in zip(seconds[one], seconds["timm"], strict=True)])
        for one in ("library", "frozen")
    }
    ratio = ratios["library"]
    return {
        "name": name,
        "class": type(theirs).__name__,
        "timm": PAIRS[name].name,
        "precision": explainers["library"].precision,
        "of_timm": ratio,
        "frozen_of_timm": ratios["frozen"],
        "first_call_seconds": first,
        "reaches_the_goal": ratio["median"] <= GOAL,
        "seconds": {one: spread(times) for one, times in seconds.items()},
        "difference": {one: difference(raw["library"], raw[one]) for one in ("timm", "frozen")},
    }


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two attributions (Euclidean norms)."""
    return float((found - expected).norm() / expected.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and store the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=("fp64", "fp32", "bf16"), default="fp32")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--no-write", action="store_true", help="print alone")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    results = []
    for name in args.only:
        results.append(measure(name, args))
        row = results[-1]
        ratio, differs, first = row["of_timm"], row["difference"], row["first_call_seconds"]
        print(
            f"{row['class']:40} {row['seconds']['library']['median']:.3f} s, {ratio['median']:.3f} of timm's "
            f"({ratio['low']:.3f} to {ratio['high']:.3f}); differs by {differs['timm']:.1e} from timm's, "
            f"{differs['frozen']:.1e} from the frozen route, which takes {row['frozen_of_timm']['median']:.2f} times "
            f"timm's; first calls {first['library']:.1f} and {first['frozen']:.1f} s",
            flush=True,
        )
    if not args.no_write:
        path = machine.results_path("libraries")
        machine.write_json(path, {"environment": machine.environment(), "settings": vars(args), "results": results})
        print(path)


if __name__ == "__main__":
    main()
