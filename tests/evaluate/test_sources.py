"""Test scenes, image files and annotations: labels, and objects in the model's crop."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from dave_fast.errors import ImageError, InputError
from dave_fast.evaluate import DemoScenes, ImageFiles
from dave_fast.evaluate.annotations import Annotations, Noted, class_of, read_boxes
from dave_fast.images import Preprocessing, from_config
from dave_fast.models.labels import Labels

LABELS = Labels(3, ("cat, house cat", "dog", "tiger"))
XML = """<annotation><size><width>{w}</width><height>{h}</height></size>
<object><name>dog</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>29</xmax><ymax>49</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>50</xmin><ymin>20</ymin><xmax>59</xmax><ymax>29</ymax></bndbox></object></annotation>"""


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "val" / "cat" / "one.JPEG"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (100, 60), "grey").save(path)
    return path


def prepare(size=30, crop=1.0):
    return from_config({"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": crop})


def files(photo, **known):
    return ImageFiles([photo], prepare(), Annotations(LABELS, **known))


def test_scenes_are_a_function_of_seed_and_number():
    whole, part = DemoScenes(5, 9).read(0, 5), DemoScenes(3, 9).read(2, 99)
    assert len(part) == 1
    assert torch.equal(whole.images[2], part.images[0])
    assert part.keys == (2,)
    one, other = DemoScenes(5, 9).read_pairs(0, 2)
    assert torch.equal(one.images, other.images)
    assert (one.labels != other.labels).all()
    assert not (one.masks & other.masks).any()
    assert not torch.equal(DemoScenes(5, 9).pool(3).read(0, 1).images, whole.images[:1])


def test_the_folder_names_the_class(photo):
    found = files(photo).read(0, 1)
    assert found.labels.tolist() == [0]
    assert not found.masks.any()
    assert found.images.shape == (1, 3, 30, 30)


def test_boxes_of_xml_go_through_the_models_own_crop(photo, tmp_path):
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "one.xml").write_text(XML.format(w=100, h=60))
    noted = read_boxes(tmp_path / "xml")
    # the last pixel is inside: columns 10 to 29
    assert noted["one"].boxes[0] == (10, 20, 30, 50)
    found = files(photo, noted=noted).read(0, 1)
    assert found.labels.tolist() == [1]
    # 100×60 is shrunk by 2 to 50×30, of which columns 10 to 39 remain: both boxes lose 10 columns
    expected = torch.zeros(30, 30, dtype=torch.bool)
    expected[10:25, 0:5] = True
    expected[10:15, 15:20] = True
    assert (found.masks[0] ^ expected).sum() == 0


def test_boxes_of_another_resolution_are_scaled_and_of_another_shape_refused(photo, tmp_path):
    (tmp_path / "one.xml").write_text(XML.format(w=200, h=120))
    scaled = Annotations(LABELS, read_boxes(tmp_path)).mask(photo, (100, 60))
    assert scaled[10:25, 5:15].all()
    assert scaled.sum() == 15 * 10 + 5 * 5
    (tmp_path / "one.xml").write_text(XML.format(w=60, h=100))
    source = files(photo, noted=read_boxes(tmp_path))
    assert source.read(0, 1) is None
    assert "60×100" in source.skipped[str(photo)]


def test_boxes_of_csv_and_coco(tmp_path):
    table = tmp_path / "boxes.csv"
    table.write_text("image,xmin,ymin,xmax,ymax,label\nval/one.JPEG,1,2,3,4,tiger\none.JPEG,5,6,7,8,tiger\n")
    (noted,) = read_boxes(table).values()
    assert noted.boxes == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert noted.label == "tiger"
    coco = {
        "images": [{"id": 1, "file_name": "one.jpg", "width": 9, "height": 9}, {"id": 2, "file_name": "two.jpg"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2]},
            {"image_id": 1, "category_id": 8, "bbox": [1, 1, 4, 3]},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    noted = read_boxes(tmp_path / "coco.json")
    assert set(noted) == {"one"}
    assert (noted["one"].boxes, noted["one"].label, noted["one"].size) == (((1, 1, 5, 4),), "dog", (9, 9))


def test_boxes_of_a_json_list_are_those_of_the_same_xml(photo, tmp_path):
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "one.xml").write_text(XML.format(w=100, h=60))
    one = {"file": "cat/one.JPEG", "width": 100, "height": 60, "boxes": [[10, 20, 30, 50], [50, 20, 60, 30]]}
    (tmp_path / "boxes.json").write_text(json.dumps([one]))
    listed = files(photo, noted=read_boxes(tmp_path / "boxes.json")).read(0, 1)
    assert torch.equal(listed.masks, files(photo, noted=read_boxes(tmp_path / "xml")).read(0, 1).masks)
    # without a label of its own, the folder's name is the class
    assert listed.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("boxes.json", '[{"file": "a.jpg", "boxes": [[1, 2, 3]]}]', "list of objects with file, boxes"),
        ("boxes.csv", "image,left\na,1\n", "columns image, xmin"),
        ("boxes.csv", "image,xmin,ymin,xmax,ymax\na,1,2,three,4\n", "three"),
        ("boxes.json", "{}", "COCO"),
        ("boxes.json", "null", "COCO"),
        ("boxes.json", '[{"file": "a.jpg", "boxes": [[NaN, 2, 3, 4]]}]', "not finite"),
        ("boxes.json", '[{"file": "a.jpg", "boxes": [], "label": ["cat"]}]', "no text"),
        ("boxes.json", '[{"file": "a.jpg", "boxes": [], "width": 0, "height": 9}]', "width and height"),
        ("boxes.json", '[{"file": "a.jpg", "boxes": [], "width": 1e999, "height": 9}]', "inf and 9; expected whole"),
        ("boxes.csv", "image,xmin,ymin,xmax,ymax\na,1,2,inf,4\n", "not finite"),
        ("boxes.txt", "", "folder of XML"),
        ("broken.xml", "<annotation>", "PASCAL"),
        (
            "broken.xml",
            "<a><object><name>cat</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></a>",
            "not finite",
        ),
        (
            "broken.xml",
            "<a><object><name>cat</name><bndbox><xmin>1e400</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></a>",
            "not finite",
        ),
        (
            "broken.xml",
            "<a><object><name>cat</name><bndbox><xmin></xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></a>",
            "could not convert",
        ),
        ("broken.xml", "<a><size><width>1e3</width></size></a>", "invalid literal"),
        ("boxes.json", "[" * 100_000, "no JSON"),
        ("boxes.json", "[" + "9" * 5000 + "]", "no JSON"),
        (
            "boxes.json",
            '[{"file": "a/1.jpg", "boxes": []}, {"file": "b/1.jpg", "boxes": []}]',
            "two images of one name",
        ),
        ("boxes.json", '[{"file": "1.jpg", "boxes": []}, {"file": "1.jpg", "boxes": []}]', "listed twice"),
        ("boxes.csv", "image,xmin,ymin,xmax,ymax\na/1.jpg,1,2,3,4\nb/1.jpg,1,2,3,4\n", "two images of one name"),
        ("boxes.csv", "image,xmin,ymin,xmax,ymax\n,1,2,3,4\n", "boxes.csv"),
        ("empty", None, "holds no XML"),
    ],
)
def test_invalid_annotations_are_refused_by_name(tmp_path, name, content, said):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        read_boxes(tmp_path if path.suffix == ".xml" else path)


HEAD = "image,xmin,ymin,xmax,ymax,label\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('a.jpg,1,2,3,4,"dog\nb.jpg,1,2,3,4,cat\n', "lines 2 to 3: .*unexpected end of data"),
        ('a.jpg,1,2,3,4,dog\nb.jpg,1,2,3,4,"dog\nc.jpg,1,2,3,4,"cat"\n', "lines 3 to 4: .*expected after"),
        ('"a.jpg,1,2,3,4,dog\n', "line 2: .*each quote closed"),
        ("a.jpg,1,2,3,4,dog\nb.jpg,1,2,3,4," + 200_000 * "x", "line 3: .*field larger"),
        ("a.jpg,1,2,3,4,dog\n\n\nb.jpg,1,2,three,4,dog\n", "line 5: .*three"),
        ("a.jpg,1,2,3,4,dog\nb.jpg,1,2,3\n", "line 3: .*expected the columns"),
        ("a.jpg,1,2,3,4,dog\n,1,2,3,4,dog\n", "line 3: .*empty name"),
        ("a.jpg,1,2,3,4,dog\nb.jpg,3,2,1,4,dog\n", "line 3: .*ends before it begins"),
        ("a/1.jpg,1,2,3,4,dog\nb/1.jpg,1,2,3,4,dog\n", "line 3: .*two images of one name"),
    ],
    ids=range(9),
)
def test_errors_of_a_csv_name_the_line(tmp_path, rows, said):
    (tmp_path / "boxes.csv").write_text(HEAD + rows)
    with pytest.raises(InputError, match=f"boxes.csv, {said}"):
        read_boxes(tmp_path / "boxes.csv")


@pytest.mark.parametrize("encoding", ["foo", "rot13", "base64", "hex", "zip", "mbcs"])
def test_encodings_of_xml_that_cannot_be_are_refused(tmp_path, encoding):
    (tmp_path / "one.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?><a>é</a>', encoding="utf-8")
    with pytest.raises(InputError, match="PASCAL VOC"):
        read_boxes(tmp_path)


SIZES = [0, -1, 0.5, 9.5, math.nan, math.inf, -math.inf, 2**31, 10**400, 1e308, True, "9", None]


@pytest.mark.parametrize("side", SIZES, ids=lambda side: str(side)[:9])
@pytest.mark.parametrize("as_height", [False, True], ids=["width", "height"])
@pytest.mark.parametrize("form", ["coco", "list"])
def test_a_size_that_is_no_whole_number_is_refused(tmp_path, form, as_height, side):
    size = dict(zip(("width", "height"), (9, side) if as_height else (side, 9), strict=True))
    one = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
    content = {
        "coco": {"images": [{"id": 1, "file_name": "a.jpg", **size}], "annotations": [one]},
        "list": [{"file": "a.jpg", "boxes": [[0, 0, 2, 2]], **size}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content[form]))
    with pytest.raises(InputError, match="expected whole numbers from 1 to 2147483647") as caught:
        read_boxes(tmp_path / "boxes.json")
    assert str(side)[:50] in str(caught.value) and len(str(caught.value)) < 500


def test_a_size_of_400_digits_in_xml_is_refused(tmp_path):
    (tmp_path / "one.xml").write_text(XML.format(w="9" * 400, h="9" * 400))
    with pytest.raises(InputError, match="expected whole numbers from 1"):
        read_boxes(tmp_path)


@pytest.mark.parametrize("side", [math.nan, math.inf, -math.inf, 1e308, -1e308, 2**31, -(2**31), 10**400])
@pytest.mark.parametrize("place", range(4))
def test_sides_of_boxes_are_finite_and_bounded(place, side):
    box = [0, 0, 9, 9]
    box[place] = side
    with pytest.raises(ValueError, match="not finite, or reaches beyond"):
        Noted((tuple(box),))


@pytest.mark.parametrize("box", [(3, 2, 1, 4), (1, 4, 3, 2), (3, 4, 1, 2), (0, 0, -1e-9, 0)], ids=str)
@pytest.mark.parametrize("beside", [(), ((0, 0, 99, 99),)], ids=["alone", "beside a larger one of another class"])
@pytest.mark.parametrize("form", ["coco", "list", "csv", "xml"])
def test_boxes_that_end_before_they_begin_are_refused(tmp_path, form, beside, box):
    boxes = [(0, *box), *((1, *each) for each in beside)]
    path = tmp_path / ("boxes.csv" if form == "csv" else "boxes.json")
    if form == "coco":
        noted = [{"image_id": 1, "category_id": c, "bbox": [x, y, r - x, b - y]} for c, x, y, r, b in boxes]
        images = [{"id": 1, "file_name": "a.jpg"}]
        categories = [{"id": number, "name": str(number)} for number in range(2)]
        path.write_text(json.dumps({"images": images, "annotations": noted, "categories": categories}))
    elif form == "list":
        path.write_text(json.dumps([{"file": "a.jpg", "boxes": [each[1:] for each in boxes]}]))
    elif form == "csv":
        path.write_text(HEAD + "".join(f"a.jpg,{x},{y},{r},{b},{c}\n" for c, x, y, r, b in boxes))
    else:
        path = tmp_path
        sides = "<xmin>{1}</xmin><ymin>{2}</ymin><xmax>{3}</xmax><ymax>{4}</ymax>"
        # in this format the last pixel is inside
        objects = [(c, x, y, r - 1, b - 1) for c, x, y, r, b in boxes]
        texts = [f"<object><name>{{0}}</name><bndbox>{sides}</bndbox></object>".format(*each) for each in objects]
        (tmp_path / "a.xml").write_text(f"<annotation>{''.join(texts)}</annotation>")
    with pytest.raises(InputError, match="ends before it begins: expected xmin"):
        read_boxes(path)


@pytest.mark.parametrize("names", [("1", "a/1", "b/1"), ("1", "b/1", "a/1"), ("a/1", "x/a/1", "y/a/1")], ids=str)
@pytest.mark.parametrize("form", ["csv", "xml"])
def test_images_of_one_name_are_found_behind_a_shorter_path(tmp_path, names, form):
    if form == "csv":
        (tmp_path / "boxes.csv").write_text(HEAD + "".join(f"{name}.jpg,1,2,3,4,dog\n" for name in names))
    for name in names if form == "xml" else ():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.xml").write_text(XML.format(w=9, h=9))
    with pytest.raises(InputError, match="two images of one name"):
        read_boxes(tmp_path / "boxes.csv" if form == "csv" else tmp_path)


@pytest.mark.parametrize("name", ["boxes.json", "boxes.csv", "folder/one.xml"])
def test_annotations_that_are_a_named_pipe_are_refused_at_once(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(InputError, match="named pipe"):
        read_boxes(path if path.parent == tmp_path else path.parent)


def test_boxes_of_several_classes_are_those_of_the_largest(tmp_path):
    def objects(boxes):
        return "".join(
            f"<object><name>{name}</name><bndbox>"
            + "".join(
                f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            )
            + "</bndbox></object>"
            for name, box in boxes
        )

    given = [("cat", (0, 0, 3, 3)), ("dog", (1, 1, 4, 3)), ("cat", (5, 5, 7, 7))]
    (tmp_path / "one.xml").write_text(f"<annotation>{objects(given)}</annotation>")
    lines = [f"one.jpg,{x},{y},{right + 1},{bottom + 1},{name}" for name, (x, y, right, bottom) in given]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,label", *lines]))
    for path in (tmp_path, tmp_path / "boxes.csv"):
        (one,) = read_boxes(path).values()
        assert (one.label, one.boxes) == ("cat", ((0, 0, 4, 4), (5, 5, 8, 8)))


@pytest.mark.parametrize("names", [[], [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]])
def test_coco_categories_of_one_name_or_none_are_kept_apart(tmp_path, names):
    boxes = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]},
        {"image_id": 1, "category_id": 2, "bbox": [1, 1, 2, 2]},
    ]
    content = {"images": [{"id": 1, "file_name": "one.jpg"}], "annotations": boxes, "categories": names}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert read_boxes(tmp_path / "coco.json")["one"].boxes == ((0, 0, 5, 5),)


@pytest.mark.parametrize("annotated", ["boxes", "masks"])
def test_photographs_of_one_name_are_refused_where_it_has_an_object(photo, tmp_path, annotated):
    other = tmp_path / "other" / photo.name
    other.parent.mkdir()
    other.write_bytes(photo.read_bytes())
    (tmp_path / f"{photo.stem}.png").touch()
    annotations = {
        "boxes": Annotations(LABELS, {photo.stem: Noted(((0, 0, 1, 1),))}),
        "masks": Annotations(LABELS, masks=tmp_path),
    }
    with pytest.raises(InputError, match="have one name"):
        ImageFiles([photo, other], prepare(), annotations[annotated])
    assert len(ImageFiles([photo, other], prepare(), Annotations(LABELS))) == 2


def test_masks_are_files_of_the_same_name(photo, tmp_path):
    mask = np.zeros((60, 100), np.uint8)
    mask[20:40, 30:60] = 7
    Image.fromarray(mask).save(tmp_path / "one.png")
    found = files(photo, masks=tmp_path).read(0, 1)
    assert found.masks[0, 10:20, 5:20].all()
    assert found.masks.sum() == 150
    Image.fromarray(mask[:30]).save(tmp_path / "one.png")
    source = files(photo, masks=tmp_path)
    assert source.read(0, 1) is None
    assert "100×30" in str(source.skipped)


def test_a_broken_file_is_left_out_and_named(photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    source = ImageFiles([broken, photo], prepare(), Annotations(LABELS))
    found = source.read(0, 2)
    assert found.names == ("one.JPEG",)
    assert found.keys == (1,)
    assert list(source.skipped) == [str(broken)]


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (2, 9000), (1, 60_000)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.5, 0.9])
def test_a_thin_photograph_and_its_box_fit_within_a_border(tmp_path, mean, size):
    Image.new("RGB", size, "white").save(tmp_path / "one.png")
    within = from_config({"input_size": (3, 30, 30), "crop_mode": "border", "mean": (mean,) * 3, "std": (1,) * 3})
    annotations = Annotations(LABELS, {"one": Noted(((0, 0, *size),))})
    found = ImageFiles([tmp_path / "one.png"], within, annotations).read(0, 1)
    # the border is of the mean's colour
    assert found.masks[0].any() and torch.equal(found.masks[0], found.images[0, 0] > 0.05)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 3_000_000)], ids=str)
@pytest.mark.parametrize("shape", [(224, 224), (224, 160)], ids=str)
def test_a_thin_photograph_that_would_grow_without_end_is_left_out(photo, tmp_path, size, shape):
    Image.new("1", size).save(tmp_path / "thin.png")
    whole = from_config({"input_size": (3, *shape), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    source = ImageFiles([tmp_path / "thin.png", photo], whole, Annotations(LABELS))
    assert source.read(0, 2).names == ("one.JPEG",)
    assert "less thin" in source.skipped[str(tmp_path / "thin.png")]


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(36, "File name too long"), ImageError("it is damaged")], ids=repr
)
def test_what_preparing_a_photograph_raises_leaves_it_out(photo, monkeypatch, error):
    source, seen = ImageFiles([photo, photo], prepare(), Annotations(LABELS)), []

    def crop(self, image, **limits):
        seen.append(image)
        if len(seen) == 1:
            raise error
        return np.zeros((30, 30, 3), np.uint8)

    monkeypatch.setattr(Preprocessing, "crop", crop)
    assert source.read(0, 2).keys == (1,)
    assert list(source.skipped.values()) == [str(error) or "MemoryError"]


@pytest.mark.parametrize(
    "error", [TypeError("ours"), AttributeError("ours"), ValueError("ours"), KeyError("ours")], ids=repr
)
def test_errors_of_our_own_are_not_hidden(photo, monkeypatch, error):
    def crop(self, image, **limits):
        raise error

    monkeypatch.setattr(Preprocessing, "crop", crop)
    with pytest.raises(type(error), match="ours"):
        files(photo).read(0, 1)


def worded_by(library):
    if library == "torchvision":
        from torchvision.models import ViT_B_16_Weights

        return tuple(ViT_B_16_Weights.DEFAULT.meta["categories"])
    return tuple(ImageNetInfo("imagenet-1k").label_descriptions())


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_wordnet_ids_are_classes_of_models_with_imagenets_names(library):
    imagenet = Labels(1000, worded_by(library))
    assert [class_of(name, imagenet) for name in ("n01518878", "n02129604", "n04285008")] == [9, 292, 817]
    others = (None, tuple(map(str, range(1000))), imagenet.names[::-1], ("tench", *imagenet.names[:-1]))
    assert {class_of("n02129604", Labels(1000, names)) for names in others} == {None}
    assert class_of("n02129604", LABELS) is None
    assert class_of("dog", LABELS) == 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("mark", [1, 7, 200])
def test_mask_holds_labels_of_any_depth(photo, tmp_path, kind, mark):
    mask = np.zeros((60, 100), kind)
    mask[20:40, 30:60] = mark
    # Pillow opens a file of this name by its content.
    Image.fromarray(mask).save(tmp_path / "one.png", format="TIFF")
    assert files(photo, masks=tmp_path).read(0, 1).masks.sum() == 150


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_mask_is_turned_upright(photo, tmp_path, kind):
    mask = np.zeros((60, 100), kind)
    mask[20:40, 30:60] = 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(mask))).save(tmp_path / "one.png", exif=exif)
    found = files(photo, masks=tmp_path).read(0, 1)
    assert found.masks[0, 10:20, 5:20].all() and found.masks.sum() == 150
