"""Tests of questions about a place: cotangents against autograd of the same score on warped copies, in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import grid_sample, interpolate

import dave_fast
from dave_fast import targets
from dave_fast.errors import InputError, ModelError
from dave_fast.models.catalog import load_model
from dave_fast.sampling import Sampling, draw, identity
from dave_fast.targets.forms import ModelView, resolve_target
from dave_fast.targets.places import moved_boxes, overlap
from tests.tiny import random_vit
from tests.tolerances import EXACT
from tests.toys import normal, relative

SIZE = HEIGHT, WIDTH = 32, 48
CLASSES = 3
STILL = dict(rotation=0.0, scale=(1.0, 1.0), translation=0.0)


def view(model=None):
    return ModelView(model or nn.Identity(), lambda images: images)


def cotangent(question, unperturbed, output=None, rows=None, model=None):
    rows = identity(len(unperturbed)) if rows is None else rows
    return resolve_target(question, unperturbed, SIZE, view(model))(unperturbed if output is None else output, rows)


@pytest.fixture(scope="module")
def rows():
    sampling = Sampling(rotation=30.0, translation=0.3, scale=(0.7, 1.3), flip=0.5)
    return draw(12, height=HEIGHT, width=WIDTH, seed=3, image_keys=(0, 1), sampling=sampling)


def moved(place, matrix):
    """Return where a row shows the place (x, y)."""
    return torch.linalg.solve(matrix[:, :2], torch.as_tensor(place, dtype=torch.float64) - matrix[:, 2])


def at_point(logits, x, y):
    """Return logits (h, w), interpolated to the image, at a position; 0 outside of the frame."""
    if not (-0.5 <= x <= WIDTH - 0.5 and -0.5 <= y <= HEIGHT - 0.5):
        return 0 * logits.sum()
    where = torch.stack([2 * (x + 0.5) / WIDTH - 1, 2 * (y + 0.5) / HEIGHT - 1])
    return grid_sample(logits[None, None], where.view(1, 1, 1, 2), padding_mode="border", align_corners=False)[
        0, 0, 0, 0
    ]


def warped(mask, matrix):
    """Return the copy of a mask (H, W) that a row shows."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZE), indexing="ij")
    source = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ matrix.T
    where = 2 * source / torch.tensor([WIDTH - 1.0, HEIGHT - 1.0], dtype=torch.float64) - 1
    return grid_sample(mask[None, None], where[None], padding_mode="zeros", align_corners=True)[0, 0]


def gradient(scores, output):
    leaf = output.clone().requires_grad_()
    (found,) = torch.autograd.grad(torch.stack(scores(leaf)).sum(), leaf)
    return found


@pytest.mark.parametrize("grid", [(4, 6), (8, 12), (32, 48), (3, 5)], ids=str)
@pytest.mark.parametrize("at", [(20, 31), (0, 0), (31.25, 47.0)], ids=str)
def test_class_at_a_point_of_warped_copies_is_the_gradient_of_the_interpolated_logit(rows, grid, at):
    output = normal(len(rows), CLASSES, *grid, seed=1)
    places = [moved((at[1], at[0]), matrix) for matrix in rows.matrices]
    expected = gradient(
        lambda leaf: [at_point(one[2], *place) for one, place in zip(leaf, places, strict=True)], output
    )
    found = cotangent(targets.Segment(2, at=at), output[:2], output, rows)
    assert relative(found, expected) < EXACT
    assert expected.flatten(1).any(1).sum() > 5


@pytest.mark.parametrize("grid", [(4, 6), (32, 48), (3, 5)], ids=str)
def test_class_over_a_mask_of_warped_copies_is_the_gradient_of_the_mean_under_the_warped_mask(rows, grid):
    output, masks = normal(len(rows), CLASSES, *grid, seed=1), torch.zeros(2, *SIZE, dtype=torch.float64)
    masks[0, 4:20, 30:44], masks[1, 20:, :9] = 1, 0.5

    def scores(leaf):
        large = interpolate(leaf[:, 1:2], SIZE, mode="bilinear", align_corners=False)[:, 0]
        shown = [warped(masks[image], matrix) for image, matrix in zip(rows.image_index, rows.matrices, strict=True)]
        area = [torch.linalg.det(matrix[:, :2]).abs() for matrix in rows.matrices]
        weight = [masks[image].sum() for image in rows.image_index]
        return [(a * b).sum() * c / d for a, b, c, d in zip(large, shown, area, weight, strict=True)]

    found = cotangent(targets.Segment(1, mask=masks), output[:2], output, rows)
    assert relative(found, gradient(scores, output)) < EXACT


