"""Tests of what an output means: classes or an embedding, the link to a probability, the head."""

import pytest
import torch
from torch import nn

from dave_fast.models.adapter import Adapter
from dave_fast.models.meaning import kind_of, link_of, probabilities

SCORES = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("link", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_link_of_an_adapter_makes_its_probabilities(link, width):
    model, scores = Adapter(nn.Identity(), kind="classifier", link=link), SCORES[:, :width]
    found = probabilities(model, scores)
    if link is None:
        assert link_of(model, width) is None and found.isnan().all()
    elif link == "softmax" and width > 1:
        torch.testing.assert_close(found, scores.softmax(1))
    else:
        torch.testing.assert_close(found, scores.sigmoid())


@pytest.mark.parametrize("link", ["softmax", "sigmoid", None])
def test_embeddings_have_no_probabilities_whatever_the_link(link):
    model = Adapter(nn.Identity(), kind="embedding", link=link)
    assert kind_of(model) == "embedding" and link_of(model, 5) is None
    assert probabilities(model, SCORES).isnan().all()


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (3, 2, 4, 4)])
def test_dense_outputs_have_no_probabilities(shape):
    found = probabilities(Adapter(nn.Identity(), kind="classifier"), torch.zeros(shape))
    assert found.shape == shape and found.isnan().all()
