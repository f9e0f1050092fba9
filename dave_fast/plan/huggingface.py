"""ViTs of transformers: ViT, DeiT, DINOv2 and DINOv3, BEiT, and the vision towers of CLIP and SigLIP.

A model is read as its adapter calls it (`models.huggingface_adapter`): positions are interpolated by the model's own
method for images of another size than its own. Classes are known by name, so that the library is not imported here;
`_ENDS` has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.plan.huggingface_parts import Names, expect, read_block
from dave_fast.plan.huggingface_positions import own_size, read_biases, read_rotary, read_table
from dave_fast.plan.parts import class_name, is_layer_norm, read_norm
from dave_fast.plan.reading import Family, NoPlanError, Reading, Step
from dave_fast.plan.whole import Tail, check_size, patch_grid, read_blocks, shell_of, whole, without


@dataclass(frozen=True)
class Body:
    """Where the body of a kind of models has its parts.

    Attributes:
        names: of what is in its blocks.
        blocks: path of their list.
        conv: path of the patches' convolution in the embeddings.
        tokens: parameters of the embeddings ahead of the patches.
        norm: the final norm.
        norm_pre: the norm ahead of the blocks; "" where there is none.
        tower: what its classes are called between the prefix and "Embeddings" or "Model".
        interpolates: whether it interpolates positions whatever the size, not only where it is asked to.
    """

    names: Names
    blocks: str
    conv: str = "patch_embeddings.projection"
    tokens: tuple[str, ...] = ("cls_token",)
    norm: str = "layernorm"
    norm_pre: str = ""
    tower: str = ""
    interpolates: bool = False


@dataclass(frozen=True)
class End:
    """How a class of models makes its output.

    Attributes:
        body: attribute of the body; "" where it is the model itself.
        head: body and model, both without embeddings and blocks, and the tokens after the last block -> the output.
        read: leading tokens that the head reads; None for all.
        normed: whether the head starts with the final norm.
        resizes: whether the model takes images of other sizes.
    """

    body: str
    head: Callable[[Any, Any, Tensor], Tensor]
    read: int | None = 1
    normed: bool = True
    resizes: bool = True


def _both_tokens(body: Any, model: Any, x: Tensor) -> Tensor:
    x = body.layernorm(x)
    output: Tensor = (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2
    return output


def _token_and_patches(body: Any, model: Any, x: Tensor) -> Tensor:
    x = body.layernorm(x)
    patches = x[:, 1 + getattr(model.config, "num_register_tokens", 0) :]
    output: Tensor = model.classifier(torch.cat([x[:, 0], patches.mean(1)], dim=1))
    return output


def _beit(body: Any, model: Any, x: Tensor) -> Tensor:
    x = body.layernorm(x)
    return x[:, 0] if body.pooler is None else body.pooler(x)


def _siglip(body: Any, model: Any, x: Tensor) -> Tensor:
    x = body.post_layernorm(x)
    return body.head(x) if body.use_head else x


def _clip_body(prefix: str, tokens: tuple[str, ...], norm_pre: str) -> Body:
    names = Names(prefix, "EncoderLayer", "self_attn", ("layer_norm1", "layer_norm2"))
    return Body(names, "encoder.layers", "patch_embedding", tokens, "post_layernorm", norm_pre, tower="Vision")


def _dino_body(prefix: str, blocks: str, **settings: Any) -> Body:
    return Body(Names(prefix, scales=("layer_scale1", "layer_scale2")), blocks, **settings)


_AROUND = ("layernorm_before", "layernorm_after")
# a file of transformers -> the body of its models
_BODIES = {
    "vit": Body(Names("ViT", norms=_AROUND), "layers"),
    "deit": Body(Names("DeiT", norms=_AROUND), "layers", tokens=("cls_token", "distillation_token")),
    "dinov2": _dino_body("Dinov2", "encoder.layer", interpolates=True),
    "dinov2_with_registers": _dino_body(
        "Dinov2WithRegisters", "encoder.layer", tokens=("cls_token", "register_tokens"), interpolates=True
    ),
    "dinov3_vit": _dino_body(
        "DINOv3ViT", "model.layer", conv="patch_embeddings", tokens=("cls_token", "register_tokens"), norm="norm"
    ),
    "beit": Body(Names("Beit", norms=_AROUND, scales=("lambda_1", "lambda_2")), "layers", interpolates=True),
    "clip": _clip_body("CLIP", ("class_embedding",), "pre_layrnorm"),
    "siglip": _clip_body("Siglip", (), ""),
}
# a file of transformers, a class -> how it ends
_ENDS = {
    ("vit", "ViTForImageClassification"): End("vit", lambda body, m, x: m.classifier(body.layernorm(x)[:, 0])),
    ("vit", "ViTModel"): End("", lambda body, m, x: body.layernorm(x)[:, 0]),
    ("deit", "DeiTForImageClassification"): End("deit", lambda body, m, x: m.classifier(body.layernorm(x)[:, 0])),
    ("deit", "DeiTForImageClassificationWithTeacher"): End("deit", _both_tokens, 2),
    ("deit", "DeiTModel"): End("", lambda body, m, x: body.layernorm(x)[:, 0]),
    ("dinov2", "Dinov2ForImageClassification"): End("dinov2", _token_and_patches, None),
    ("dinov2", "Dinov2Model"): End("", lambda body, m, x: body.layernorm(x)[:, 0]),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"): End(
        "dinov2_with_registers", _token_and_patches, None
    ),
    ("dinov2_with_registers", "Dinov2WithRegistersModel"): End("", lambda body, m, x: body.layernorm(x)[:, 0]),
    ("dinov3_vit", "DINOv3ViTModel"): End("", lambda body, m, x: body.norm(x)[:, 0]),
    ("beit", "BeitForImageClassification"): End("beit", lambda body, m, x: m.classifier(_beit(body, m, x)), None),
    ("beit", "BeitModel"): End("", _beit, None),
    ("clip", "CLIPModel"): End("vision_model", lambda body, m, x: m.visual_projection(body.post_layernorm(x[:, 0]))),
    ("clip", "CLIPVisionModelWithProjection"): End(
        "vision_model", lambda body, m, x: m.visual_projection(body.post_layernorm(x[:, 0]))
    ),
    ("clip", "CLIPVisionModel"): End("", lambda body, m, x: body.post_layernorm(x[:, 0])),
    ("clip", "CLIPForImageClassification"): End(
        "vision_model", lambda body, m, x: m.classifier(x[:, 1:].mean(1)), None, normed=False, resizes=False
    ),
    ("siglip", "SiglipModel"): End("vision_model", _siglip, None),
    ("siglip", "SiglipVisionModel"): End("", _siglip, None),
    ("siglip", "SiglipForImageClassification"): End(
        "vision_model", lambda body, m, x: m.classifier(body.post_layernorm(x).mean(1)), None
    ),
}
_CLASSES = {
    f"transformers.models.{file}.modeling_{file}.{name}": (_BODIES[file], end) for (file, name), end in _ENDS.items()
}
# modules of a model or its body that its output is not made of after the blocks
_AHEAD = ("embeddings", "rope_embeddings", "shared_position_bias", "text_model", "text_projection")


def _read(model: Any, size: tuple[int, int] | None) -> Reading:
    known, end = _CLASSES[class_name(type(model))]
    body = getattr(model, end.body) if end.body else model
    try:
        return _read_as(model, body, known, end, size)
    except AttributeError as missing:
        raise NoPlanError(f"it has other parts than in the version of transformers that is read ({missing})") from None


def _read_as(model: Any, body: Any, known: Body, end: End, size: tuple[int, int] | None) -> Reading:
    prefix, embeddings = known.names.prefix, body.embeddings
    _check_body(model, body, known)
    own = own_size(body)
    size = size or own
    if not end.resizes:
        check_size(size, own)
    conv = attrgetter(known.conv)(embeddings)
    grid = patch_grid(conv, size)
    interpolated = size if known.interpolates or size != own else None
    rotary = read_rotary(body, size) if prefix == "DINOv3ViT" else None
    bias_of = read_biases(body, grid) if prefix == "Beit" else lambda block: None

    def read(block: Any, index: int) -> tuple[Step, ...]:
        return read_block(block, body, known.names, rotary, bias_of(block))

    within = f"{end.body}.{known.blocks}".lstrip(".")
    head = end.head
    shell = shell_of(
        body=without(body, *_AHEAD, known.blocks.partition(".")[0]), model=without(model, *_AHEAD, end.body)
    )
    return whole(
        size,
        conv,
        [getattr(embeddings, name) for name in known.tokens],
        read_table(embeddings, torch.Size(grid).numel(), interpolated),
        read_blocks(attrgetter(known.blocks)(body), within, read),
        tail=partial(Tail, shell, lambda shell, x: head(shell.body, shell.model, x)),
        read=end.read,
        blind=end.normed and _is_blind(body, known),
        norm_pre=read_norm(getattr(body, known.norm_pre)) if known.norm_pre else None,
    )


def _check_body(model: Any, body: Any, known: Body) -> None:
    """Raise NoPlanError where a body is made of other classes than its library's, or is told to be causal."""
    prefix = known.names.prefix
    expect(body, model, f"{prefix}{known.tower}Model")
    expect(body.embeddings, model, f"{prefix}{known.tower}Embeddings")
    if hasattr(body.embeddings, "patch_embeddings") and known.conv != "patch_embeddings":
        expect(body.embeddings.patch_embeddings, model, f"{prefix}PatchEmbeddings")
    around, _, inner = known.blocks.partition(".")
    if inner:
        expect(getattr(body, around), model, f"{prefix}Encoder")
    if getattr(body, "pooler", None) is not None:
        expect(body.pooler, model, f"{prefix}Pooler")
    for module in (model, *body.modules()):
        if getattr(getattr(module, "config", None), "is_causal", False):
            raise NoPlanError("its configuration says that attention is causal")


def _is_blind(body: Any, known: Body) -> bool:
    """Return whether what follows the blocks ignores each token's mean: the final norm, or BEiT's behind its mean."""
    norm = getattr(body, known.norm)
    pooled = getattr(getattr(body, "pooler", None), "layernorm", None)
    return is_layer_norm(norm) or (type(norm) is nn.Identity and is_layer_norm(pooled))


FAMILY = Family(tuple(_CLASSES), _read)
