"""Test the names of result files: different questions never share one, and equal ones do."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dave_fast.explain.result_names import ending_of, figure_name, question_name
from dave_fast.models.labels import Labels
from dave_fast.targets import Class, Contrast, Patch, SimilarTo, Sum, Text
from dave_fast.targets.text import parse_target

LABELS = Labels(6, ("tiger, Panthera tigris", "tiger cat", "crane", "crane", "猫", "a-very-long-name " * 9))


def digits(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tiger", "0-tiger"),
        ("0", "0-tiger"),
        ("panthera", "0-tiger"),
        ("4", "4"),
        ("5", "5-a-very-long-name-a-very-long-name-a-very"),
        ("tiger cat - tiger", "1-tiger-cat_not_0-tiger"),
        ("2+3", "2-crane_and_3-crane"),
        ("0-2-3", "0-tiger_not_2-crane_not_3-crane"),
        ("text:a cat", "text-a-cat"),
        ("text:a cat - text:a dog", "text-a-cat_not_text-a-dog"),
        ("text:A cat", "text-a-cat_" + digits("A cat")),
        ("text:猫", "text_" + digits("猫")),
        ("patch:3,5", "patch-3-5"),
        ("segment:tiger@120,80", "segment-0-tiger-at-120-80"),
        ("box:2@20,40,180,200 - box:0@20,40,180,200", "box-2-crane-at-20-40-180-200_not_box-0-tiger-at-20-40-180-200"),
        ("segment:tiger@1.5,80", "segment-0-tiger-at-2-80_" + digits("('tiger', [1.5, 80.0])")),
        ("segment:walrus@1,80", "segment-walrus-at-1-80_" + digits("('walrus', [1.0, 80.0])")),
        ("image:some/Other.jpg", "like-some-other-jpg_" + digits("some/Other.jpg")),
    ],
)
def test_names_of_questions(text, name):
    assert question_name(parse_target(text, LABELS), LABELS) == name


def test_classes_without_names_have_their_index():
    assert question_name(7, Labels(10)) == "class-7"
    assert question_name(Contrast(Class(7), Class(2)), Labels(None)) == "class-7_not_class-2"


def test_score_that_is_no_class_is_a_target():
    assert question_name(-1, Labels(None)) == question_name(-1, Labels(2, ("cat", "dog"))) == "target"


def test_probes_of_one_patch_are_told_apart_by_their_weights():
    one, other = Patch(1, 2, torch.tensor([1.0, 2.0])), Patch(1, 2, torch.tensor([1.0, 3.0]))
    assert question_name(one, LABELS) != question_name(other, LABELS) != question_name(Patch(1, 2), LABELS)
    assert question_name(one, LABELS) == question_name(Patch(1, 2, torch.tensor([1.0, 2.0])), LABELS)


def test_long_questions_are_cut_and_stay_different():
    many = [Sum(*(Text(f"prompt number {i} of {last}") for i in range(15))) for last in ("one", "two")]
    names = [question_name(each, LABELS) for each in many]
    assert len(set(names)) == 2 and max(map(len, names)) <= 100


prompts = st.text("aB -_+é.", min_size=1, max_size=6).filter(str.strip).map(str.strip)
parts = st.one_of(
    prompts.map(Text),
    st.integers(0, 5).map(Class),
    prompts.map(SimilarTo),
    st.builds(Patch, st.integers(0, 12), st.integers(0, 12)),
)
questions = st.one_of(parts, st.builds(Contrast, parts, parts), st.builds(Sum, parts, parts))


def key(question):
    return repr(question) if not isinstance(question, Sum) else f"Sum{question.parts!r}"


@settings(max_examples=300, deadline=None)
@given(st.lists(questions, min_size=2, max_size=20))
def test_different_questions_have_different_names_of_plain_letters(given_questions):
    different = {key(each): question_name(each, LABELS) for each in given_questions}
    assert len(set(different.values())) == len(different)
    for name in different.values():
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") and name[0] not in "-_"


def test_depths_and_figures():
    assert [ending_of(depth) for depth in ("pixels", 6, "5-9")] == ["", ".block6", ".blocks5-9"]
    assert figure_name(["0-tiger"], None, ["pixels"]) == "0-tiger"
    assert figure_name(["0-tiger"], 1, ["pixels", 6]) == "0-tiger.pixels,block6"
    assert figure_name(["0-tiger", "2-crane"], 2, ["pixels"]) == "top2"
    assert figure_name(["0-tiger", "2-crane"], None, [6]) == "0-tiger,2-crane.block6"
    many = [f"{i}-something-long" for i in range(20)]
    assert len(figure_name(many, None, ["pixels"])) <= 100
    assert figure_name(many, None, ["pixels"]) != figure_name(many[::-1], None, ["pixels"])
