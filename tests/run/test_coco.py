"""Tests of evidence regions and of the COCO annotations made of them, in the pixels of photographs."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

import dave_fast
from dave_fast.images.geometry import Geometry
from dave_fast.run.export import export
from dave_fast.run.export.regions import box_of, on_photograph, packed, run_lengths, smallest_region
from tests.run import made


def unpacked(text):
    """Return the run lengths of COCO's compressed text, read character by character."""
    lengths, at = [], 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[at]) - 48
            value |= (code & 31) << shift
            shift, more, at = shift + 5, bool(code & 32), at + 1
        if code & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths


def mask_of(segmentation):
    """Return the mask of a COCO segmentation, bool (H, W)."""
    height, width = segmentation["size"]
    lengths = unpacked(segmentation["counts"])
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


# Regions


def test_region_is_the_smallest_set_that_holds_the_share():
    heat = np.array([[4, 3], [2, 1]], np.float32)
    found = [smallest_region(heat, share).ravel().tolist() for share in (0.1, 0.4, 0.41, 0.7, 0.95, 1)]
    assert [sum(each) for each in found] == [1, 1, 2, 2, 4, 4]
    assert found[2] == [True, True, False, False]


def test_pixels_without_evidence_are_in_no_region_and_no_evidence_makes_none():
    heat = np.zeros((3, 3), np.float32)
    assert not smallest_region(heat, 1).any()
    heat[1, 1] = 0.5
    assert smallest_region(heat, 1).sum() == 1


def test_of_equal_values_the_first_are_taken():
    assert np.argwhere(smallest_region(np.ones((2, 4), np.float32), 0.5)).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_run_lengths_go_down_the_columns_and_begin_outside():
    assert run_lengths(np.array([[1, 0], [1, 1]], bool)).tolist() == [0, 2, 1, 1]
    assert run_lengths(np.array([[0, 0], [1, 0]], bool)).tolist() == [1, 1, 2]
    assert run_lengths(np.zeros((2, 3), bool)).tolist() == [6]


# by hand: 6 is "6"; 100 = 3·32 + 4 is "T3", since the sixth bit of the first group says that a second follows
@pytest.mark.parametrize(
    ("lengths", "text"), [([6], "6"), ([100], "T3"), ([0, 2, 1, 1], "021O"), ([16], "`0"), ([5, 5, 5, 5, 5], "55500")]
)
def test_packed_text(lengths, text):
    assert packed(np.array(lengths)) == text and unpacked(text) == lengths


def test_packed_text_of_random_masks_is_read_back():
    numbers = np.random.default_rng(0)
    for _ in range(50):
        mask = numbers.random(numbers.integers(1, 90, 2)) < numbers.random()
        lengths = run_lengths(mask)
        assert unpacked(packed(lengths)) == lengths.tolist()
    large = np.array([10**8, 3, 1, 10**8, 10**7, 1])
    assert unpacked(packed(large)) == large.tolist()


CONFIGS = [
    {"crop_pct": 0.9, "crop_mode": "center"},
    {"crop_pct": 1.0, "crop_mode": "squash"},
    {"crop_pct": 1.0, "crop_mode": "border", "mean": (0, 0, 0)},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (31, 23)], ids=str)
def test_region_of_a_bright_spot_lies_on_the_spot_of_the_photograph(config, size):
    """A spot in a photograph is found by the crop that the model sees; its region lies where the spot is."""
    geometry = Geometry.from_config(
        {"input_size": (3, 64, 64), "mean": (0, 0, 0), "interpolation": "bilinear"} | config
    )
    width, height = size
    x, y, wide, high = width // 2 - width // 5, height // 2, width // 6, height // 5
    photograph = Image.new("RGB", size)
    photograph.paste((255, 255, 255), (x, y, x + wide, y + high))
    heat = np.asarray(geometry.crop(photograph), np.float32)[..., 0]
    mask = on_photograph(heat > 127, geometry.seen(width, height), width, height)
    assert mask.shape == (height, width)
    # to half a pixel of the map
    slack = 1 + max(width, height) / 64
    found = box_of(mask)
    wanted = [x, y, wide, high]
    assert max(abs(one - two) for one, two in zip(found, wanted, strict=True)) <= slack


def test_a_photograph_smaller_than_its_map_keeps_a_single_pixel_of_evidence():
    region = np.zeros((64, 64), bool)
    for place in (0, 13, 63):
        region[:] = False
        region[place, place] = True
        mask = on_photograph(region, (0, 0, 5, 7), 5, 7)
        assert np.argwhere(mask).tolist() == [[int((place + 0.5) * 7 / 64), int((place + 0.5) * 5 / 64)]]


def test_a_region_outside_of_the_photograph_is_empty():
    region = np.zeros((8, 8), bool)
    region[0] = True
    assert not on_photograph(region, (0, -4, 8, 4), 8, 4).any()


