"""On a CPU the number of threads does not change a bit."""

import pytest
import torch

import dave_fast
from tests.tiny import initial_vit


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("precision", "size", "backend"),
    [("fp32", 224, "auto"), ("bf16", 224, "auto"), ("fp64", 96, "auto"), ("fp32", 352, "auto"), ("fp32", 96, "torch")],
    ids=str,
)
def test_one_two_and_three_threads_give_the_same_bits(threads, precision, size, backend):
    """Images of 352 pixels have 485 tokens, for which attention runs block by block."""
    model = initial_vit(img_size=size, patch_size=16, embed_dim=96, num_classes=11)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = []
    for count in (1, 2, 3):
        threads(count)
        explainer = dave_fast.DAVE(model, precision=precision, backend=backend, noise_alpha=0.5)
        found.append(explainer.explain(images, 3, n_samples=4))
    for other in found[1:]:
        assert torch.equal(other.raw, found[0].raw) and torch.equal(other.maps, found[0].maps)
        assert torch.equal(other.output, found[0].output)