def test_class_over_a_mask_of_the_image_itself_is_the_mean_logit_there():
    output, mask = normal(1, CLASSES, 8, 12), np.zeros(SIZE, bool)
    mask[3:9, 40:] = True
    found = cotangent(targets.Segment(0, mask=mask), output)
    large = interpolate(output, SIZE, mode="bilinear", align_corners=False)
    assert float((found * output).sum()) == pytest.approx(float(large[0, 0, 3:9, 40:].mean()), rel=1e-12)
    # all logits equal: the mean is theirs, at any place
    assert float(found.sum()) == pytest.approx(1, rel=1e-12)
    assert float(cotangent(targets.Segment(0, at=(0, 47)), output).sum()) == pytest.approx(1, rel=1e-12)


def test_forms_of_a_dense_output_have_the_same_cotangent(rows):
    output = normal(len(rows), CLASSES, 4, 6)
    for question in (targets.Segment(1, at=(20, 31)), targets.Segment(1, mask=torch.ones(SIZE))):
        expected = cotangent(question, output[:2], output, rows)
        last = output.permute(0, 2, 3, 1)
        assert torch.equal(cotangent(question, last[:2], last, rows).permute(0, 3, 1, 2), expected)
        tokens = torch.cat([normal(len(rows), 1, CLASSES), output.flatten(2).mT], dim=1)
        found = cotangent(question, tokens[:2], tokens, rows)
        assert torch.equal(found[:, 1:].mT.unflatten(2, (4, 6)), expected) and not found[:, 0].any()


def padded():
    """Return timm's tokens behind a class token, of images that are padded to whole patches, and their embedding."""
    from timm.models import VisionTransformer

    settings = dict(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=0, global_pool="")
    model = VisionTransformer(**settings, dynamic_img_size=True, dynamic_img_pad=True).eval()
    return model, lambda images: model.patch_embed(images).flatten(1, 2)


