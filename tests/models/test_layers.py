"""The frame of a classifier."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.models.layers import ImageClassifier, StochasticDepth
from conftest import tiny_model


def test_the_frame_itself_computes_nothing():
    with pytest.raises(TypeError, match="ImageClassifier defines no features"):
        ImageClassifier().features(torch.zeros(1, 3, 8, 8))


def test_stochastic_depth_shows_its_probability():
    assert repr(StochasticDepth(0.125)) == "StochasticDepth(probability=0.125)"


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter])
def test_class_names_may_be_any_sequence_of_text(kind):
    model = tiny_model(num_classes=3)
    model.class_names = kind(["ant", "bee", "cat"])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each.class_names == ["ant", "bee", "cat"]
    assert [type(name) for name in model.class_names] == [str, str, str]
    model.class_names = None
    assert model.class_names is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "bee"], "2 class names for 3 classes"),
        (["ant", "bee", "cat", "dog"], "4 class names for 3 classes"),
        ([], "0 class names for 3 classes"),
        ([0, 1, 2], "text, got 0"),
        ("ant", "text, got 'ant'"),
        ({0: "ant", 1: "bee", 2: "cat"}, "text, got {0: 'ant'"),
        (5, "text, got 5"),
    ],
)
def test_other_class_names_are_refused_where_they_are_set(names, message):
    model = tiny_model(num_classes=3)
    model.class_names = ["x", "y", "z"]
    with pytest.raises(am.UserError, match=message):
        model.class_names = names
    assert model.class_names == ["x", "y", "z"]
    model.class_names.append("w")
    with pytest.raises(am.UserError, match="4 class names for 3 classes"):
        am.predict(model, "digits:test")
