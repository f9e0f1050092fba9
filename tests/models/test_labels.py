"""Tests of class names: their sources, and the look-up of a target by name."""

import time

import pytest

from dave_fast.errors import InputError
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import Labels, known_labels, labels_of
from dave_fast.models.spec import ModelSpec

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
    assert not isinstance(target, str) or ANIMALS.find(target) == index


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target 5 is out of range: the classes of this model are 0 to 4"),
        ("-1", "out of range"),
        ("crane", r"fits 2 classes: crane \(2\), crane \(3\)"),
        ("tig", r"fits 2 classes: tiger \(0\), tiger cat \(1\)"),
        ("walrus", "no class has it in its name; give an index or another name"),
        ("tiegr", r"no class has it in its name; did you mean tiger \(0\)\?"),
        ("READ PANDA", r"did you mean red panda \(4\)"),
        ("", "empty"),
    ],
)
def test_target_that_fits_no_class_or_several(target, message):
    with pytest.raises(InputError, match=message):
        ANIMALS.resolve(target)
    assert not isinstance(target, str) or ANIMALS.find(target) is None


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


@pytest.mark.parametrize("name", ["labrador retreiver", "x" * 5000, "a " * 5000, "tigr" * 50])
def test_a_hint_among_22_thousand_classes_takes_little_time(name):
    labels = labels_of(Model(21841, {"num_classes": 21841}))
    labels.find(name)
    began = time.process_time()
    with pytest.raises(InputError, match=r"no class has it in its name; (did you mean labrador retriever|give an)"):
        labels.resolve(name)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "name",
    [
        *("demo", "vit_tiny_patch16_224", "timm:deit3_small_patch16_224.fb_in22k_ft_in1k", "vit_small_patch14_dinov2"),
        *("vit_tiny_patch16_224.augreg_in21k", "eva02_tiny_patch14_336", "deit_tiny_distilled_patch16_224"),
        *(
            "vit_tiny_patch16_224.no_such_tag",
            "torchvision:vit_b_16",
            "torchvision:swin_t:IMAGENET1K_V1",
            "hf:some/one",
        ),
    ],
)
def test_what_is_known_without_the_weights_is_what_the_model_has(name):
    known = known_labels(ModelSpec(name))
    if name.startswith("hf:") or "no_such_tag" in name:
        assert known is None
        return
    model, _ = load_model(ModelSpec(name, random_weights=True))
    found = labels_of(model)
    assert known == (found if found.names else None)


def test_names_of_a_file_are_known_and_those_of_another_head_are_not(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    (tmp_path / "weights.pth").touch()
    weights = str(tmp_path / "weights.pth")
    named = ModelSpec("vit_tiny_patch16_224", weights, num_classes=2, labels=str(tmp_path / "names.txt"))
    assert known_labels(named) == Labels(2, ("ant", "bee"))
    assert known_labels(ModelSpec("vit_tiny_patch16_224", weights, num_classes=2)) is None
    assert known_labels(ModelSpec("vit_tiny_patch16_224", weights, num_classes=1000)).count == 1000


def test_replaced_head_has_no_names():
    assert labels_of(Model(7, {"num_classes": 1000})) == Labels(7)
    assert labels_of(Model(1000, {"num_classes": 7})) == Labels(1000)


def test_module_without_configuration():
    assert labels_of(object()) == Labels(None)
    assert labels_of(Model(1000)) == Labels(1000)


def test_descriptions_of_a_hub_model():
    config = {"num_classes": 2, "label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat", "n2": "dog"}}
    assert labels_of(Model(2, config)).names == ("cat", "dog")
