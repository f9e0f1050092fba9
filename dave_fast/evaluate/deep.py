"""Families of rows at the tokens that enter blocks: DAVE at a depth, and what other methods have there.

With X_l the tokens that enter block l (N, D), and f the logit of a class, of the unperturbed image:

    gradient × activation    Σ_channels X_l ⊙ ∂f/∂X_l, as captum's LayerGradientXActivation has it
    Grad-CAM                 ReLU(Σ_c X_lc · mean over the patches of ∂f/∂X_lc) (arXiv 1610.02391), and at its usual
                             place in a ViT: the tokens that enter the attention of the last block, behind its norm1
    AttnLRP at tokens        Σ_channels X_l ⊙ the gradient as LXT's rules change it (see `packages`)
    one frozen sample        Σ_channels X_l ⊙ ∂f/∂X_l with every operator from l on held constant: DAVE without average

All are maps of patches, enlarged bilinearly as Libra FullGrad+ is; terms of prefix tokens have no place and are left
out. DAVE at a depth averages the frozen form over its samples (`DAVE.explain(depth=)`).

The gradient of a contrast, the logit of a class minus the mean logit of the other classes that are asked for, is the
same contrast of gradients; so rows of a contrast need no passes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dave_fast.engine.levels import Place, blocks_of, levels_of
from dave_fast.evaluate.packages import lrp_twin
from dave_fast.evaluate.rows import Family
from dave_fast.evaluate.scoring import Maps, as_maps
from dave_fast.evaluate.settings import VARIANTS
from dave_fast.evaluate.twin import NotTakenError
from dave_fast.explain.depth import AUTO, Depth, depth_of, name_of, place_of
from dave_fast.explain.explainer import DAVE
from dave_fast.sampling import draw, identity

DEPTHS: tuple[Depth, ...] = (0.25, 0.5, AUTO, 0.75, 1.0)
CONTRAST = ", against the others"


def places_at(model: nn.Module, depths: Sequence[Depth] = DEPTHS) -> tuple[Place, ...]:
    """Return the block or the blocks at some depths other than the pixels, each once.

    Raises:
        NotTakenError: the model is no timm VisionTransformer.
    """
    alike = (None,) * len(_vit(model).blocks)
    return tuple(dict.fromkeys(place_of(depth, alike) for depth in depths))


def named(place: Place) -> str:
    """Return the name of a place in rows, "block 6" or "blocks 5-9"."""
    return name_of(depth_of(place))


def over(place: Place, of_blocks: dict[int, Tensor]) -> Tensor:
    """Return the mean over the blocks of a place."""
    return torch.stack([of_blocks[block] for block in blocks_of(place)]).mean(0)


def contrasts(values: Tensor) -> Tensor:
    """Return each of K values (K, ...) minus the mean of the others."""
    return values - (values.sum(0) - values) / (len(values) - 1)


def with_contrasts(family: Family) -> Family:
    """Return a family with rows added for each class's logit minus the mean of the other asked classes' logits.

    The family's signed sums are linear in what is explained, as those of a gradient ⊙ input are.
    """

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        found = family(image, classes, key)
        added = {f"{row}{CONTRAST}": contrasts(maps[VARIANTS[0]]) for row, maps in found.items() if len(classes) > 1}
        return found | {row: as_maps(signed[:, None]) for row, signed in added.items()}

    return rows


def dave(
    model: nn.Module,
    title: str,
    sizes: Sequence[int],
    seed: int,
    alpha: float | None = None,
    *,
    places: Sequence[Place],
    contrast: bool = False,
) -> Family:
    """Return DAVE's family at the pixels and at blocks, all rows of one set of walks, as the explainer makes its maps.

    Args:
        model: in evaluation mode.
        title: of the rows, "{title}, S = 32" and "{title}, block 6, S = 32".
        sizes: numbers of samples.
        seed: of the draws.
        alpha: noise_alpha; None for what the explainer chooses.
        places: blocks.
        contrast: whether the rows of `with_contrasts` are added where two or more classes are asked for.
    """
    explainer, places = DAVE(model, noise_alpha=alpha), (None, *places)

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        (height, width), grids = image.shape[-2:], explainer.blocks(image)
        draws = draw(max(sizes), height=height, width=width, seed=seed, image_keys=[key], sampling=explainer.sampling)
        found = explainer.samples(image, draws, classes[None], levels_of(places))
        made = {}
        for suffix, change in _forms(classes, contrast).items():
            of_form = found.map(change)
            for size in sizes:
                some = of_form.map(lambda t: t[:, :size])  # noqa: B023
                raw, maps, _ = explainer.aggregate_levels(image, some, draws[:size], places, grids)
                for at, place in enumerate(places):
                    name = title if place is None else f"{title}, {named(place)}"
                    # as everywhere in an evaluation, the signed sum is that of raw, which is never shrunk
                    made[f"{name}{suffix}, S = {size}"] = as_maps((raw[:, at], maps[:, at]))
        return made

    return rows


def frozen(
    model: nn.Module, places: Sequence[Place], *, contrast: bool = False, precision: str | None = None
) -> Family:
    """Return the family of one frozen sample, that of the unperturbed image, at blocks.

    Args:
        model: in evaluation mode.
        places: blocks.
        contrast: see `dave`.
        precision: of the explainer; None for its own choice.
    """
    explainer = DAVE(model, noise_alpha=0.0, precision=precision)

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        grids, made = explainer.blocks(image), {}
        levels = levels_of(places)
        found = explainer.samples(image, identity(1), classes[None], levels)
        of_blocks = dict(zip(levels.blocks, found.evidence, strict=True))
        for suffix, change in _forms(classes, contrast).items():
            for place in places:
                grid = grids[blocks_of(place)[0]]
                patches = change(over(place, of_blocks))[:, 0, grid.prefix :]
                large = enlarged(patches, (grid.height, grid.width), image.shape[-2:])
                made[f"one frozen sample, {named(place)}{suffix}"] = as_maps(large)
        return made

    return rows


def _forms(classes: Tensor, contrast: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what is made of the values (K, ...) of the classes: themselves, and their contrasts where wanted."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {"": lambda values: values}
    return forms | ({CONTRAST: contrasts} if contrast and len(classes) > 1 else {})


class Entered(NamedTuple):
    """What enters a module, and the gradients of K logits with respect to it.

    Attributes:
        tokens: (N, D), or (C, H, W) where the module is the model.
        gradients: (K, N, D) or (K, C, H, W).
    """

    tokens: Tensor
    gradients: Tensor


def gradients_at(model: nn.Module, modules: Sequence[nn.Module], image: Tensor, classes: Tensor) -> list[Entered]:
    """Return what enters modules of a model, and the gradients of logits there.

    Args:
        model: in evaluation mode.
        modules: each is called once, in this order, with tokens (1, N, D) or the image first.
        image: (1, C, H, W).
        classes: (K,) int64.
    """
    with torch.enable_grad(), _entering(modules) as tokens:
        output = model(image.detach().clone().requires_grad_())
        of_class = [torch.autograd.grad(output[0, each], tokens, retain_graph=True) for each in classes.tolist()]
    return [
        Entered(entered[0].detach(), torch.cat(gradients))
        for entered, *gradients in zip(tokens, *of_class, strict=True)
    ]


@contextmanager
def _entering(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the first argument of each module, in the order in which they are called."""
    tokens: list[Tensor] = []
    handles = [each.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0])) for each in modules]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def times_activation(entered: Entered) -> Tensor:
    """Return Σ_channels activation ⊙ gradient of each token, (K, N)."""
    return (entered.tokens * entered.gradients).sum(2)


