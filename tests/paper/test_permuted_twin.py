"""Why a Mixer does not depend on the order of patches: the identity behind figure 4."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import allmlp as am
from allmlp.data.transforms import patch_orders, permute
from conftest import TINY
from runs import losses_of

RULES = am.Preprocessing(
    image_size=(8, 8), permutation="patches", permutation_patch=2, permutation_seed=5
)


@torch.no_grad()
def permuted_twin(model: am.MlpMixer) -> am.MlpMixer:
    """A Mixer that makes of permuted images what the model makes of the original ones.

    The pixels within a patch are the stem's inputs, and the patches are the token-mixing MLPs'
    inputs and outputs: their weights are put in the order of the permutation.
    """
    patches, inside = (torch.from_numpy(order) for order in patch_orders(RULES))
    tensors: dict[str, Tensor] = dict(model.state_dict())
    stem = tensors["stem.weight"]
    tensors["stem.weight"] = stem.flatten(2)[:, :, inside].view_as(stem)
    for name, value in tensors.items():
        if ".token_mixing.dense_0.weight" in name:
            tensors[name] = value[:, patches]
        elif ".token_mixing.dense_1." in name:
            tensors[name] = value[patches]
    twin = am.MlpMixer(model.config).train(model.training)
    twin.load_state_dict({name: value.clone() for name, value in tensors.items()})
    twin.class_names, twin.preprocessing = model.class_names, RULES
    return twin


@pytest.fixture
def model() -> am.MlpMixer:
    torch.manual_seed(0)
    model = am.create_model("mixer_s16", 8, 10, **{**TINY, "patch_size": 2})
    torch.nn.init.normal_(model.head.weight, std=0.1)
    model.class_names = [str(digit) for digit in range(10)]
    return model.eval()


def test_a_permuted_twin_makes_the_same_of_permuted_images(model):
    twin = permuted_twin(model)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (twin(permute(images, RULES)) - model(images)).abs().max() < 1e-5
    assert (twin(images) - model(images)).abs().max() > 1e-2  # and not of others
    assert (model(permute(images, RULES)) - model(images)).abs().max() > 1e-2


def test_both_training_runs_have_the_same_losses(model, tmp_path: Path):
    """From permuted initial weights, on permuted images: the curves of figure 4 coincide."""
    model.preprocessing = am.Preprocessing(image_size=(8, 8))
    am.save_model(model, tmp_path / "plain")
    am.save_model(permuted_twin(model), tmp_path / "twin")
    losses, tests = {}, {}
    given = {"model.name": "", "model.image_size": None, "model.overrides": {}, "steps": 12}
    given |= {"evaluate_every": 6, "batch_size": 16, "precision": "float32", "data.num_workers": 0}
    for name, kind, patch, seed in (("plain", "none", None, 0), ("twin", "patches", 2, 5)):
        given |= {"data.permutation": kind, "data.permutation_patch": patch}
        given |= {"data.permutation_seed": seed, "model.weights": str(tmp_path / name)}
        given |= {"output": str(tmp_path / f"run-{name}")}
        result = am.train(am.recipe("digits").with_values(given), quiet=True)
        losses[name] = losses_of(tmp_path / f"run-{name}")
        tests[name] = result.test.probabilities
    assert len(losses["plain"]) > 2
    assert losses["plain"] == pytest.approx(losses["twin"], abs=2e-5)
    assert np.abs(tests["plain"] - tests["twin"]).max() < 1e-3
