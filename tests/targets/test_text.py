"""Tests of targets as text: every form of the grammar, names that contain its signs, and errors."""

import numpy as np
import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.models.labels import Labels
from dave_fast.targets import Class, Contrast, Patch, SimilarTo, Sum, Text
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
        ("patch:3,5@none.npy", "cannot read the probe none.npy"),
    ],
)
def test_invalid_targets_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_target(text, LABELS)


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
