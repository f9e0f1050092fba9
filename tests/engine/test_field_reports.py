"""What users of explainers and of vision transformers reported as broken elsewhere, each as one small model."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dave_fast.errors import DaveFastError, ModelError
from tests.engine.cases import EXPLAINED, REFUSED, explained, off, outcome, thinned
from tests.engine.own_models import Own, images, own_model
from tests.engine.patches import replace
from tests.tiny import random_vit
from tests.variants import ALL, CLASSES, ENGINE, randomise

VIT = ENGINE["vit"]
ROUTES = thinned(["auto", "frozen"], 2)


@pytest.mark.parametrize("built_for", thinned([(16, 64), (64, 16), (8, 128), (32, 32), (24, 40)], 5))
def test_positions_of_a_grid_with_as_many_patches_are_those_of_the_library(built_for: tuple[int, int]):
    # resampling that compares numbers of patches takes a grid of 2×8 for one of 4×4
    def build() -> nn.Module:
        return random_vit(img_size=built_for, dynamic_img_size=True, num_classes=CLASSES)

    for size in ((32, 32), (16, 64), built_for):
        picture = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        assert outcome(build, picture) == EXPLAINED


class Rollout:
    """Collects attention maps where dropout of attention is called."""

    def __init__(self, model: nn.Module) -> None:
        self.maps: list[Tensor] = []
        for block in model.blocks:
            block.attn.attn_drop.register_forward_hook(self.collect)

    def collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.maps.append(output)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_a_collector_of_attention_maps_collects_nothing_of_an_explanation(fused: bool, route: str):
    collectors = []

    def build() -> nn.Module:
        model = VIT.build()
        for block in model.blocks:
            block.attn.fused_attn = fused
        collectors.append(Rollout(model))
        return model

    assert outcome(build, VIT.images(), route=route) == EXPLAINED
    # of the three models of `outcome` the first and the truth were called, the second was explained
    explained = next(each for each in reversed(collectors) if not each.maps or fused)
    assert explained.maps == []


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_a_scale_that_only_plain_attention_reads_is_read_by_it_alone(fused: bool, route: str):
    def build() -> nn.Module:
        model = VIT.build()
        for block in model.blocks:
            block.attn.fused_attn, block.attn.scale = fused, 0.05
        return model

    assert outcome(build, VIT.images(), route=route) == EXPLAINED


class ScaledTwice(timm.layers.Attention):
    """Attention that scales its queries twice where it is not fused."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.mT * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_an_attention_that_differs_where_it_is_not_fused_is_explained_as_it_is(fused: bool):
    def build() -> nn.Module:
        model = VIT.build()
        for block in model.blocks:
            block.attn.__class__, block.attn.fused_attn = ScaledTwice, fused
        return model

    assert outcome(build, VIT.images()) == EXPLAINED


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen_weights", [True, False])
def test_checkpointed_blocks_are_explained_or_refused(reentrant: bool, frozen_weights: bool):
    # of a reentrant checkpoint whose inputs require no gradient, gradients are None
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, **settings: Any) -> Tensor:
            if x.dtype == torch.float64 and not torch.is_grad_enabled():
                return self.block(x)
            return checkpoint(self.block, x, use_reentrant=reentrant)

    def build() -> nn.Module:
        model = VIT.build().requires_grad_(not frozen_weights)
        model.blocks = nn.Sequential(*map(Checkpointed, model.blocks))
        return model.eval()

    plain, _ = explained(VIT.build(), VIT.images())
    try:
        found, _ = explained(build(), VIT.images())
    except DaveFastError:
        return
    torch.testing.assert_close(found, plain)


class Siamese(nn.Module):
    """One backbone that is called twice, with another view of the image."""

    def __init__(self, backbone: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self.twin, self.view = backbone, backbone, view
        self.head = nn.Linear(2 * CLASSES, CLASSES)
        randomise(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.backbone(x), self.twin(self.view(x))], 1))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "the same": lambda x: x,
    "flipped": lambda x: x.flip(-1),
    "turned": lambda x: x.rot90(1, (2, 3)),
    "smaller": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "brighter": lambda x: 2 * x + 0.1,
}


