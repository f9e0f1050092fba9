"""`DAVE.contributions`, `DAVE.aggregate` and `sampling.join`: micro-batches that callers fill themselves."""

import weakref

import pytest
import torch

import dave_fast
from dave_fast.engine.eager import Eager
from dave_fast.errors import InputError, NonFiniteError
from dave_fast.sampling import draw, join
from tests.tiny import initial_vit
from tests.tolerances import EXACT

SIZE = 16


@pytest.fixture(scope="module", params=["engine", "frozen"])
def explainer(request):
    """Return an explainer in float64, so that results that are equal in exact arithmetic agree to rounding."""
    return dave_fast.DAVE(initial_vit(img_size=SIZE), precision="fp64", route=request.param, noise_alpha=0.5)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def draws_of(explainer, seed, samples):
    return draw(samples, height=SIZE, width=SIZE, seed=seed, sampling=explainer.sampling)


def close(a, b):
    return torch.linalg.vector_norm(a - b) <= EXACT * torch.linalg.vector_norm(b)


def test_mixed_micro_batches_give_the_maps_of_explain(explainer, images):
    """Rows of three images, interleaved over micro-batches of five, for two classes at once."""
    targets, samples = torch.tensor([[0, 3], [1, 1], [4, 2]]), 6
    draws = [draws_of(explainer, seed, samples) for seed in (7, 8, 9)]
    contributions = torch.full((3, 2, samples, 3, SIZE, SIZE), torch.nan, dtype=torch.float64)
    rows = [(image, sample) for sample in range(samples) for image in (2, 0, 1)]
    for start in range(0, len(rows), 5):
        some = rows[start : start + 5]
        parts = [draws[image][sample : sample + 1] for image, sample in some]
        chosen = torch.tensor([image for image, _ in some])
        made = explainer.contributions(images[chosen], join(parts), targets[chosen])
        for place, (image, sample) in enumerate(some):
            contributions[image, :, sample] = made[:, place]
    for image, seed in enumerate((7, 8, 9)):
        for which in range(2):
            raw, maps = explainer.aggregate(contributions[image, which][None])
            alone = explainer.explain(images[image], int(targets[image, which]), n_samples=samples, seed=seed)
            assert torch.allclose(raw.float(), alone.raw, rtol=1e-6, atol=1e-9)
            assert maps.shape == (1, SIZE, SIZE) and torch.allclose(maps.float(), alone.maps, rtol=1e-6, atol=1e-7)


def test_classes_share_a_forward_walk(explainer, images, monkeypatch):
    route = explainer._cache.route(images[:1])
    walks = []
    forward = route.forward
    monkeypatch.setattr(route, "forward", lambda tokens, levels: walks.append(len(tokens)) or forward(tokens, levels))
    draws = draws_of(explainer, 0, 4)
    together = explainer.contributions(images[:1], draws, torch.tensor([[0, 1, 2]]))
    assert walks == [4]
    for which in range(3):
        alone = explainer.contributions(images[:1], draws, torch.tensor([[which]]))
        assert close(together[which], alone[0])


def test_join_renumbers_images_and_keeps_the_rest(explainer):
    first, second = draws_of(explainer, 1, 3), draws_of(explainer, 2, 2)
    joined = join([first, second])
    assert joined.image_index.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(joined.samples, torch.cat([first.samples, second.samples]))
    assert torch.equal(joined.matrices[3:], second.matrices) and torch.equal(joined.keys[:3], first.keys)
    with pytest.raises(InputError, match="draws"):
        join([])


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([0]),
        torch.tensor([[0.0]]),
        torch.tensor([[5]]),
        torch.tensor([[-1]]),
        torch.tensor([[0], [1]]),
        [[0]],
    ],
)
def test_invalid_targets_are_refused(explainer, images, targets):
    with pytest.raises(InputError, match="target"):
        explainer.contributions(images[:1], draws_of(explainer, 0, 1), targets)


def test_pixels_that_are_not_finite_are_refused(explainer, images):
    broken = images[:1].clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="pixels"):
        explainer.contributions(broken, draws_of(explainer, 0, 1), torch.tensor([[0]]))
    assert explainer.fitting_rows(images[:1]) >= 1 and explainer.statistics_dtype == torch.float64


@pytest.mark.parametrize("depth", ["pixels", 1])
def test_operators_of_one_micro_batch_at_a_time_are_held(explainer, images, depth, monkeypatch):
    walks, most, walk_of = [], [], Eager.walk

    def walk(self, tokens):
        walks.append(weakref.ref(self))
        most.append(sum(each() is not None for each in walks))
        return walk_of(self, tokens)

    monkeypatch.setattr(Eager, "walk", walk)
    explainer.explain(torch.cat([images, images]), 1, n_samples=1, depth=depth, internal_batch_size=1)
    # the one before is freed when the next has run
    assert len(walks) >= 12 and max(most) <= 2
