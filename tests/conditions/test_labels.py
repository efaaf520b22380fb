"""Classes as the condition."""

from __future__ import annotations

import pytest
import torch

from robustdiff.conditions.labels import Labels
from robustdiff.conditions.none import Unconditional
from robustdiff.errors import InputError

LABELS = torch.tensor([0, 2, 1])


def test_labels_are_class_labels():
    assert Labels(3).batch(LABELS, None, None)["class_labels"] is LABELS
    assert Labels(3).classes == 3


def test_dropped_ones_become_the_null_class():
    condition = Labels(4, null=True)
    dropped = condition.batch(LABELS, None, torch.tensor([True, False, False]))
    assert dropped["class_labels"].tolist() == [3, 2, 1]
    assert condition.empty() == {"class_labels": 3}
    assert condition.classes == 3
    assert condition.droppable


def test_without_a_null_class_there_is_no_empty_condition():
    assert not Labels(3).droppable
    with pytest.raises(InputError, match="guidance needs a class-conditional model whose last class is the null class"):
        Labels(3).empty()


def test_the_last_class_may_be_said_to_be_the_null_class():
    assert Labels(11).with_classes(10) == Labels(11, null=True)
    assert Labels(11).with_classes(11) == Labels(11)
    with pytest.raises(InputError, match="11 classes, and 5 are to be sampled"):
        Labels(11).with_classes(5)


@pytest.mark.parametrize(("num_classes", "words"), [(None, "needs class labels"), (4, "knows 3 classes and the data")])
def test_data_without_these_classes_is_refused(num_classes, words):
    with pytest.raises(InputError, match=words):
        Labels(4, null=True).check(num_classes, False, "model")
    Labels(4, null=True).check(3, False, "model")


def test_the_classes_of_the_data_tell_a_null_class():
    assert Labels(11).classes_of(10) == 10
    assert Labels(10).classes_of(10) is None
    assert Labels(10).classes_of(3) is None
    assert Unconditional().classes_of(10) is None


def test_nothing_is_a_condition_too():
    condition = Unconditional()
    assert condition.batch(LABELS, None, None) == {}
    assert condition.classes is None
    assert not condition.droppable
    condition.check(None, False, "model")
    with pytest.raises(InputError, match="guidance needs a model with a condition"):
        condition.empty()
    with pytest.raises(InputError, match="no classes, and 3 are to be sampled"):
        condition.with_classes(3)
