"""The paper's comparison systems, as docs/timm.md lists them, where timm is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.models.timm_model import HAND_BUILT

PAGE = (Path(__file__).parents[2] / "docs" / "timm.md").read_text("utf-8")
SYSTEMS = re.findall(r"\| `timm:(\w+)` \|[^|]*\| ([\d,]+) \| (\d+) \|", PAGE)


def test_every_size_of_ours_is_listed():
    assert set(HAND_BUILT) <= {name for name, _, _ in SYSTEMS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is no dependency")
@pytest.mark.parametrize(("name", "parameters", "pixels"), SYSTEMS)
def test_parameters_are_those_listed(name, parameters, pixels):
    with torch.device("meta"):
        model = am.create_model(f"timm:{name}")
    assert model.num_parameters == int(parameters.replace(",", ""))
    assert model.config.image_size == (int(pixels), int(pixels))
