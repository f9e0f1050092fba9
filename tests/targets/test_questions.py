"""Tests of questions beyond the class: cotangents against gradients of the scores, joint maps against single ones."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dave_fast
from dave_fast import targets
from dave_fast.errors import InputError
from dave_fast.sampling import Draws, Sampling, draw, identity
from dave_fast.targets import cotangents
from dave_fast.targets.forms import ModelView, resolve_target
from dave_fast.targets.places import Mask, Point
from dave_fast.targets.probes import MOST_BYTES
from tests.tiny import random_vit
from tests.tolerances import EXACT
from tests.toys import normal, relative

HEIGHT, WIDTH, PATCH = 32, 48, 8
SIZE = (HEIGHT, WIDTH)


def tiny(**changes):
    return random_vit(img_size=SIZE, patch_size=PATCH, embed_dim=32, **changes)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def dense():
    """Return a model whose output is tokens, after a class token and a register."""
    return tiny(num_classes=0, global_pool="", reg_tokens=1)


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def explainer(model, precision="fp32", **settings):
    return dave_fast.DAVE(model, precision=precision, noise_alpha=0.5, **settings)


def asked(model=None, output=None):
    return ModelView(model or nn.Identity(), output or (lambda images: images))


def cotangent(question, output, rows=None, model=None, size=SIZE):
    rows = identity(len(output)) if rows is None else rows
    found = resolve_target(question, output, size, asked(model))
    return found(output[rows.image_index], rows)


# Cotangents of single scores.


class Named(nn.Identity):
    """A classifier with class names."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"num_classes": 5, "label_names": ("cat", "dog", "house cat", "T-shirt", "tiger")}


def test_classes_go_by_index_or_name():
    output = normal(2, 5)
    assert torch.equal(cotangent(targets.Class(3), output), cotangent(3, output))
    assert torch.equal(cotangent(targets.Class("tiger"), output, model=Named()), cotangent(4, output))
    with pytest.raises(InputError, match="no class has it"):
        cotangent(targets.Class("walrus"), output, model=Named())
    found = resolve_target(targets.Class(3), output, SIZE, asked())
    assert found.classes.tolist() == [3, 3]


def test_sums_and_contrasts_are_linear_in_their_parts():
    output, score = normal(2, 5), lambda y: y.log_softmax(1)[:, 1]
    one, three = cotangent(1, output), cotangent(3, output)
    assert torch.equal(cotangent(targets.Sum(1, 3), output), one + three)
    assert torch.equal(cotangent(targets.Contrast(1, 3), output), one - three)
    assert torch.equal(cotangent(targets.Sum(1, 1), output), 2 * one)
    assert torch.equal(
        cotangent(targets.Contrast([1, 3], [3, 1]), output), torch.stack([(one - three)[0], (three - one)[1]])
    )
    mixed = targets.Contrast(targets.Sum(score, 3), targets.Contrast(1, 3))
    assert torch.allclose(cotangent(mixed, output), cotangent(score, output) + 2 * three - one)
    assert resolve_target(targets.Sum(1), output, SIZE, asked()).classes.tolist() == [-1]
    with pytest.raises(InputError, match="nothing to add"):
        targets.Sum()
    with pytest.raises(InputError, match=r"targets=\[\.\.\.\]"):
        cotangent([targets.Class(1), targets.Class(2)], output)


@pytest.mark.parametrize("shape", [(7,), (3, 7)], ids=["one for all", "one an image"])
def test_a_similarity_is_the_cosine_with_its_norm_held_constant(shape):
    output, embedding = normal(3, 7), normal(*shape, seed=1)
    leaf = output.clone().requires_grad_()
    cosine = (leaf / leaf.norm(dim=1, keepdim=True).detach() * embedding / embedding.norm(dim=-1, keepdim=True)).sum(1)
    (expected,) = torch.autograd.grad(2.5 * cosine.sum(), leaf)
    found = cotangent(targets.Similarity(embedding, scale=2.5), output)
    assert relative(found, expected) < EXACT
    # the score is linear in the output, so that cotangent · output is the score
    assert torch.allclose((found * output).sum(1), 2.5 * torch.cosine_similarity(output, embedding.expand(3, 7)))


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (torch.zeros(7), "zero"),
        (torch.ones(6), r"\(6,\).*\(7,\).*\(3, 7\)"),
        (torch.ones(2, 7), r"\(2, 7\)"),
        (torch.ones(7, dtype=torch.int64), "int64"),
        (torch.full((7,), torch.nan), "finite"),
    ],
    ids=str,
)
def test_embeddings_that_do_not_fit_are_refused(embedding, words):
    with pytest.raises(InputError, match=words):
        cotangent(targets.Similarity(embedding), normal(3, 7))


