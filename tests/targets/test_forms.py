"""Tests of targets in captum's forms and of callables: each cotangent is the gradient of the score."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dave_fast.errors import InputError
from dave_fast.sampling import identity
from dave_fast.targets.forms import ModelView, resolve_target, split_targets

OUTPUT = torch.tensor([[0.1, 0.9, 0.3], [2.0, -1.0, 0.5]])
ROWS = torch.tensor([0, 0, 1])


def nothing_asked(images):
    raise AssertionError("the model was asked")


def resolve(target, output=OUTPUT, size=(16, 16), model=None):
    return resolve_target(target, output, size, ModelView(model or nn.Identity(), nothing_asked))


def rows_of(index):
    return replace(identity(len(index)), image_index=index)


def cotangent(target, output=OUTPUT, rows=ROWS):
    return resolve(target, output)(output[rows], rows_of(rows))


def one_hot(*classes):
    return torch.eye(3)[list(classes)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, (1, 1, 0)),
        (2, (2, 2, 2)),
        (-1, (2, 2, 2)),
        (torch.tensor(2), (2, 2, 2)),
        (torch.tensor([2]), (2, 2, 2)),
        (np.int64(2), (2, 2, 2)),
        ([0, 2], (0, 0, 2)),
        ((2,), (2, 2, 2)),
        ([(0,), (2,)], (0, 0, 2)),
        (torch.tensor([0, 2]), (0, 0, 2)),
        ([torch.tensor(0), np.int32(2)], (0, 0, 2)),
        (np.array([0, 2]), (0, 0, 2)),
    ],
    ids=str,
)
def test_classes_become_one_hot_cotangents(target, expected):
    assert torch.equal(cotangent(target), one_hot(*expected))


def test_tuples_index_outputs_with_more_dimensions():
    output = torch.randn(2, 3, 4, 5)
    expected = torch.zeros(3, 3, 4, 5)
    expected[:, 1, 2, 3] = 1
    assert torch.equal(cotangent((1, 2, 3), output), expected)
    expected = torch.zeros(3, 3, 4, 5)
    expected[:2, 0, 0, 0] = 1
    expected[2, 2, 3, 4] = 1
    assert torch.equal(cotangent([(0, 0, 0), (2, 3, -1)], output), expected)


def test_a_callable_gets_all_rows_and_its_true_gradient():
    found = cotangent(lambda output: output.log_softmax(1)[:, 1])
    rows = OUTPUT[ROWS]
    assert torch.allclose(found, one_hot(1, 1, 1) - rows.softmax(1))


def test_callables_per_image_get_one_row_each():
    found = cotangent([lambda row: row[0] * 3, lambda row: row.sum()])
    assert torch.equal(found, torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [1.0, 1, 1]]))


def test_classes_are_named_only_where_there_are_some():
    assert resolve([0, -1]).classes.tolist() == [0, 2]
    assert resolve(lambda o: o[:, 0]).classes.tolist() == [-1]
    assert resolve((1, 2), torch.randn(2, 3, 4)).classes.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (3, "out of range.*3 classes"),
        (-4, "out of range"),
        ([0], "1 targets were given for 2 images"),
        ([0, 1, 2], "3 targets were given for 2 images"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\(2, 2\)"),
        ((0, 1), "2 indices"),
        ("one", r"str.*Class\('one'\)"),
        (True, "bool"),
        ([True, False], "neither an integer"),
        ([0, "one"], "neither an integer"),
    ],
    ids=str,
)
def test_bad_targets_are_refused_with_what_was_given(target, words):
    with pytest.raises(InputError, match=words):
        resolve(target)


def test_a_callable_that_returns_no_score_a_row_is_refused():
    with pytest.raises(InputError, match=r"returned \(3, 3\)"):
        cotangent(lambda output: output)


def test_the_predicted_class_needs_a_two_dimensional_output():
    with pytest.raises(InputError, match="target=None"):
        resolve(None, torch.randn(2, 3, 4))


def test_scores_without_a_gradient_are_refused():
    with pytest.raises(InputError, match="no gradient"):
        cotangent(lambda output: output.detach()[:, 0])
    with pytest.raises(InputError, match=r"returned 1.5"):
        cotangent([lambda row: 1.5, lambda row: 1.5])


def test_one_score_an_image_is_explained_as_it_is():
    output = torch.tensor([3.0, -2.0])
    assert torch.equal(cotangent(None, output), torch.ones(3))
    assert resolve(None, output).classes.tolist() == [-1]


def test_an_embedding_has_no_predicted_class():
    model = nn.Identity()
    model.num_classes = 0
    with pytest.raises(InputError, match=r"embedding.*SimilarTo"):
        resolve(None, OUTPUT, model=model)
    assert torch.equal(resolve(1, OUTPUT, model=model)(OUTPUT, rows_of(torch.tensor([0, 1]))), one_hot(1, 1))


def test_several_targets_come_as_a_list_or_as_classes():
    assert split_targets([3, None, (1, 2)]) == [3, None, (1, 2)]
    assert split_targets(torch.tensor([3, 5])) == [3, 5]
    of_images = split_targets(np.array([[3, 5], [4, 6], [1, 2]]))
    assert [t.tolist() for t in of_images] == [[3, 4, 1], [5, 6, 2]]


@pytest.mark.parametrize(
    ("targets", "words"),
    [([], "nothing"), (torch.zeros(2), "float32"), (3, "int"), ("tiger", "str"), (torch.tensor(3), r"\(\)")],
    ids=str,
)
def test_invalid_lists_of_targets_are_refused(targets, words):
    with pytest.raises(InputError, match=words):
        split_targets(targets)