def cut():
    """Return SigLIP's tokens, whose convolution leaves out what is no whole patch, and their embedding."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = dict(hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=47, patch_size=8, vision_use_head=False)).eval()
    return load_model(model)[0], lambda images: model.embeddings.patch_embedding(images).flatten(2).mT


@pytest.mark.parametrize(("make", "size"), [(padded, (27, 28)), (padded, (17, 31)), (cut, (47, 47))])
def test_class_at_a_pixel_is_that_of_the_patch_that_sees_it_where_patches_do_not_divide_the_image(make, size):
    model, embedded = make()
    images = normal(1, 3, *size).float()
    output, tokens = model(images).detach(), embedded(images)
    for y, x in [(side, side) for side in range(1, min(size) - 7, 8)] + [(8, 9)]:
        changed = images.clone()
        changed[..., y, x] += 1
        (seen,) = (embedded(changed) - tokens).abs().sum((0, 2)).nonzero()[:, 0]
        asked = resolve_target(targets.Segment(1, at=(y, x)), output, size, view(model))
        shares = asked(output, identity(1))[0, -tokens.shape[1] :, 1]
        assert int(shares.argmax()) == seen and float(shares.sum()) == pytest.approx(1)


def test_mask_whose_sum_is_beyond_float32_is_that_of_equal_weights():
    output = normal(1, CLASSES, 8, 12).float()
    found, expected = (cotangent(targets.Segment(0, mask=torch.full(SIZE, weight)), output) for weight in (3e38, 1.0))
    torch.testing.assert_close(found, expected)


def test_class_at_the_centre_of_a_patch_is_its_token_weighted_by_one_class():
    output = normal(1, CLASSES, 4, 6)
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[1]
    found = cotangent(targets.Segment(1, at=(11.5, 35.5)), output)
    assert torch.equal(found, cotangent(targets.Patch(1, 4, one_hot), output))


class Dense(nn.Module):
    """A ViT whose output is a map of classes, (B, K, h, w), at twice the resolution of its patches."""

    def __init__(self):
        super().__init__()
        self.vit = random_vit(img_size=SIZE, num_classes=0, global_pool="", class_token=False)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        logits = self.head(self.vit(images)).mT.unflatten(2, (4, 6))
        return interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


@pytest.mark.filterwarnings("ignore:the frozen route")
@pytest.mark.parametrize("masked", [False, True], ids=["point", "mask"])
def test_mirrored_image_is_explained_at_the_mirrored_place(masked):
    model, images = Dense().eval(), torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    mirrored, plain = (
        dave_fast.DAVE(model, precision="fp64", noise_alpha=0.0, flip=flip, shrink=False, **STILL)
        for flip in (1.0, 0.0)
    )
    mask = torch.zeros(SIZE)
    mask[5:20, 3:15] = 1
    here, there = targets.Segment(1, at=(9, 5)), targets.Segment(1, at=(9, WIDTH - 1 - 5))
    if masked:
        here, there = targets.Segment(1, mask=mask), targets.Segment(1, mask=mask.flip(1))
    found = mirrored.explain(images, here, n_samples=1).raw
    expected = plain.explain(images.flip(3), there, n_samples=1).raw.flip(3)
    assert found.any() and torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (lambda: targets.Segment(1), "give one of them"),
        (lambda: targets.Segment(1, at=(1, 2), mask=torch.ones(SIZE)), "give one of them"),
        (lambda: targets.Segment(-1, at=(1, 2)), "the class"),
        (lambda: targets.Segment(1, at=(1, float("nan"))), "finite"),
        (lambda: targets.Segment(1, at=5), r"\(y, x\)"),
        (lambda: targets.Segment(3, at=(1, 2)), "0 to 2"),
        (lambda: targets.Segment("cat", at=(1, 2)), "give an index"),
        (lambda: targets.Segment(1, at=(32, 2)), "32 rows, 48 columns"),
        (lambda: targets.Segment(1, mask=torch.ones(31, 48)), r"expected \(32, 48\)"),
        (lambda: targets.Segment(1, mask=torch.zeros(SIZE)), "empty"),
        (lambda: targets.Segment(1, mask=-torch.ones(SIZE)), "at least 0"),
        (lambda: targets.Segment(1, mask=torch.full(SIZE, torch.nan)), "at least 0"),
        (lambda: targets.Segment(1, mask="mask.png"), r"a str; expected a tensor or an array \(32, 48\)"),
    ],
)
def test_places_that_are_not_there_are_refused(question, words):
    with pytest.raises(InputError, match=words):
        cotangent(question(), normal(2, CLASSES, 4, 6))


def test_classifier_has_no_places():
    with pytest.raises(InputError, match="segmentation head"):
        cotangent(targets.Segment(1, at=(1, 2)), normal(2, 5))
    with pytest.raises(InputError, match="detections_of"):
        cotangent(targets.Box(1, (1, 2, 3, 4)), normal(2, 5))


# Detections.


def detections(boxes, logits=None):
    """Return an output (1, Q, K + 4) of boxes in pixels."""
    edges = torch.tensor(boxes, dtype=torch.float64)
    shares = torch.cat([(edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]], dim=1)
    shares = shares / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return torch.cat([normal(len(edges), CLASSES) if logits is None else logits, shares], dim=1)[None]


def test_box_is_that_of_the_detection_with_the_largest_overlap():
    output = detections([(0, 0, 10, 10), (20, 4, 40, 28), (22, 2, 44, 30)])
    for question in (
        targets.Box(1, (21, 5, 40, 28)),
        targets.Box(1, torch.tensor([[21.0, 5, 40, 28]])),
        targets.Box(1, query=1),
    ):
        expected = torch.zeros_like(output)
        expected[0, 1, 1] = 1
        assert torch.equal(cotangent(question, output), expected)


def test_tokens_are_no_detections():
    with pytest.raises(InputError, match="widths and heights of at least 0"):
        cotangent(targets.Box(1, (21, 5, 40, 28)), normal(1, 24, 12))


@pytest.mark.parametrize("question", [targets.Segment(1, at=(1, 2)), targets.Patch(0, 0)])
def test_detections_are_no_tokens(yolos, question):
    output = torch.rand(1, 24, CLASSES + 4)
    assert cotangent(question, output).any()
    with pytest.raises(InputError, match="of detections"):
        cotangent(question, output, model=targets.detections_of(yolos))


def test_overlap_is_intersection_over_union_and_zero_of_empty_boxes():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [5, 5, 5, 9], [8, 8, 9, 9]])
    assert overlap(boxes[:1], boxes).tolist() == [1, pytest.approx(4 / 28), 0, 0]


def test_detection_is_followed_through_warps_and_orders(rows):
    """Each row shows the objects of the image where τ moves them, in an order of its own."""
    objects = torch.tensor([[2.0, 3, 12, 13], [20, 6, 36, 16], [30, 18, 46, 30]], dtype=torch.float64)
    unperturbed, seen, orders = detections(objects.tolist()), [], []
    for number, matrix in enumerate(rows.matrices[:24]):
        order = torch.randperm(3, generator=torch.Generator().manual_seed(number))
        corners = torch.stack([objects[:, [i, j]] for i in (0, 2) for j in (1, 3)], dim=1)
        found = torch.stack([torch.stack([moved(c - 0.5, matrix) + 0.5 for c in one]) for one in corners])
        # a detector's boxes, of what is in the frame, a little off
        edges = torch.cat([found.amin(1) + 0.4, found.amax(1) - 0.4], dim=1)
        edges = torch.stack([e.clamp(0, SIZE[1 - i % 2]) for i, e in enumerate(edges.T)], dim=1)
        seen.append(detections(edges[order].tolist())[0])
        orders.append(order.tolist())
    output, part = torch.stack(seen), rows[:24]
    found = cotangent(targets.Box(2, (20, 6, 36, 16)), unperturbed, output, part)
    visible = 0
    for one, order, matrix in zip(found, orders, part.matrices, strict=True):
        centre = moved((27.5, 10.5), matrix)
        if 2 < centre[0] < WIDTH - 2 and 2 < centre[1] < HEIGHT - 2:
            visible += 1
            assert one.nonzero().tolist() == [[order.index(1), 2]]
    assert visible > 12


def test_box_that_has_left_the_frame_counts_nothing():
    still = identity(1)
    away = draw(1, height=HEIGHT, width=WIDTH, sampling=Sampling(**STILL, flip=0.0))
    away.matrices[0] = torch.tensor([[1.0, 0, 60], [0, 1, 0]])
    output = detections([(0, 0, 10, 10), (20, 4, 40, 28)])
    assert cotangent(targets.Box(0, query=1), output, output, still).any()
    assert not cotangent(targets.Box(0, query=1), output, output, away).any()


def test_moved_box_is_the_box_at_rest_and_has_its_sides_turned_by_a_quarter():
    rows = draw(1, height=48, width=48, sampling=Sampling(**STILL, flip=0.0))
    box = torch.tensor([[4.0, 10, 20, 14]], dtype=torch.float64)
    assert torch.equal(moved_boxes(box, rows, (48, 48)), box)
    # destination (x, y) shows source (y, 47 - x)
    rows.matrices[0] = torch.tensor([[0.0, 1, 0], [-1, 0, 47]])
    assert torch.allclose(moved_boxes(box, rows, (48, 48)), torch.tensor([[34.0, 4, 38, 20]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (lambda: targets.Box(1), "give one of them"),
        (lambda: targets.Box(1, (1, 2, 3, 4), query=1), "give one of them"),
        (lambda: targets.Box(1, (1, 2, 3)), "4 finite numbers"),
        (lambda: targets.Box(1, (3, 2, 1, 4)), "left below right"),
        (lambda: targets.Box(1, torch.ones(3, 4)), r"\(1, 4\)"),
        (lambda: targets.Box(1, (40, 1, 47, 4)), "no detection .* overlaps"),
        (lambda: targets.Box(1, query=2), "2 detections"),
        (lambda: targets.Box(3, query=1), "0 to 2"),
    ],
)
def test_boxes_that_are_not_there_are_refused(question, words):
    with pytest.raises(InputError, match=words):
        cotangent(question(), detections([(0, 0, 10, 10), (20, 20, 30, 30)]))


@pytest.fixture(scope="module")
def yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config = YolosConfig(**sizes, image_size=[32, 48], patch_size=8, num_detection_tokens=5, num_labels=3)
    config.id2label = {0: "cat", 1: "dog", 2: "tiger"}
    torch.manual_seed(0)
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        # boxes that differ
        model.bbox_predictor.layers[-1].bias.zero_()
        model.bbox_predictor.layers[-1].weight.mul_(60)
    return model


@pytest.mark.parametrize("loaded", [False, True], ids=["as it is", "as it was loaded"])
def test_detection_of_a_vit_detector_is_explained_by_its_logit(yolos, loaded):
    model = targets.detections_of(load_model(yolos)[0] if loaded else yolos)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        told = yolos(images)
    explain = dave_fast.DAVE(model, precision="fp64", noise_alpha=0.5, route="frozen")
    torch.testing.assert_close(explain.predict(images), torch.cat([told.logits, told.pred_boxes], 2))
    expected = explain.effective_gradient(images, lambda y: y[:, 3, 1])
    found = explain.effective_gradient(images, targets.Box(1, query=3))
    assert relative(found, expected) < EXACT and found.any()
    corner, side = told.pred_boxes[:, 3, :2].double(), told.pred_boxes[:, 3, 2:].double() / 2
    boxes = torch.cat([corner - side, corner + side], 1) * torch.tensor([WIDTH, HEIGHT] * 2)
    assert relative(explain.effective_gradient(images, targets.Box(1, boxes)), expected) < EXACT
    asked = [targets.Box(1, query=3), targets.Contrast(targets.Box(1, query=3), targets.Box(2, query=3))]
    made = explain.explain(images, targets=asked, n_samples=3)
    assert made.raw.isfinite().all() and made.raw.flatten(2).any(2).all() and made.target.unique().tolist() == [-1]
    assert torch.equal(made.maps[:, 0], explain.explain(images, asked[0], n_samples=3).maps)


def test_classes_of_detections_and_segments_go_by_name(yolos):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    explain = dave_fast.DAVE(
        targets.detections_of(load_model(yolos)[0]), precision="fp32", noise_alpha=0.5, route="frozen"
    )
    found = explain.effective_gradient(images, targets.Box("tiger", query=0))
    assert torch.equal(found, explain.effective_gradient(images, targets.Box(2, query=0)))
    sizes = dict(depths=[1] * 4, hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16)
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label={0: "sky", 1: "sea"})).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    explain = dave_fast.DAVE(model, precision="fp32", noise_alpha=0.5, route="frozen")
    found = explain.effective_gradient(images, targets.Segment("sea", at=(30, 10)))
    assert torch.equal(found, explain.effective_gradient(images, targets.Segment(1, at=(30, 10)))) and found.any()
    with pytest.raises(InputError, match="no class"):
        explain.effective_gradient(images, targets.Segment("walrus", at=(30, 10)))


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, images):
        return self.form(images.mean(dim=(2, 3))[:, None, :], images.mean(dim=(2, 3))[:, None, [0, 1, 2, 0]])


@pytest.mark.parametrize(
    "form",
    [lambda a, b: (a, b), lambda a, b: [a, b, None], lambda a, b: {"pred_logits": a, "pred_boxes": b}],
    ids=["tuple", "list", "dictionary"],
)
def test_detector_of_any_return_gives_logits_and_boxes_side_by_side(form):
    images = torch.randn(2, 3, 8, 8)
    found = targets.detections_of(Returns(form))(images)
    mean = images.mean(dim=(2, 3))
    torch.testing.assert_close(found, torch.cat([mean, mean[:, [0, 1, 2, 0]]], 1)[:, None])


def test_module_without_boxes_is_no_detector():
    with pytest.raises(ModelError, match="without logits"):
        targets.detections_of(Returns(lambda a, b: a))(torch.randn(2, 3, 8, 8))