class Clip(nn.Module):
    """An embedding model with a text tower, with the attributes of the adapters."""

    kind = "embedding"
    logit_scale, logit_bias = 20.0, 0.0

    def __init__(self):
        super().__init__()
        self.vision = tiny(num_classes=6)
        self.calls = []

    def forward(self, images):
        return self.vision(images)

    def text_embedding(self, texts):
        self.calls.append(list(texts))
        found = torch.stack([normal(6, seed=len(text)).float() for text in texts])
        return found / found.norm(dim=1, keepdim=True)


@pytest.mark.filterwarnings("ignore:the frozen route")
def test_texts_are_the_models_own_score(images):
    model = Clip().eval()
    explain = explainer(model, "fp64")
    text = model.text_embedding(["a cat"])[0]
    found = explain.effective_gradient(images, targets.Text("a cat"))
    expected = explain.effective_gradient(images, targets.Similarity(text, scale=20.0))
    assert torch.equal(found, expected)
    one = explain.effective_gradient(images, targets.Text("a cat", scale=1.0))
    assert relative(20 * one, found) < EXACT
    found = explain.explain(images, targets.Contrast(targets.Text("a cat"), targets.Text("a small dog")), n_samples=2)
    assert found.probability.isnan().all() and found.target.tolist() == [-1, -1]
    with pytest.raises(InputError, match="takes no text"):
        explainer(model.vision).explain(images, targets.Text("a cat"))
    with pytest.raises(InputError, match="embedding"):
        explain.explain(images)


def test_another_image_is_its_output(model, images, tmp_path):
    explain = explainer(model, "fp64")
    other = normal(3, *SIZE, seed=4)
    output = explain._view().output(other)[0]
    found = explain.effective_gradient(images, targets.SimilarTo(other))
    assert torch.equal(found, explain.effective_gradient(images, targets.Similarity(output)))
    own = explain.effective_gradient(images, targets.SimilarTo(images))
    assert relative(own[:1], explain.effective_gradient(images[:1], targets.SimilarTo(images[0]))) < EXACT
    # autograd's gradient of this cosine is zero; with the norm held constant it is not
    assert float(own.norm()) > 0
    with pytest.raises(InputError, match=r"\(3, 5\)"):
        explain.effective_gradient(images, targets.SimilarTo(torch.randn(3, 3, *SIZE)))


def test_another_image_may_be_a_file(tmp_path):
    from PIL import Image

    from dave_fast.images import preprocessing

    explain = explainer("demo")
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    pixels.save(tmp_path / "other.png")
    inputs = preprocessing(explain.model)(pixels)[0]
    image = torch.randn(1, 3, 128, 128)
    expected = explain.effective_gradient(image, targets.SimilarTo(inputs))
    for given in (pixels, tmp_path / "other.png", str(tmp_path / "other.png")):
        assert torch.equal(explain.effective_gradient(image, targets.SimilarTo(given)), expected)


@pytest.mark.parametrize("shape", [(4, 5), (4, 25, 8), (4, 8, 4, 6)], ids=["classes", "tokens", "map"])
def test_linear_questions_never_wait_for_the_device(shape):
    """The tensors are fake: reading a value on the host, which would wait for the device, raises."""
    with FakeTensorMode():
        rows = draws_without_values(4)
        output, weights = torch.empty(shape), torch.empty(2, shape[1] if len(shape) != 3 else shape[2])
        one = cotangents.ElementCotangent(torch.empty(2, dtype=torch.int64))
        asked = [one, cotangents.WeightedCotangent(((1.0, one), (-1.0, one)))]
        if len(shape) == 2:
            asked.append(cotangents.DirectionCotangent(weights, 2.0))
        elif len(shape) == 3:
            asked.append(cotangents.BoxCotangent(torch.empty(2, 4, dtype=torch.float64), 1, (32, 48)))
        if len(shape) > 2:
            places = Point(3.0, 4.0), Point(3.0, 4.0, to_edge=True), Mask(torch.empty(2, 32, 48))
            asked += [cotangents.PatchCotangent(weights, place, (4, 6), (8.0, 8.0), 1) for place in places]
        for each in asked:
            assert each(output, rows).shape == shape
        with pytest.raises(DataDependentOutputException):
            cotangents.score_rows((lambda y: y[0], lambda y: y[1]), output, rows)