@pytest.mark.parametrize("view", thinned(VIEWS, 5))
def test_a_backbone_that_is_called_twice_is_explained(view: str):
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return Siamese(VIT.build(), VIEWS[view])

    assert outcome(build, VIT.images()) == EXPLAINED


class Returns(nn.Module):
    """A model whose result is made of its logits."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.make = VIT.build(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.model(x))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda z: (z, [z.softmax(-1)]), "tuple"),
        (lambda z: [z], "list"),
        (lambda z: {"scores": z}, "dict"),
        (lambda z: None, "NoneType"),
        (lambda z: z.tolist(), "list"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_result_that_is_no_tensor_is_refused_by_its_name(make: Callable[[Tensor], Any], named: str, route: str):
    with pytest.raises(ModelError, match=named):
        explained(Returns(make).eval(), VIT.images(), route=route)


class SavesGradients(timm.layers.Attention):
    """Attention that keeps its weights and, by a hook of the tensor, their gradients."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.weights = (q @ k.mT * self.scale).softmax(-1)
        if self.weights.requires_grad:
            self.weights.register_hook(self.save)
        return self.proj((self.weights @ v).transpose(1, 2).flatten(2))

    def save(self, gradient: Tensor) -> None:
        self.gradients = gradient


@pytest.mark.parametrize("called", [True, False])
def test_gradients_that_a_model_saves_stay_its_own(called: bool):
    def build() -> nn.Module:
        model = VIT.build()
        for block in model.blocks:
            block.attn.__class__ = SavesGradients
        if called:
            model(VIT.images(dtype=model.head.weight.dtype)).sum().backward()
        return model

    assert outcome(build, VIT.images()) == EXPLAINED


class NoGradients(nn.Module):
    """A backbone that runs without gradients, and a head that has them."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.backbone, self.context = VIT.build(), context
        self.head = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            features = self.backbone(x)
        return self.head(features.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("route", ROUTES)
def test_a_backbone_without_gradients_is_refused(context: Callable[[], Any], route: str):
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return NoGradients(context)

    with pytest.raises(ModelError):
        explained(build().eval(), VIT.images(), route=route)


@pytest.mark.parametrize("module", thinned(["blocks.1.mlp.act", "norm", "blocks.0.attn", "head", "patch_embed"], 5))
@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_of_the_backward_pass_change_no_explanation(module: str, in_place: bool):
    def build(hooked: bool) -> nn.Module:
        model = VIT.build()
        for block in model.blocks:
            block.mlp.act = nn.ReLU(inplace=in_place)
        if hooked:
            model.get_submodule(module).register_full_backward_hook(lambda m, given, out: (0.1 * given[0],))
        return model

    plain, _ = explained(build(False), VIT.images())
    try:
        found, _ = explained(build(True), VIT.images())
    except DaveFastError:
        return
    torch.testing.assert_close(found, plain)


class DropsInEvaluation(timm.layers.Attention):
    """Attention whose dropout is a number that is handed on in evaluation, too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        return self.proj(y.transpose(1, 2).flatten(2))


class DropsTokens(timm.layers.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.4)


@pytest.mark.parametrize(("where", "kind"), [("attn", DropsInEvaluation), ("mlp", DropsTokens)])
@pytest.mark.parametrize("route", ROUTES)
def test_dropout_that_evaluation_does_not_switch_off_is_refused(where: str, kind: type[nn.Module], route: str):
    model = VIT.build()
    getattr(model.blocks[0], where).__class__ = kind
    with pytest.raises(ModelError):
        explained(model, VIT.images(), route=route)


