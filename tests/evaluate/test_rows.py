"""Rows of a comparison: those of shared samples are those of runs of their own."""

import pytest
import torch

from dave_fast import DAVE
from dave_fast.evaluate import rows
from dave_fast.evaluate.methods import MethodSettings
from dave_fast.ops.smooth import smooth
from tests.tiny import random_head_vit

SEED = 5


@pytest.fixture(scope="module")
def model():
    return random_head_vit().requires_grad_(False)


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_rows_of_one_run_are_runs_of_their_own(model, image):
    classes = torch.tensor([1, 3])
    found = rows.dave(model, "DAVE", (4, 8), SEED, alpha=0.2)(image, classes, 7)
    assert list(found) == ["DAVE, S = 4", "DAVE, S = 4, paper's", "DAVE, S = 8", "DAVE, S = 8, paper's"]
    explainer = DAVE(model, noise_alpha=0.2)
    for size in (4, 8):
        for row, wanted in enumerate(classes.tolist()):
            raw = explainer.explain(image, wanted, size, SEED, image_keys=[7]).raw
            papers = found[f"DAVE, S = {size}, paper's"]
            assert torch.allclose(papers["as it is"][row], raw.sum(1)[0], atol=1e-6)
            assert torch.allclose(papers["smoothed"][row], smooth(raw)[0], atol=1e-4)
    # the maps are those that the explainer gives, and their signed sums are raw's
    shrunk, papers = found["DAVE, S = 8"], found["DAVE, S = 8, paper's"]
    given = explainer.explain(image, targets=classes.tolist(), n_samples=8, seed=SEED, image_keys=[7])
    assert torch.allclose(shrunk["smoothed"], given.maps[0], atol=1e-4)
    assert torch.equal(shrunk["as it is"], papers["as it is"])
    assert shrunk["smoothed"].mean() < papers["smoothed"].mean()


def test_questions_beyond_the_logit(model, image):
    classes = torch.tensor([2])
    plain = rows.dave(model, "DAVE", (8,), SEED, 0.2)(image, classes, 0)["DAVE, S = 8"]["smoothed"]
    contrast = rows.dave_contrast(model, "contrast", 8, SEED, 0.2)(image, classes, 0)["contrast, S = 8"]["smoothed"]
    assert not torch.allclose(plain, contrast, atol=0.05)
    (found,) = rows.dave_score(model, "log p", 8, SEED, 0.2, rows.log_p)(image, classes, 0).values()
    assert found["smoothed"].shape == found["as it is"].shape == (1, 32, 32)
    assert not torch.allclose(plain, found["smoothed"], atol=0.05)


def test_a_class_against_the_other_asked_ones_is_explained_as_that_contrast(model, image):
    classes = torch.tensor([2, 0, 4])
    (found,) = rows.dave_score(model, "others", 8, SEED, 0.2, rows.against_others)(image, classes, 3).values()
    explainer = DAVE(model, noise_alpha=0.2)
    for row, (own, one, other) in enumerate(((2, 0, 4), (0, 2, 4), (4, 2, 0))):
        question = lambda output: output[:, own] - (output[:, one] + output[:, other]) / 2  # noqa: B023, E731
        expected = explainer.explain(image, question, 8, SEED, image_keys=[3])
        assert torch.allclose(found["smoothed"][row], expected.maps[0], atol=1e-4)


def test_a_method_is_a_row_under_its_name_or_another(model, image):
    classes = torch.tensor([0, 4])
    family = rows.single(model, "integrated gradients", MethodSettings(4), SEED)
    (name, maps), *others = family(image, classes, 0).items()
    assert (name, others) == ("integrated gradients", [])
    assert maps["as it is"].shape == (2, 32, 32)
    fast = rows.single(model, "integrated gradients", MethodSettings(4), SEED, row="fast", autocast=True)
    almost = fast(image, classes, 0)["fast"]
    assert torch.nn.functional.cosine_similarity(almost["as it is"].flatten(), maps["as it is"].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("shrink", [True, False])
def test_dave_as_a_method_of_one_row_has_the_maps_that_it_gives(model, image, shrink):
    settings = {"noise_alpha": 0.2, "shrink": shrink}
    found = rows.single(model, "DAVE", MethodSettings(8, settings), SEED)(image, torch.tensor([1, 3]), 7)["DAVE"]
    for row, wanted in enumerate((1, 3)):
        own = DAVE(model, **settings).explain(image, wanted, 8, SEED, image_keys=[7])
        assert torch.equal(found["as it is"][row], own.raw.sum(1)[0])
        assert torch.equal(found["smoothed"][row], own.maps[0])


def test_passes_in_the_time_of_a_slower_method_are_more(model, image, monkeypatch):
    cost = {"slow": 6.0}
    monkeypatch.setattr(rows, "_seconds", lambda family, image, classes: cost.get(family, family))
    # 0.5 seconds and 0.25 a pass: (6 − 0.5)/0.25 passes
    assert rows.passes_in_the_time_of("slow", lambda passes: 0.5 + 0.25 * passes, image, None) == 22
    # ten passes that took no longer than two do not make it millions: (6 − 2)/(2/40) + 2
    assert rows.passes_in_the_time_of("slow", lambda passes: 2.0, image, None) == 82