def draws_without_values(rows):
    integers, numbers = {"dtype": torch.int64}, {"dtype": torch.float64}
    return Draws(
        image_index=torch.empty(rows, **integers),
        matrices=torch.empty(rows, 2, 3, **numbers),
        signal=torch.empty(rows, **numbers),
        noise=torch.empty(rows, **numbers),
        keys=torch.empty(rows, 2, **integers),
        samples=torch.empty(rows, **integers),
    )


# Patches.


def test_a_patch_is_the_gradient_of_its_token(dense, images):
    probe, place = normal(32), 2 + 3 * (WIDTH // PATCH) + 4
    found = {
        route: explainer(dense, "fp64", route=route).effective_gradient(images, targets.Patch(3, 4, probe))
        for route in ("engine", "frozen")
    }
    by_callable = explainer(dense, "fp64").effective_gradient(images, lambda y: y[:, place] @ probe)
    assert relative(found["engine"], by_callable) < EXACT
    assert relative(found["frozen"], found["engine"]) < EXACT


def test_a_patch_without_weights_is_its_own_feature(dense, images):
    explain = explainer(dense, "fp64")
    tokens = explain._view().output(images)
    own = torch.nn.functional.normalize(tokens[:, 2 + 7], dim=1)
    found = explain.effective_gradient(images, targets.Patch(1, 1))
    assert torch.equal(found, explain.effective_gradient(images, targets.Patch(1, 1, own)))
    assert not torch.allclose(own[0], own[1])


def test_maps_of_features_have_patches_too():
    output, probe = normal(2, 7, 4, 6), normal(7, seed=3)
    found = cotangent(targets.Patch(3, 5, probe), output)
    expected = torch.zeros_like(output)
    expected[:, :, 3, 5] = probe
    assert torch.equal(found, expected)
    last = cotangent(targets.Patch(3, 5, probe), output.permute(0, 2, 3, 1))
    assert torch.equal(last.permute(0, 3, 1, 2), expected)
    # tokens in rows have the same grid
    tokens = cotangent(targets.Patch(3, 5, probe, prefix=1), normal(2, 25, 7))
    assert torch.equal(tokens[:, 1:].mT.unflatten(2, (4, 6)), expected) and not tokens[:, 0].any()


def test_a_patch_follows_its_content():
    """The cotangent lies at the place to which τ maps the patch's centre."""
    sampling = Sampling(rotation=30.0, translation=0.2, scale=(0.8, 1.2), flip=0.5)
    rows = draw(40, height=HEIGHT, width=WIDTH, seed=3, sampling=sampling)
    output, row, column = normal(1, 24, 1), 1, 4
    found = cotangent(targets.Patch(row, column, torch.ones(1, dtype=torch.float64)), output, rows)
    shares = found.view(len(rows), 4, 6)
    centre = torch.tensor([(column + 0.5) * PATCH - 0.5, (row + 0.5) * PATCH - 0.5], dtype=torch.float64)
    grid_y, grid_x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    inside = 0
    for share, matrix in zip(shares, rows.matrices, strict=True):
        moved = torch.linalg.solve(matrix[:, :2], centre - matrix[:, 2])
        token = (moved + 0.5) / PATCH - 0.5
        if (token > 0).all() and token[0] < 5 and token[1] < 3:
            inside += 1
            assert float(share.sum()) == pytest.approx(1, abs=1e-12)
            assert float((share * grid_x).sum()) == pytest.approx(float(token[0]), abs=1e-9)
            assert float((share * grid_y).sum()) == pytest.approx(float(token[1]), abs=1e-9)
        if (token < -1).any() or token[0] > 6 or token[1] > 4:
            assert not share.any()
    assert inside > 10


def test_a_mirrored_image_is_explained_by_the_mirrored_patch(dense, images):
    """With a flip as the only perturbation, the contribution is that of the patch on the other side."""
    still = dict(rotation=0.0, scale=(1.0, 1.0), translation=0.0)
    mirrored = dave_fast.DAVE(dense, precision="fp64", noise_alpha=0.0, flip=1.0, **still)
    plain = dave_fast.DAVE(dense, precision="fp64", noise_alpha=0.0, flip=0.0, **still)
    probe = normal(32)
    found = mirrored.explain(images, targets.Patch(1, 0, probe), n_samples=1).raw
    expected = plain.explain(images.flip(3), targets.Patch(1, 5, probe), n_samples=1).raw.flip(3)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (targets.Patch(4, 0), "4 rows and 6 columns"),
        (targets.Patch(0, -1), "not in the grid"),
        (targets.Patch(0, 0, torch.ones(31)), r"\(31,\)"),
        (targets.Patch(0, 0, prefix=3), "behind 3 prefix tokens"),
    ],
    ids=str,
)
def test_patches_that_are_not_there_are_refused(dense, images, question, words):
    with pytest.raises(InputError, match=words):
        explainer(dense).explain(images, question)


