"""Evidence at blocks: tokens ⊙ frozen cotangent, against hand-written models and the affine replay."""

import pytest
import torch

from dave_fast.engine.levels import PIXELS, Levels, levels_of
from dave_fast.frozen.replay import Replay
from dave_fast.frozen.trace import Trace
from dave_fast.ops.patches import patchify
from tests.frozen.oracle import oracle_forward
from tests.tolerances import EXACT
from tests.toys import engine_of, frozen_forward, relative
from tests.variants import CLASSES, ENGINE, PLAIN

IN_PARTS = ["vit", "vit-average", "vit-rms-norm", "dinov2-registers", "vit-parallel", "vit-post-norm", "eva02", "beit"]


def all_levels(engine):
    return Levels(True, tuple(engine.plan.whole_blocks.values()))


def pulled(engine, images, cotangent, levels):
    _, saved = engine.forward(patchify(images, engine.plan.patch_size).to(engine.plan.dtype), levels)
    return engine.vjp.pull(saved, cotangent, levels)


def cotangent_like(output):
    return torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(output.dtype)


def hooked(model, images):
    """Return the output with frozen operators, and the tokens that enter each block."""
    entered = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    return frozen_forward(model, images.clone().requires_grad_()), entered


def truth(output, entered, cotangent):
    slopes = torch.autograd.grad((output * cotangent).sum(), entered)
    return [(tokens * slope).sum(-1).detach() for tokens, slope in zip(entered, slopes, strict=True)]


@pytest.mark.parametrize("name", PLAIN)
def test_evidence_is_that_of_a_model_written_by_hand(name):
    model, images = PLAIN[name].build(torch.float64), PLAIN[name].images(3, torch.float64)
    entered = []
    output = oracle_forward(model, images.clone().requires_grad_(), entered)
    cotangent, engine = cotangent_like(output), engine_of(model, dtype=torch.float64)
    found = pulled(engine, images, cotangent, all_levels(engine)).evidence
    for ours, theirs in zip(found, truth(output, entered, cotangent), strict=True):
        assert relative(ours, theirs) < EXACT


@pytest.mark.parametrize("name", sorted(set(ENGINE) - set(PLAIN)))
def test_evidence_is_that_of_the_models_own_blocks(name):
    model, images = ENGINE[name].build(torch.float64), ENGINE[name].images(2, torch.float64)
    output, entered = hooked(model, images)
    cotangent = cotangent_like(output)
    engine = engine_of(ENGINE[name].build(torch.float64), dtype=torch.float64)
    found = pulled(engine, images, cotangent, all_levels(engine)).evidence
    for ours, theirs in zip(found, truth(output, entered, cotangent), strict=True):
        assert relative(ours, theirs) < EXACT


@pytest.mark.parametrize("name", IN_PARTS)
def test_tokens_and_later_biases_add_up_to_the_logit(name):
    model, image = ENGINE[name].build(torch.float64), ENGINE[name].images(1, torch.float64)
    replay = Replay(model, image, name)
    output = replay.forward(replay.x, Trace()).detach()
    engine, cotangent = engine_of(model, dtype=torch.float64), cotangent_like(output)
    evidence = pulled(engine, image, cotangent, all_levels(engine)).evidence
    for block, of_tokens in zip(replay.model.blocks, evidence, strict=True):
        # the operators of the image, behind tokens of zeros: what biases alone make of the output
        handle = block.register_forward_pre_hook(lambda module, args: (0 * args[0], *args[1:]))
        biases = replay.forward(replay.x, Trace()).detach()
        handle.remove()
        total = of_tokens.sum() + (cotangent * biases).sum()
        assert abs(total - (cotangent * output).sum()) < EXACT * (cotangent * output).norm()


@pytest.mark.parametrize("name", ["vit", "eva02-inner-norms", "vit-parallel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_levels_change_no_bit_of_each_other(name, dtype):
    engine = engine_of(ENGINE[name].build(), dtype=dtype)
    images = ENGINE[name].images(3)
    output, saved = engine.forward(patchify(images, engine.plan.patch_size).to(dtype))
    cotangent, levels = cotangent_like(output), all_levels(engine)
    every = pulled(engine, images, cotangent, levels)
    assert torch.equal(every.pixels, engine.vjp(saved, cotangent))
    for block in levels.blocks:
        alone = pulled(engine, images, cotangent, Levels(False, (block,)))
        assert alone.pixels is None and torch.equal(alone.evidence[0], every.evidence[block])


def test_rows_do_not_depend_on_each_other():
    engine, images = engine_of(ENGINE["vit"].build(), dtype=torch.float32), ENGINE["vit"].images(5)
    cotangent = cotangent_like(torch.empty(5, 7))
    every = pulled(engine, images, cotangent, Levels(False, (1,))).evidence[0]
    for row in range(5):
        alone = pulled(engine, images[[row]], cotangent[[row]], Levels(False, (1,))).evidence[0]
        assert relative(alone, every[[row]]) < 1e-5


def test_the_last_block_has_evidence_for_all_tokens_though_few_leave_it():
    engine = engine_of(ENGINE["vit"].build(), dtype=torch.float64)
    assert engine.plan.steps[-2].trimmed
    images, last = ENGINE["vit"].images(1, torch.float64), max(engine.plan.whole_blocks.values())
    evidence = pulled(engine, images, torch.eye(7, dtype=torch.float64)[[1]], Levels(False, (last,))).evidence[0]
    assert evidence.shape == (1, engine.plan.tokens) and (evidence != 0).all()


def test_levels_hold_each_block_once_and_in_order():
    assert levels_of([5, None, 2, 5]) == Levels(True, (2, 5))
    assert levels_of([3]) == Levels(False, (3,)) and levels_of([None]) == PIXELS


def test_evidence_in_eight_bits_has_the_size_of_the_cotangent():
    """The walk divides a row's cotangent by a power of two, and the evidence is multiplied by it again."""
    variant, levels = ENGINE["vit"], Levels(False, (0, 1))
    images, cotangent = variant.images(2), torch.eye(7)[[1, 4]] * torch.tensor([[1.0], [5.0]])
    fp8 = engine_of(variant.build(), dtype=torch.bfloat16, backend="torch", narrow="fp8")
    exact = pulled(engine_of(variant.build(), dtype=torch.float64), images, cotangent.double(), levels).evidence
    found, larger = (pulled(fp8, images, factor * cotangent, levels).evidence for factor in (1, 2**12))
    for ours, theirs, scaled in zip(found, exact, larger, strict=True):
        assert torch.equal(scaled, 2**12 * ours)
        assert relative(ours.double(), theirs) < 0.5


@pytest.mark.parametrize("rows", [1, 2])
def test_what_enters_a_block_stays_where_products_add_in_the_memory_of_the_stream(rows, monkeypatch):
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(rows, torch.float64)
    engine = engine_of(model, dtype=torch.float64)
    cotangent = torch.ones(rows, CLASSES, dtype=torch.float64)
    expected = pulled(engine, images, cotangent, all_levels(engine)).evidence
    ops = engine.forward._ops
    add = ops.add

    def in_place(*args, overwrite, residual, **settings):
        """Add as Triton's kernels do, which write into the memory of the residual."""
        sum_ = add(*args, overwrite=overwrite, residual=residual, **settings)
        return sum_ if residual is None or not overwrite else residual.copy_(sum_)

    monkeypatch.setattr(ops, "add", in_place)
    found = pulled(engine, images, cotangent, all_levels(engine)).evidence
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
