"""The frame of a classifier."""

from __future__ import annotations

import pytest
import torch

from mlp_mixer.models.layers import ImageClassifier, StochasticDepth


def test_the_frame_itself_computes_nothing():
    with pytest.raises(TypeError, match="ImageClassifier defines no features"):
        ImageClassifier().features(torch.zeros(1, 3, 8, 8))


def test_stochastic_depth_shows_its_probability():
    assert repr(StochasticDepth(0.125)) == "StochasticDepth(probability=0.125)"