# Annotations


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return made.scenes(tmp_path_factory.mktemp("photos"), 3, (120, 80))


def exported(tmp_path, rows, share=0.5, missing=0, **settings):
    made.make_run(tmp_path / "run", rows, **settings)
    assert export(dave_fast.open_maps(tmp_path / "run"), "coco", tmp_path / "coco", share=share) == missing
    return json.loads((tmp_path / "coco/labels.json").read_text())


def test_annotation_is_the_region_in_the_photographs_pixels(photos, tmp_path):
    heat = np.zeros((16, 16), np.float32)
    heat[4:8, 2:6] = 1
    row = {"id": "a/1", "uri": str(photos[0]), "map": heat, "target": 4, "prediction": 5, "probability": 0.25}
    found = exported(tmp_path, [row], share=1)
    (image,), (annotation,) = found["images"], found["annotations"]
    assert (image["width"], image["height"], image["file_name"]) == (120, 80, str(photos[0]))
    # 16 pixels of the map are the 80 rows, and the middle 80 of the 120 columns
    assert annotation["bbox"] == [20 + 10, 20, 20, 20] and annotation["area"] == 400
    mask = mask_of(annotation["segmentation"])
    assert mask.sum() == 400 and mask[20:40, 30:50].all()
    assert (annotation["category_id"], annotation["score"], annotation["image_id"]) == (4, 0.25, image["id"])
    assert found["categories"] == [{"id": 4, "name": "digit 4"}] and annotation["prediction"] == "digit 5"
    assert "holds 1 of the sum" in found["info"]["description"]


def test_a_larger_share_is_a_larger_region(photos, tmp_path):
    areas = []
    for share in (0.2, 0.5, 0.9):
        row = {"id": "a", "uri": str(photos[0]), "map": made.blob(16, 0.5, 0.5, 0.2)}
        areas.append(exported(tmp_path / str(share), [row], share)["annotations"][0]["area"])
    assert areas == sorted(set(areas))


def test_heatmap_covers_the_photograph_and_is_zero_where_the_model_saw_nothing(photos, tmp_path):
    row = {"id": "a", "uri": str(photos[0]), "map": np.ones((16, 16), np.float32)}
    (annotation,) = exported(tmp_path, [row])["annotations"]
    with Image.open(tmp_path / "coco" / annotation["heatmap"]) as picture:
        assert picture.mode == "L" and picture.size == (24, 16)
        values = np.asarray(picture)
    assert (values[:, 4:20] == 255).all() and not values[:, :4].any() and not values[:, 20:].any()


def test_records_of_one_photograph_are_annotations_of_one_image(photos, tmp_path):
    rows = [{"id": str(number), "uri": str(photos[0])} for number in range(3)]
    found = exported(tmp_path, rows)
    assert len(found["images"]) == 1 and [each["record"] for each in found["annotations"]] == ["0", "1", "2"]
    assert [each["id"] for each in found["annotations"]] == [1, 2, 3]


def test_a_map_without_evidence_is_an_image_without_annotation(photos, tmp_path):
    rows = [{"id": str(number), "uri": str(photos[number])} for number in range(2)]
    rows[0]["map"] = np.zeros((16, 16), np.float32)
    found = exported(tmp_path, rows)
    assert len(found["images"]) == 2 and [each["record"] for each in found["annotations"]] == ["1"]


def test_a_probability_that_there_is_not_is_no_score(photos, tmp_path):
    (annotation,) = exported(tmp_path, [{"id": "a", "uri": str(photos[0]), "probability": None}])["annotations"]
    assert "score" not in annotation


def test_a_photograph_in_a_tar_is_copied(photos, tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        content = photos[0].read_bytes()
        member = tarfile.TarInfo("a.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    found = exported(tmp_path, [{"id": "in/a", "uri": f"tar://a.png::{tmp_path / 'in.tar'}"}])
    (image,) = found["images"]
    with Image.open(tmp_path / "coco/data" / image["file_name"]) as copy, Image.open(photos[0]) as photo:
        assert (np.asarray(copy) == np.asarray(photo)).all()


def test_a_turned_photograph_is_annotated_upright(photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photos[0]) as photo:
        photo.save(tmp_path / "turned.jpg", exif=exif)
    (image,) = exported(tmp_path, [{"id": "a", "uri": str(tmp_path / "turned.jpg")}])["images"]
    assert (image["width"], image["height"]) == (80, 120)


def test_odd_ids_make_heatmaps_inside_of_the_folder(photos, tmp_path):
    rows = [{"id": name, "uri": str(photos[0])} for name in ("../../x", "A", "a", "ä/ö", "")]
    found = exported(tmp_path, rows)
    paths = [(tmp_path / "coco" / each["heatmap"]).resolve() for each in found["annotations"]]
    assert len(set(paths)) == 5 and all(path.is_relative_to(tmp_path / "coco/heatmaps") for path in paths)
    assert all(path.is_file() for path in paths)
