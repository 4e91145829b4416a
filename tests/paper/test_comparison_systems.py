"""The paper's comparison systems: listed, and, where timm is installed, of the right size."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.models.timm_model import HAND_BUILT, own_image_size
from allmlp.paper.comparison_systems import SYSTEMS
from conftest import mixer


def test_the_comparison_systems_are_listed(capsys: pytest.CaptureFixture[str]):
    code, out, _ = mixer(capsys, "models", "--comparison")
    assert code == 0
    for system in SYSTEMS:
        assert f"\n{system.paper_name} " in out
        assert f"{system.parameters:,}" in out
    assert set(HAND_BUILT) <= {system.model.removeprefix("timm:") for system in SYSTEMS}
    code, _, err = mixer(capsys, "models", "--comparison", "--num-classes", 3)
    assert code == 2
    assert "comparison and num_classes" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is no dependency")
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.paper_name)
def test_parameters_of_the_comparison_systems(system: Any):
    with torch.device("meta"):
        model = am.create_model(system.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == system.parameters
    assert model.config.image_size == own_image_size(system.model.removeprefix("timm:"))
