"""On a CPU an image's map has the same bits alone and in any batch, at any number of threads, with any instructions.

The instruction sets are those with a fused multiply-add, which x86's baseline is without.
"""

import pytest
import torch

import dave_fast
from dave_fast.images import preprocessing
from dave_fast.models.demo.scenes import demo_scene
from dave_fast.ops import _ext
from dave_fast.ops.patches import patchify
from dave_fast.ops.precision import DTYPES
from dave_fast.targets import Contrast
from tests.conftest import chosen_backend
from tests.libraries import LIBRARIES
from tests.toys import engine_of
from tests.variants import ENGINE

pytestmark = pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))

# without "neonbf16", whose instruction for bfloat16 rounds otherwise
FUSING = ("avx512bf16", "avx512vnni", "avx512", "avx2vnni", "avx2", "dotprod")
VARIANTS = ENGINE | {f"library {name}": variant for name, variant in LIBRARIES.items()}
# one of each way to pool, norm and position: float32 and bfloat16 take the same walks as integers
FEW = (
    "vit",
    "siglip",
    "vit-average",
    "vit-qk-norm",
    "dinov2-giant-swiglu",
    "rope-mixed",
    "beit",
    "vit-post-norm-average",
)


def by_instruction_set(make):
    """Return what `make` returns in each instruction set of this machine that fuses."""
    found = {}
    for isa in FUSING:
        if isa in _ext.module().usable_isas():
            for _ in chosen_backend(isa):
                found[isa] = make()
    return found


def at_threads(count, make):
    torch.set_num_threads(count)
    try:
        return make()
    finally:
        torch.set_num_threads(1)


def assert_equal(found, expected, where):
    assert all(map(torch.equal, found, expected)), where


def check_walks(name, precision):
    variant = VARIANTS[name]
    dtype, narrow = DTYPES[precision], "int8" if precision == "int8" else None
    model, images = variant.build(), variant.images(9)

    def walker():
        engine = engine_of(model, dtype=dtype, narrow=narrow)
        tokens = patchify(images, engine.plan.patch_size).to(dtype)

        def walk(rows=slice(None)):
            output, saved = engine.forward(tokens[rows])
            # a cotangent that depends on the output, as that of a probability does
            return output, engine.vjp(saved, output.flatten(1).softmax(1).view_as(output))

        return walk

    walk = walker()
    whole = walk()
    for rows in (slice(3, 4), slice(2, 9), torch.tensor([8, 0, 5])):
        assert_equal(walk(rows), [each[rows] for each in whole], (name, rows))
    assert_equal(at_threads(3, walk), whole, (name, "threads"))
    for isa, results in by_instruction_set(lambda: walker()()).items():
        assert_equal(results, whole, (name, isa))


@pytest.mark.parametrize("name", VARIANTS)
def test_walks_in_eight_bits(name):
    check_walks(name, "int8")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FEW)
def test_walks_in_other_precisions(name, precision):
    check_walks(name, precision)


@pytest.fixture(scope="module")
def scenes():
    read = preprocessing(dave_fast.DAVE("demo", precision="fp32").model)
    image = read(demo_scene().image)[0]
    return torch.stack([image, image.flip(-1), image.roll(20, -1), image.roll(-9, -2)])


@pytest.mark.usefixtures("emulated_bytes")
@pytest.mark.parametrize(
    ("precision", "name"), [("int8", "demo"), ("int8", "siglip"), ("bf16", "rope-mixed"), ("fp32", "vit")]
)
def test_maps(precision, name, scenes):
    model = "demo" if name == "demo" else ENGINE[name].build()
    images = scenes if name == "demo" else ENGINE[name].images(4)
    question = [Contrast(1, 0)]

    def explain(images, rows=None):
        explainer = dave_fast.DAVE(model, precision=precision, noise_alpha=0.5, internal_batch_size=rows)
        found = explainer.explain(images, targets=question, n_samples=5)
        return found.maps, found.raw, found.output

    whole = explain(images)
    for order in ([2], [3, 0, 1]):
        assert_equal(explain(images[order]), [each[order] for each in whole], order)
    for rows in (1, 7):
        assert_equal(explain(images, rows), whole, rows)
    for threads in (2, 3):
        assert_equal(at_threads(threads, lambda: explain(images)), whole, threads)
    for isa, results in by_instruction_set(lambda: explain(images)).items():
        assert_equal(results, whole, isa)
