"""Frozen features: those of the model, kept on disk by what they depend on, trusted only whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source
from allmlp.data.transforms import normalize
from allmlp.evaluation.features import Features, frozen_features
from allmlp.evaluation.predictor import Predictor
from allmlp.models.layers import preprocessing_of
from conftest import draw, tiny_model


@pytest.fixture
def compute(source: Source, tmp_path: Path) -> Any:
    """Computes those of the training images, with defaults."""

    def run(model: am.ImageClassifier, **changes: Any) -> Features:
        given = {"source": source, "cache": tmp_path / "cache", "on_batch": None, **changes}
        images, cache, on_batch = (given.pop(name) for name in ("source", "cache", "on_batch"))
        predictor = Predictor(model, num_workers=0, batch_size=8, **given)
        return frozen_features(predictor, images, cache, on_batch)

    return run


@pytest.mark.numerics
def test_they_are_the_models(source: Source, compute: Any):
    model = tiny_model().train()
    preprocessing = preprocessing_of(model)
    found = compute(model, cache=None)
    assert model.training
    assert (found.values.dtype, found.values.shape) == (np.float32, (20, 16))
    assert found.indices.tolist() == list(range(20))
    (batch,) = evaluation_batches(source, preprocessing, batch_size=20, num_workers=0)
    with torch.inference_mode():
        expected = model.eval().features(normalize(batch.images, preprocessing))
    np.testing.assert_allclose(found.values, expected.numpy(), atol=1e-6)


def test_a_hit_gives_equal_bits_and_runs_nothing(compute, tmp_path, monkeypatch):
    model = tiny_model()
    seen: list[int] = []
    first = compute(model, on_batch=lambda batch: seen.append(len(batch.labels)))
    assert seen == [8, 8, 4]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(type(model), "features", lambda *_: pytest.fail("the model ran"))
    second = compute(model)
    assert second.from_cache
    assert second.values.dtype == np.float32
    assert second.values.tobytes() == first.values.tobytes()
    assert (second.indices == first.indices).all()
    assert second.notes == []


def other_weights(model: am.ImageClassifier) -> None:
    model.blocks[0].layer_norm_0.bias.data[0] += 1e-6


def other_gelu(model: am.ImageClassifier) -> None:
    model.config = replace(model.config, gelu="exact")


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (other_weights, {}),
        (lambda model: model.register_buffer("extra", torch.zeros(1), persistent=False), {}),
        (other_gelu, {}),
        (None, {"preprocessing": am.Preprocessing(image_size=(8, 8), resize="squash")}),
        (None, {"precision": "bfloat16"}),
        (None, {}),  # another image
    ],
)
def test_what_changes_them_misses(change: Any, given: Any, compute: Any, class_folder: Path):
    model = tiny_model()
    compute(model)
    if change is not None:
        change(model)
    elif not given:
        draw(999).save(class_folder / "train" / "bee" / "7.png")
    again = compute(model, **given)
    assert (again.from_cache, again.notes) == (False, [])
    assert compute(model, **given).from_cache


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b"\xff" * 500)])
def test_a_damaged_file_is_computed_anew(damage: Any, compute: Any, tmp_path: Path):
    model = tiny_model()
    first = compute(model)
    (path,) = (tmp_path / "cache").iterdir()
    damage(path)
    second = compute(model)
    assert not second.from_cache
    assert second.values.tobytes() == first.values.tobytes()
    assert f"{path} are not used" in second.notes[0]
    assert compute(model).from_cache  # it was written again
    other_weights(model)
    third = compute(model)
    (other,) = set((tmp_path / "cache").iterdir()) - {path}
    other.write_bytes(path.read_bytes())  # a whole file under another name
    again = compute(model)
    assert "its checksum is wrong" in again.notes[0]
    assert again.values.tobytes() == third.values.tobytes()


def test_bad_images_are_left_out_also_from_the_cache(compute: Any, class_folder: Path):
    bad = class_folder / "train" / "ant" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    model = tiny_model()
    for is_kept in (False, True):
        found = compute(model)
        assert found.from_cache == is_kept
        assert found.indices.tolist() == [0, 1, 2, *range(4, 20)]
        assert len(found.values) == 19
        assert [(image.index, image.name) for image in found.bad] == [(3, str(bad))]


def test_features_that_are_not_finite_name_the_image(compute: Any, tmp_path: Path, monkeypatch):
    model, batches = tiny_model(), []
    right = type(model).features

    def features(self: Any, images: torch.Tensor) -> torch.Tensor:
        values = right(self, images).clone()
        batches.append(len(values))
        if len(batches) == 2:
            values[3, 5] = float("nan")
        return values

    monkeypatch.setattr(type(model), "features", features)
    with pytest.raises(am.UserError, match="nan") as error:
        compute(model)
    assert str(error.value.where).endswith("bee/5.png")  # the image of index 11
    assert not (tmp_path / "cache").exists()