def test_a_classifier_has_no_patches_and_the_error_says_how_to_get_them(model, images):
    with pytest.raises(InputError, match="num_classes=0, global_pool=''"):
        explainer(model).explain(images, targets.Patch(0, 0))
    with pytest.raises(InputError, match="no grid of patches"):
        cotangent(targets.Patch(0, 0), normal(1, 48, 4), size=(48, 48))


def test_a_timm_model_gives_its_tokens(model, images):
    made = targets.tokens_of(model)
    assert made(images).shape == (2, 25, 32) and model(images).shape == (2, 5)
    found = explainer(made).explain(images, targets.Patch(0, 0), n_samples=1)
    assert found.raw.isfinite().all() and found.raw.any()
    with pytest.raises(InputError, match="reset_classifier"):
        targets.tokens_of(nn.Identity())


# Probes.


def test_probes_come_from_files(tmp_path):
    layer = nn.Linear(7, 3)
    save_file(layer.state_dict(), tmp_path / "probe.safetensors")
    np.save(tmp_path / "probe.npy", layer.weight.detach().double().numpy())
    save_file(
        {"a.weight": layer.weight[:, :, None, None].contiguous(), "b": torch.zeros(2, 2)}, tmp_path / "c.safetensors"
    )
    for name in ("probe.safetensors", "probe.npy", "c.safetensors"):
        found = targets.load_probe(tmp_path / name)
        assert torch.equal(found, layer.weight) and found.dtype == torch.float32
        assert torch.equal(targets.load_probe(tmp_path / name, 2), layer.weight[2])


def test_files_that_are_no_probe_are_refused(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "integers.npy", np.zeros((2, 3), np.int64))
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    np.save(tmp_path / "good.npy", np.zeros((2, 3)))
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("large.npy", "large.safetensors"):
        with (tmp_path / name).open("wb") as file:
            # sparse
            file.truncate(MOST_BYTES + 1)
    refused = {
        "pickled.npy": "Object arrays",
        "integers.npy": "int64",
        "nan.npy": "NaN",
        "torn.safetensors": "cannot read",
        "two.safetensors": "holds a, b",
        "none.npy": "no such file",
        "pipe.npy": "named pipe",
        "large.npy": "at most",
        "large.safetensors": "at most",
        "layer.pt": "safetensors or .npy",
    }
    for name, words in refused.items():
        with pytest.raises(InputError, match=f"(?i){words}"):
            targets.load_probe(tmp_path / name)
    with pytest.raises(InputError, match="rows 0 to 1"):
        targets.load_probe(tmp_path / "good.npy", 2)


# Several questions of one image.

SEVERAL = [3, None, targets.Sum(1, 4), targets.Contrast(0, 2), lambda y: y.log_softmax(1)[:, 2], [4, 1]]


def assert_each_is_its_own(explain, images, asked, **settings):
    together = explain.explain(images, targets=asked, n_samples=5, seed=3, **settings)
    for which, target in enumerate(asked):
        alone = explain.explain(images, target, n_samples=5, seed=3, **settings)
        assert torch.equal(together.raw[:, which], alone.raw)
        assert torch.equal(together.maps[:, which], alone.maps)
        assert torch.equal(together.target[:, which], alone.target)
        assert torch.equal(together.probability[:, which].nan_to_num(-1), alone.probability.nan_to_num(-1))
    return together


