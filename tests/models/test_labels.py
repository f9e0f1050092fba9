"""Tests of class names: their sources, and the look-up of a target by name."""

import pytest

from dave_fast.errors import InputError
from dave_fast.models.labels import Labels, labels_of

ANIMALS = Labels(5, ("tiger, Panthera tigris", "tiger cat", "crane", "crane", "lesser panda, red panda, panda"))


class Model:
    def __init__(self, num_classes, config=None):
        self.num_classes = num_classes
        self.pretrained_cfg = config


def test_name_is_the_first_synonym():
    assert ANIMALS.name(0) == "tiger"
    assert ANIMALS.name(4) == "lesser panda"
    assert Labels(3).name(2) == "class 2"


@pytest.mark.parametrize(
    ("target", "index"),
    [
        (3, 3),
        ("3", 3),
        (" 0 ", 0),
        ("tiger", 0),
        ("TIGER CAT", 1),
        ("red panda", 4),
        ("panthera", 0),
        ("lesser", 4),
    ],
)
def test_target(target, index):
    assert ANIMALS.resolve(target) == index


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target 5 is out of range: the classes of this model are 0 to 4"),
        ("-1", "out of range"),
        ("crane", r"fits 2 classes: crane \(2\), crane \(3\)"),
        ("tig", r"fits 2 classes: tiger \(0\), tiger cat \(1\)"),
        ("walrus", "no class has it in its name"),
        ("", "empty"),
    ],
)
def test_target_that_fits_no_class_or_several(target, message):
    with pytest.raises(InputError, match=message):
        ANIMALS.resolve(target)


def test_long_lists_are_cut():
    many = Labels(20, tuple(f"thing {i}" for i in range(20)))
    with pytest.raises(InputError, match=r"fits 20 classes: thing 0 \(0\).* and 12 more"):
        many.resolve("thing")


def test_without_names_an_index_is_needed():
    assert Labels(None).resolve(1000) == 1000
    with pytest.raises(InputError, match="have no names; give an index"):
        Labels(10).resolve("tiger")


def test_demo():
    from dave_fast.models.demo.model import PREPROCESSING

    labels = labels_of(Model(10, PREPROCESSING))
    assert labels.resolve("seven") == 7 and labels.name(0) == "zero"


def test_imagenet():
    labels = labels_of(Model(1000, {"num_classes": 1000}))
    assert labels.name(292) == "tiger" and labels.resolve("tiger") == 292
    assert labels.resolve("red panda") == 387


def test_imagenet_of_12_thousand_classes():
    labels = labels_of(Model(11821, {"num_classes": 11821}))
    assert labels.names is not None and len(labels.names) == 11821


def test_replaced_head_has_no_names():
    assert labels_of(Model(7, {"num_classes": 1000})) == Labels(7)
    assert labels_of(Model(1000, {"num_classes": 7})) == Labels(1000)


def test_module_without_configuration():
    assert labels_of(object()) == Labels(None)
    assert labels_of(Model(1000)) == Labels(1000)


def test_descriptions_of_a_hub_model():
    config = {"num_classes": 2, "label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat", "n2": "dog"}}
    assert labels_of(Model(2, config)).names == ("cat", "dog")
