"""Probes on tokens: the fit, the heads, mosaics with too few classes, and the check by blanking cells."""

import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics, probes
from dave_fast.evaluate.mosaics import resized
from tests.tiny import named_vit
from tests.tolerances import EXACT

NAMES = ("red", "green", "blue", "grey")


def coloured(count, seed=0):
    """Photographs of one colour each with noise: classes 0 to 2 by colour, 3 grey."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    for number, label in enumerate(labels.tolist()):
        if label < 3:
            images[number, label] += 1.5
    return images, labels


def test_a_fitted_probe_names_unseen_images_and_follows_the_cells_of_mosaics():
    model = named_vit(NAMES)
    images, labels = coloured(24)
    views = probes.views_of(images, labels, 4, 6, seed=1)
    assert [tuple(each.images.shape[2:]) for each in views] == [(32, 32), (64, 64)]
    assert all(torch.allclose(each.targets.sum(1), torch.ones(len(each.targets))) for each in views)
    models = (model, resized(model, (64, 64)))
    read = [probes.features(at, each.images) for at, each in zip(models, views, strict=True)]
    unseen, wanted = coloured(12, seed=9)
    for pool in probes.POOLS:
        inputs = torch.cat([each[pool] for each in read])
        weight, bias = probes.fit(inputs, torch.cat([each.targets for each in views]))
        probe = probes.with_head(model, weight, bias, pool, NAMES)
        assert torch.equal(probe(unseen).argmax(1), wanted)
        assert torch.allclose(probe(unseen), probes.features(model, unseen)[pool] @ weight.T + bias, atol=1e-4)
        chosen = probes.draw_mosaics(wanted, 2, 3, 0)
        images = metrics.build_mosaics(unseen[chosen])
        own, other, most = probes.blanking(resized(probe, (64, 64)), images, wanted[chosen])
        assert len(own) == 12
        assert own.mean() > other.mean()
        assert (most > other).all() and not torch.equal(most, own)
        # less the mean of the others such logits are themselves: softmax does not see a sum over the classes
        assert weight.sum(0).abs().max() < 1e-5 * weight.abs().max()


def test_a_fit_recovers_the_probabilities_that_made_its_targets():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 5, generator=generator)
    truth = torch.randn(3, 5, generator=generator)
    weight, bias = probes.fit(inputs, (inputs @ truth.T).softmax(1))
    found = (inputs @ weight.T + bias).softmax(1)
    # the decay pulls the probabilities a little towards equal shares
    assert (found - (inputs @ truth.T).softmax(1)).abs().mean() < 0.1
    assert (found.argmax(1) == (inputs @ truth.T).argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize("bias", [True, False])
def test_a_contrast_is_the_logit_minus_the_mean_of_the_others(bias):
    model = named_vit(NAMES).double()
    if not bias:
        model.head.bias = None
    images = coloured(2)[0].double()
    logits = model(images)
    wanted = logits - (logits.sum(1, keepdim=True) - logits) / 3
    assert (probes.contrasted(model)(images) - wanted).norm() <= EXACT * wanted.norm()


def test_mosaics_use_different_classes_where_there_are_enough_and_all_about_equally_often():
    labels = torch.tensor([0] * 20 + [1, 1, 2, 2, 3, 3, 4, 4, 5, 6])
    for chosen in probes.draw_mosaics(labels, 2, 14, 3):
        assert len(labels[chosen].unique()) == 4
        assert len(probes.asked_cells(labels[chosen])) == 4
    counts = labels[probes.draw_mosaics(labels, 2, 14, 3)].flatten().bincount()
    assert counts.max() - counts.min() <= 1
    for chosen in probes.draw_mosaics(labels, 3, 5, 3):
        assert len(chosen.unique()) == 9
        assert len(labels[chosen].unique()) == 7
        # seven classes in nine cells: two occur twice
        assert len(probes.asked_cells(labels[chosen])) == 5
    assert not torch.equal(probes.draw_mosaics(labels, 2, 3, 3), probes.draw_mosaics(labels, 2, 3, 4))


def test_too_few_photographs_for_a_mosaic_are_refused():
    with pytest.raises(InputError, match="there are 3 photographs"):
        probes.draw_mosaics(torch.tensor([0, 1, 2]), 2, 1, 0)
