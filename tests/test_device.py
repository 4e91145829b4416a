"""Names of devices."""

from __future__ import annotations

import pytest
import torch

import allmlp as am
from allmlp.runtime.device import choose_device


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    absent = () if torch.cuda.is_available() else ("cuda",)
    for name in ("gpu", "mps", "meta", *absent):
        with pytest.raises(am.UserError):
            choose_device(name)
