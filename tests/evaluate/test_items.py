"""Photographs and mosaics one by one: their scores are those of the metrics, and both forms of boxes give them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.errors import InputError
from dave_fast.evaluate import items, metrics, rows
from dave_fast.evaluate.annotations import Annotations, read_boxes
from dave_fast.evaluate.methods import MethodSettings
from dave_fast.evaluate.mosaics import resized
from dave_fast.evaluate.sources import Examples, ImageFiles
from dave_fast.images import preprocessing
from dave_fast.models.labels import labels_of
from tests.tiny import named_vit

SETUP = MethodSettings(2, {"noise_alpha": 0.5})
NAMES = ("red", "green", "blue", "grey")
XML = """<annotation><size><width>32</width><height>32</height></size><object><name>{name}</name>
<bndbox><xmin>8</xmin><ymin>4</ymin><xmax>23</xmax><ymax>19</ymax></bndbox></object></annotation>"""


@pytest.fixture(scope="module")
def model():
    return named_vit(NAMES).requires_grad_(False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, model):
    """Eight drawn photographs of four classes, with boxes in both forms."""
    folder = tmp_path_factory.mktemp("photographs")
    generator, listed = np.random.default_rng(0), []
    (folder / "xml").mkdir()
    for number in range(8):
        name = NAMES[number % 4]
        pixels = generator.integers(0, 90, (32, 32, 3), dtype=np.uint8)
        pixels[4:20, 8:24, number % 4 % 3] = 250
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / "xml" / f"{number}.xml").write_text(XML.format(name=name))
        listed.append({"file": f"{number}.png", "label": name, "boxes": [[8, 4, 24, 20]]})
    (folder / "boxes.json").write_text(json.dumps(listed))
    files = sorted(folder.glob("*.png"))
    known = [Annotations(labels_of(model), read_boxes(folder / name)) for name in ("xml", "boxes.json")]
    return [ImageFiles(files, preprocessing(model), each).read(0, 8) for each in known]


def frozen(model):
    return rows.single(model, "frozen gradient", SETUP, 0)


def test_both_forms_of_boxes_give_the_scores_of_the_metrics(model, drawn):
    ours, theirs = (items.photographs(each, 3) for each in drawn)
    assert [each.name for each in ours] == ["0.png", "1.png", "2.png"]
    assert ours[1].mask.sum() == 256 and ours[1].classes.tolist() == [1]
    found = items.localise(ours[1], frozen(model))["frozen gradient"]
    maps = frozen(model)(ours[1].image, ours[1].classes, 1)["frozen gradient"]
    for metric, function in (("EnergyPG", metrics.energy_pointing_game), ("pointing game", metrics.pointing_game)):
        wanted = {variant: function(each, drawn[0].masks[1:2]).item() for variant, each in maps.items()}
        assert found[metric] == wanted
    assert items.localise(theirs[1], frozen(model))["frozen gradient"] == found


def test_a_mosaic_is_explained_for_every_class_that_occurs_once(model, drawn):
    (mosaic,) = items.mosaics(drawn[0], 2, 1, 0)
    assert mosaic.image.shape == (1, 3, 64, 64) and mosaic.cells.tolist() == [0, 1, 2, 3]
    large = resized(model, (64, 64))
    (scored,) = items.localise(mosaic, frozen(large)).values()
    maps = frozen(large)(mosaic.image, mosaic.classes, 0)["frozen gradient"]["smoothed"]
    wanted = metrics.grid_pointing_game(maps, mosaic.cells, 2).mean().item()
    assert scored["GridPG 2x2"]["smoothed"] == pytest.approx(wanted)
    none = Examples(drawn[0].images, drawn[0].labels, torch.zeros_like(drawn[0].masks), drawn[0].names, drawn[0].keys)
    assert items.photographs(none, 3) == []
    with pytest.raises(InputError, match="neither an object nor cells"):
        items.localise(items.Item("nothing", 0, mosaic.image, mosaic.classes), frozen(large))


def test_behaviour_of_a_gradient_and_of_a_control(model, drawn):
    item, *others = items.of_all_classes(drawn[0], 4, 0)
    assert {int(each.classes) for each in (item, *others)} == {0, 1, 2, 3}
    uniform = rows.single(model, "uniform", SETUP, 0)
    (flat,), (slope,) = (items.behave(model, item, each).values() for each in (uniform, frozen(model)))
    assert set(slope) == {"dave curve", "rise-deletion curve", "rise-insertion curve", "stability", "class similarity"}
    # two uniform maps are equal whatever the class; a constant map has no correlation as it is
    assert flat["class similarity"]["smoothed"] == pytest.approx(1)
    assert np.isnan(flat["class similarity"]["as it is"])
    assert slope["class similarity"]["as it is"] < 0.95 < slope["stability"]["as it is"]


def test_a_gradient_forgets_the_map_as_the_model_is_randomised(model, drawn):
    item = items.photographs(drawn[0], 1)[0]
    changed = list(items.randomised(model, 3))
    assert len(changed) == 4
    assert not torch.equal(changed[0].head.weight, model.head.weight)
    assert torch.equal(changed[0].blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert not torch.equal(changed[3].pos_embed, model.pos_embed)
    (scored,) = items.resemble([frozen(each) for each in changed], item, frozen(model)).values()
    assert scored["random model"]["as it is"] < 0.9
    (same,) = items.resemble([frozen(model)], item, frozen(model)).values()
    assert same["random model"]["as it is"] == pytest.approx(1)
