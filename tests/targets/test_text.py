"""Tests of targets as text: every form of the grammar, names that contain its signs, and errors."""

import numpy as np
import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.models.labels import Labels
from dave_fast.targets import Box, Class, Contrast, Patch, Segment, SimilarTo, Sum, Text
from dave_fast.targets.text import describe_target, parse_target

NAMES = ("tiger, Panthera tigris", "lion", "three-toed sloth, ai", "T-shirt", "shirt", "T", "toed sloth", "three")
LABELS = Labels(len(NAMES), NAMES)


def same(a, b):
    """Return whether two questions are equal; `Sum`, which compares by identity, is compared by its parts."""
    if isinstance(a, Sum):
        return isinstance(b, Sum) and all(map(same, a.parts, b.parts))
    if isinstance(a, Contrast):
        return isinstance(b, Contrast) and same(a.this, b.this) and same(a.that, b.that)
    return a == b


@pytest.mark.parametrize(
    ("text", "expected", "words"),
    [
        ("1", Class(1), "lion"),
        (" lion ", Class(1), "lion"),
        ("tiger+lion", Sum(Class(0), Class(1)), "tiger + lion"),
        ("tiger - lion", Contrast(Class(0), Class(1)), "tiger − lion"),
        ("0-1", Contrast(Class(0), Class(1)), "tiger − lion"),
        ("0+1-4-5", Contrast(Sum(Class(0), Class(1)), Sum(Class(4), Class(5))), "tiger + lion − shirt − T"),
        ("0-1+4", Contrast(Sum(Class(0), Class(4)), Class(1)), "tiger + shirt − lion"),
        ("three-toed sloth", Class(2), "three-toed sloth"),
        ("T-shirt", Class(3), "T-shirt"),
        ('"T"-"shirt"', Contrast(Class(5), Class(4)), "T − shirt"),
        ("three-toed sloth-T", Contrast(Class(2), Class(5)), "three-toed sloth − T"),
        ("lion-T-shirt", Contrast(Class(1), Class(3)), "lion − T-shirt"),
        ('lion-"T"-shirt', Contrast(Class(1), Sum(Class(5), Class(4))), "lion − T − shirt"),
        ("text: a black-and-white cat ", Text("a black-and-white cat"), "“a black-and-white cat”"),
        ("text:a cat - text:a dog", Contrast(Text("a cat"), Text("a dog")), "“a cat” − “a dog”"),
        ("text:c++ +text:a-b", Sum(Text("c++"), Text("a-b")), "“c++” + “a-b”"),
        ("image:my+photo-1.jpg", SimilarTo("my+photo-1.jpg"), "like my+photo-1.jpg"),
        ("patch: 3, 5", Patch(3, 5), "patch 3, 5"),
        ("segment:1@120, 80", Segment(1, at=(120, 80)), "lion at 120, 80"),
        ('segment:"cat@home" @ 1.5,2', Segment("cat@home", at=(1.5, 2)), "cat@home at 1.5, 2"),
        (
            "segment:a-b@1,2 - segment:4@1,2",
            Contrast(Segment("a-b", at=(1, 2)), Segment(4, at=(1, 2))),
            "a-b at 1, 2 − shirt at 1, 2",
        ),
        ("box:T-shirt@-1,2,30,40.5", Box("T-shirt", (-1, 2, 30, 40.5)), "T-shirt in the box -1, 2, 30, 40.5"),
    ],
)
def test_every_form(text, expected, words):
    found = parse_target(text, LABELS)
    assert same(found, expected)
    assert describe_target(found, LABELS) == words


def test_probes_of_patches_come_from_files(tmp_path):
    np.save(tmp_path / "probe#1.npy", np.eye(3, 4, dtype=np.float32))
    found = parse_target(f"patch:3,5@{tmp_path / 'probe#1.npy'}#2", LABELS)
    assert (found.row, found.column) == (3, 5) and torch.equal(found.weights, torch.eye(3, 4)[2])
    np.save(tmp_path / "one.npy", np.ones(4, np.float32))
    assert torch.equal(parse_target(f"patch:0,0@{tmp_path / 'one.npy'}", LABELS).weights, torch.ones(4))
    with pytest.raises(InputError, match="3 rows; say which"):
        parse_target(f"patch:3,5@{tmp_path / 'probe#1.npy'}", LABELS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("walrus", "'walrus': no class"),
        ("tiger+walrus", "'walrus': no class"),
        ("tiger-", "empty"),
        ("-3", "'-3'|-3 is out of range"),
        ("9", "out of range"),
        ("text:", "prompt is empty"),
        ("text:a cat - text: ", "prompt is empty"),
        ("patch:3", "patch:ROW,COLUMN"),
        ("patch:a,b", "patch:ROW,COLUMN"),
        ("segment:cat@1", "segment:CLASS@Y,X"),
        ("segment:@1,2", "segment:CLASS@Y,X"),
        ("segment:cat@1,nan", "segment:CLASS@Y,X"),
        ("box:cat@1,2,3", "box:CLASS@LEFT,TOP,RIGHT,BOTTOM"),
        ("box:cat@3,2,1,4", "left below right"),
        ("patch:3,5@none.npy", "cannot read the probe none.npy"),
    ],
)
def test_invalid_targets_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_target(text, LABELS)


@pytest.mark.parametrize("text", ["image:/etc/hostname", "patch:3,5@/etc/hostname", "patch:3,5@probe.npy#1"])
def test_text_of_somebody_else_names_no_file(text):
    with pytest.raises(InputError, match="names a file"):
        parse_target(text, LABELS, files=False)


def test_fewer_signs_may_be_allowed_and_a_name_may_have_any_number():
    labels = Labels(2, ("a-b-c-d-e", "f"))
    assert same(parse_target("a-b-c-d-e", labels, most_signs=2), Class(0))
    assert same(parse_target('"a-b-c-d-e"-f', labels, most_signs=2), Contrast(Class(0), Class(1)))
    with pytest.raises(InputError, match="at most 2"):
        parse_target("a-b-c-d-e-f", labels, most_signs=2)


def test_two_readings_of_as_many_classes_are_refused():
    labels = Labels(4, ("a-b", "c", "a", "b-c"))
    with pytest.raises(InputError, match="may be 'a − b-c' or 'a-b − c'"):
        parse_target("a-b-c", labels)
    assert same(parse_target('"a-b"-c', labels), Contrast(Class(0), Class(1)))


def test_embeddings_have_no_classes():
    with pytest.raises(InputError, match="text:PROMPT"):
        parse_target("tiger", Labels(0))
    assert parse_target("text:tiger", Labels(0)) == Text("tiger")


def test_other_targets_have_words_too():
    assert describe_target(3, LABELS) == "T-shirt" and describe_target(lambda y: y, LABELS) == "target"
    assert describe_target(Class("tiger"), LABELS) == "tiger"
    assert describe_target(Segment(1, mask=np.ones((2, 2))), LABELS) == "lion in a mask"
    assert describe_target(Box(1, query=7), LABELS) == "lion in detection 7"
    assert describe_target(Box(1, torch.ones(2, 4)), LABELS) == "lion in the box"