def grad_cam(entered: Entered, prefix: int) -> Tensor:
    """Return ReLU(Σ_c activation · mean of the gradient over the patches) of each patch, (K, n)."""
    weights = entered.gradients[:, prefix:].mean(1)
    return (weights @ entered.tokens[prefix:].T).relu()


def activations(model: Any, places: Sequence[Place], *, contrast: bool = False) -> Family:
    """Return the family of gradient × activation at blocks, and of Grad-CAM at single ones of them.

    Args:
        model: a timm VisionTransformer in evaluation mode.
        places: blocks.
        contrast: whether rows of the contrast are added where two or more classes are asked for.

    Raises:
        NotTakenError: the model is no timm VisionTransformer.
    """
    vit, blocks = _vit(model), levels_of(places).blocks
    # at the input of the last block's attention, behind norm1, is Grad-CAM's usual place
    modules, prefix = [*(vit.blocks[block] for block in blocks), vit.blocks[-1].attn], vit.num_prefix_tokens

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        *entered, usual = gradients_at(vit, modules, image, classes)
        patches: dict[str, Tensor] = {}
        for suffix, change in _forms(classes, contrast).items():
            of = [each._replace(gradients=change(each.gradients)) for each in (*entered, usual)]
            products = {block: times_activation(each)[:, prefix:] for block, each in zip(blocks, of, strict=False)}
            cams = {block: grad_cam(each, prefix) for block, each in zip(blocks, of, strict=False)}
            patches |= {f"gradient × activation, {named(at)}{suffix}": over(at, products) for at in places}
            patches |= {f"Grad-CAM, {named(at)}{suffix}": cams[at] for at in places if isinstance(at, int)}
            patches[f"Grad-CAM, last norm1{suffix}"] = grad_cam(of[-1], prefix)
        grid, size = vit.patch_embed.grid_size, image.shape[-2:]
        return {row: as_maps(enlarged(values, grid, size)) for row, values in patches.items()}

    return rows


def attnlrp(
    model: Any, places: Sequence[Place], gammas: tuple[float, float] | None, *, contrast: bool = False
) -> Family:
    """Return the family of AttnLRP, at the pixels and at the tokens that enter blocks, of the same passes.

    Args:
        model: a timm VisionTransformer in evaluation mode.
        places: blocks.
        gammas: see `packages.attnlrp`.
        contrast: whether rows of the contrast are added where two or more classes are asked for.

    Raises:
        NotTakenError: as `packages.attnlrp`.
    """
    twin, grid = lrp_twin(model, gammas), model.patch_embed.grid_size
    layers, blocks = list(twin.encoder.layers), levels_of(places).blocks

    def rows(image: Tensor, classes: Tensor, key: int) -> dict[str, Maps]:
        pixels, *found = gradients_at(twin, [twin, *(layers[block] for block in blocks)], image, classes)
        # a twin has one prefix token, its class token
        of_blocks = {block: times_activation(each)[:, 1:] for block, each in zip(blocks, found, strict=True)}
        signed = {"AttnLRP": pixels.tokens * pixels.gradients}
        for place in places:
            signed[f"AttnLRP at tokens, {named(place)}"] = enlarged(over(place, of_blocks), grid, image.shape[-2:])
        forms = _forms(classes, contrast).items()
        return {f"{name}{suffix}": as_maps(change(each)) for suffix, change in forms for name, each in signed.items()}

    return rows


def enlarged(patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return maps (K, 1, H, W) of the values of patches (K, n), bilinearly."""
    maps = patches.unflatten(1, tuple(grid))[:, None]
    return functional.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def _vit(model: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise NotTakenError(f"it takes a timm VisionTransformer, not {type(model).__name__}")
    return model