class Merging(timm.models.vision_transformer.Block):
    """A block that replaces the two most similar tokens behind the first by their mean."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.attn(self.norm1(x))
        metric = F.normalize(x[:, 1:].detach(), dim=-1)
        alike = metric[:, ::2] @ metric[:, 1::2].mT
        best = alike.flatten(1).argmax(1)
        columns = alike.shape[2]
        even, odd = 1 + 2 * (best // columns), 2 + 2 * (best % columns)
        rows = torch.arange(len(x))
        merged = (x[rows, even] + x[rows, odd]) / 2
        kept = torch.ones(x.shape[:2], dtype=torch.bool)
        kept[rows, even] = kept[rows, odd] = False
        x = torch.cat([x[kept].view(len(x), -1, x.shape[-1]), merged[:, None]], 1)
        return x + self.mlp(self.norm2(x))


def test_blocks_that_merge_tokens_are_explained_as_they_are_or_refused():
    def build() -> nn.Module:
        model = VIT.build()
        for block in model.blocks:
            block.__class__ = Merging
        return model

    outcome(build, VIT.images())


def test_a_forward_that_is_set_to_itself_is_explained():
    def build() -> nn.Module:
        model = VIT.build()
        for module in model.modules():
            module.forward = module.forward
        return model

    for route in ("auto", "frozen"):
        assert outcome(build, VIT.images(), route=route) == EXPLAINED


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_spectral_norm_in_a_parallel_model_is_explained(norm: Callable[..., nn.Module]):
    def build() -> nn.Module:
        model = VIT.build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            for block in model.blocks:
                norm(block.mlp.fc1)
        return nn.DataParallel(model).eval()

    assert outcome(build, VIT.images()) == EXPLAINED


ENCODER = ALL["encoder-pre-norm-gelu"]


@pytest.mark.parametrize(
    "module", ["body.layers.0.self_attn", "body.layers.1.linear1", "body.layers.0.norm1", "body.layers.0", "body"]
)
def test_a_hook_inside_of_a_fused_encoder_layer_is_explained(module: str):
    # in evaluation and without gradients such a layer may run as one function, past its modules
    def build() -> nn.Module:
        model = ENCODER.build()
        model.get_submodule(module).register_forward_hook(_damped)
        return model

    assert outcome(build, ENCODER.images()) == EXPLAINED


def _damped(module: nn.Module, args: Any, output: Any) -> Any:
    return (0.1 * output[0], *output[1:]) if isinstance(output, tuple) else 0.1 * output


class Traced(nn.Module):
    """A step that behaves otherwise where gradients are enabled, or in another precision, or for one image."""

    def __init__(self, inner: nn.Module, other: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.inner, self.other = inner, other

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.inner(x, *args, **kwargs)
        return 0.1 * y if self.other(x) else y


OTHERWISE: dict[str, Callable[[Tensor], bool]] = {
    "with gradients": lambda x: torch.is_grad_enabled(),
    "without gradients": lambda x: not torch.is_grad_enabled(),
    "of an input with gradients": lambda x: x.requires_grad,
    "of one image": lambda x: len(x) == 1,
    "of several images": lambda x: len(x) > 1,
    "of large numbers": lambda x: bool(x.abs().max() > 4.0),
}


@pytest.mark.parametrize("when", thinned(OTHERWISE, 2))
@pytest.mark.parametrize("route", ROUTES)
def test_a_step_that_changes_with_its_circumstances_is_refused_or_the_one_of_the_call(when: str, route: str):
    # what is predicted is what is explained: the output at which the gradient was taken
    model = VIT.build()
    model.blocks[0].attn = Traced(model.blocks[0].attn, OTHERWISE[when])
    try:
        _, found = explained(model, VIT.images(), route=route)
    except DaveFastError:
        return
    outputs = [_called(model, gradients, one) for gradients in (True, False) for one in (True, False)]
    assert any(torch.allclose(found, output, atol=1e-5) for output in outputs)


def _called(model: nn.Module, gradients: bool, one_by_one: bool) -> Tensor:
    given = VIT.images().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        return torch.cat([model(each) for each in given.split(1 if one_by_one else 2)]).detach()


# functions of the images by which the answer to one depends on the others, or on how many there are
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: x - 0.5 * x.mean(0),
    "scaled by all": lambda x: x / x.std(),
    "normalised as a batch": lambda x: F.batch_norm(x, None, None, training=True),
    "blended": lambda x: 0.8 * x + 0.2 * x.flip(0),
    "of the neighbour": lambda x: x + 0.1 * x.roll(1, 0),
    "of the first": lambda x: x + 0.3 * x[:1],
    "of the last": lambda x: x + 0.3 * x[-1:],
    "of the largest": lambda x: x - 0.1 * x.amax(0, keepdim=True),
    "by number": lambda x: x * (1 + 0.1 * len(x)),
    "by place": lambda x: x * torch.linspace(1, 2, len(x)).to(x).view(-1, 1, 1, 1),
    "alone": lambda x: x if len(x) == 1 else 0.5 * x,
}


@pytest.mark.parametrize("given", [1, 2])
@pytest.mark.parametrize("how", thinned(MIXING, 3))
def test_a_model_that_mixes_the_images_of_a_batch_is_refused(how: str, given: int):
    # the samples of one image would be mixed with each other
    model = own_model(type("Mixing", (Own,), {"before": lambda self, x: MIXING[how](x)}))
    with pytest.raises(ModelError):
        explained(model, images()[:given], 1)


# steps that differ by the precision in which the model runs
BY_PRECISION: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda y: 0.1 * y if y.dtype == torch.float32 else y,
    "float64": lambda y: 0.1 * y if y.dtype == torch.float64 else y,
    "half": lambda y: 0.1 * y if y.dtype == torch.bfloat16 else y,
    "not float32": lambda y: y.roll(1, 1) if y.dtype != torch.float32 else y,
}


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("by", BY_PRECISION)
def test_a_step_that_differs_by_precision_is_refused_where_it_differs(by: str, precision: str):
    model = VIT.build()
    model.blocks[0].attn.register_forward_hook(lambda module, args, output: BY_PRECISION[by](output))
    try:
        _, predicted = explained(model, VIT.images(), precision=precision)
    except ModelError:
        return
    assert off(predicted, model(VIT.images()).detach().double()) < 0.05


def test_a_function_of_the_library_that_is_replaced_while_explaining_is_explained():
    def smoothed(*args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * plain(*args, **kwargs)

    with ExitStack() as undo:
        plain = F.scaled_dot_product_attention
        replace(undo, F, "scaled_dot_product_attention", smoothed)
        for name in ("vit", "eva02", "beit"):
            assert outcome(ENGINE[name].build, ENGINE[name].images()) == EXPLAINED
    assert outcome(VIT.build, VIT.images(), route="engine") == EXPLAINED


@pytest.mark.parametrize("name", thinned(["relu", "gelu", "silu", "layer_norm", "linear", "softmax"], 4))
def test_a_replaced_function_that_hands_itself_over_is_applied_once(name: str):
    # Python functions of PyTorch look up their own name where a mode watches, and then find what replaces them
    activation = {"relu": nn.ReLU, "silu": nn.SiLU}.get(name, nn.GELU)
    with ExitStack() as undo:
        plain = getattr(F, name)

        def halved(*args: Any, **kwargs: Any) -> Tensor:
            return 0.5 * plain(*args, **kwargs)

        halved.__wrapped__, halved.__name__ = plain, name
        replace(undo, F, name, halved)

        def build() -> nn.Module:
            model = VIT.build()
            for block in model.blocks:
                block.mlp.act = activation()
            return model

        for route in ("auto", "frozen"):
            assert outcome(build, VIT.images(), route=route) in (EXPLAINED, REFUSED)


def test_a_bound_method_of_another_model_is_not_explained_as_ones_own():
    # a method of one model that stands in another computes with the first one's weights
    def build() -> nn.Module:
        model, other = VIT.build(), VIT.build(seed=9)
        model.blocks[0].attn.forward = types.MethodType(type(other.blocks[0].attn).forward, other.blocks[0].attn)
        return model

    outcome(build, VIT.images())


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["sdpa", "eager", "after loading", "in the configuration"])
def test_the_attention_that_a_model_was_switched_to_is_explained(switch: str):
    transformers = pytest.importorskip("transformers")

    def build() -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=CLASSES,
            attn_implementation="eager" if switch == "eager" else "sdpa",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = transformers.ViTForImageClassification(config).eval()
            randomise(model)
        if switch == "after loading":
            model.set_attn_implementation("eager")
        elif switch == "in the configuration":
            model.config._attn_implementation = "eager"
        return Logits(model)

    # plain attention takes its softmax in float32, whatever the precision of the model
    assert outcome(build, images(), precision="fp32") == EXPLAINED


class Logits(nn.Module):
    """The logits of a model that returns an object with them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits
