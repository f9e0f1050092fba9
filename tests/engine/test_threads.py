"""On a CPU the number of threads does not change a bit, nor do calls from several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dave_fast
from dave_fast.frozen.blocks import find_blocks, watching
from dave_fast.frozen.mode import freeze, run_frozen
from tests.tiny import initial_vit


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("emulated_bytes")
@pytest.mark.parametrize(
    ("precision", "size", "backend"),
    [
        ("fp32", 224, "auto"),
        ("bf16", 224, "auto"),
        ("int8", 224, "auto"),
        ("int8", 352, "auto"),
        ("fp64", 96, "auto"),
        ("fp32", 352, "auto"),
        ("fp32", 96, "torch"),
    ],
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


def test_what_enters_blocks_in_a_pass_of_another_thread_is_not_that_of_this_one():
    model = initial_vit().double()
    one, other = (torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    blocks = find_blocks(model, one)

    def run(leaf):
        return run_frozen(model, leaf.clone(), freeze(leaf))

    with watching(model, blocks) as alone:
        output = run(one)
    with watching(model, blocks) as entered, ThreadPoolExecutor(1) as pool:
        pool.submit(run, other).result()
        assert not entered
        assert torch.equal(run(one), output)
    for ours, expected in zip(entered, alone, strict=True):
        assert torch.equal(ours.tokens, expected.tokens)