@pytest.mark.parametrize("route", ["engine", "frozen"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_every_map_is_that_of_its_own_run(model, images, precision, route):
    found = assert_each_is_its_own(explainer(model, precision, route=route), images, SEVERAL)
    assert found.maps.shape == (2, 6, *SIZE) and found.raw.shape == (2, 6, 3, *SIZE)
    assert found.target.shape == found.probability.shape == (2, 6)


def test_tokens_share_their_walks_too(dense, images):
    probes = normal(2, 32).float()
    asked = [
        targets.Patch(0, 0),
        targets.Patch(3, 5, probes[0]),
        targets.Sum(*(targets.Patch(1, c, probes[1]) for c in (1, 2))),
    ]
    assert_each_is_its_own(explainer(dense), images, asked)


def forward_walks(explain, images, monkeypatch, **asked):
    route = explain._cache.route(images)
    walked, forward = [], route.forward
    monkeypatch.setattr(route, "forward", lambda tokens, levels: walked.append(len(tokens)) or forward(tokens, levels))
    explain.explain(images, n_samples=5, internal_batch_size=4, **asked)
    return sum(walked)


def test_targets_share_the_forward_walks(model, images, monkeypatch):
    one = forward_walks(explainer(model), images, monkeypatch, target=0)
    assert one == 2 * 5 + 2
    assert forward_walks(explainer(model), images, monkeypatch, targets=torch.arange(5)) == one
    assert forward_walks(explainer(model), images, monkeypatch, top_k=3) == one


ONE = 4 * 3 * HEIGHT * WIDTH * 5  # bytes of the contributions of one image and target


@pytest.mark.parametrize(("fitting", "walks"), [(60, 1), (17, 3), (1, 50)])
def test_memory_is_bounded_and_the_bits_are_the_same(model, images, monkeypatch, fitting, walks):
    """Memory fits the samples of `fitting` pairs (image, target); forward walks are repeated as needed."""
    explain = explainer(model)
    asked = [i % 5 for i in range(50)]
    ample = explain.explain(images[:1], targets=asked, n_samples=5, internal_batch_size=4)
    made = []
    empty = torch.Tensor.new_empty

    def counting(tensor, *size, **settings):
        result = empty(tensor, *size, **settings)
        made.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: int(ONE * fitting * 4 + ONE))
    monkeypatch.setattr(torch.Tensor, "new_empty", counting)
    tight = explain.explain(images[:1], targets=asked, n_samples=5, internal_batch_size=4)
    assert torch.equal(tight.raw, ample.raw) and torch.equal(tight.maps, ample.maps)
    results = {each.numel() * each.element_size() for each in (tight.raw, tight.maps)}
    assert max(size for size in made if size not in results) <= ONE * fitting
    seen = []
    explain.explain(images[:1], targets=asked, n_samples=5, internal_batch_size=4, progress=lambda *of: seen.append(of))
    assert seen[-1] == (5 * walks, 5 * walks)


@pytest.mark.parametrize("fitting", [7, 4, 2, 1])
def test_images_and_questions_go_together_as_they_fit(model, images, monkeypatch, fitting):
    """Explain two images and three questions: all at once, image by image, question by question."""
    explain, asked = explainer(model), [0, targets.Contrast(1, 2), [3, 4]]
    settings = {"n_samples": 5, "internal_batch_size": 5}
    ample = explain.explain(images, targets=asked, **settings)
    monkeypatch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: int(ONE * fitting * 4 + ONE))
    tight = explain.explain(images, targets=asked, **settings)
    assert torch.equal(tight.raw, ample.raw) and torch.equal(tight.maps, ample.maps)


def test_token_storage_serves_several_targets(model, images, monkeypatch):
    explain = explainer(model, "bf16")
    ample = explain.explain(images[:1], targets=[0, 1, 2], n_samples=5, internal_batch_size=4)
    monkeypatch.setattr("dave_fast.engine.free_memory.free_bytes", lambda device: int(1.5 * ONE))
    tiled = explain.explain(images[:1], targets=[0, 1, 2], n_samples=5, internal_batch_size=4)
    assert torch.equal(tiled.raw, ample.raw)


def test_one_way_to_ask(model, images):
    with pytest.raises(InputError, match="more than one was given"):
        explainer(model).explain(images, 3, targets=[3])
    with pytest.raises(InputError, match="at least one"):
        explainer(model).explain(images, targets=[])
    with pytest.raises(InputError, match="out of range"):
        explainer(model).explain(images, targets=[0, 5])
    single = explainer(model).explain(images[0], targets=torch.tensor([[2, 4]]), n_samples=2)
    assert single.maps.shape == (1, 2, *SIZE) and single.target.tolist() == [[2, 4]]
