"""Images in memory: in evaluate, as a model's transform, and a model in a notebook."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import allmlp as am
from conftest import draw, encode, tiny_model, user_error


def model_of_two() -> am.ImageClassifier:
    model = tiny_model(["ant", "bee"], image_size=16).eval()
    model.preprocessing = am.Preprocessing(image_size=(16, 16), mean=0.4, std=(0.2, 0.3, 0.4))
    return model


def test_evaluate_takes_every_kind_of_image(tmp_path: Path):
    model, images = model_of_two(), [draw(seed) for seed in range(5)]
    labels = ["ant", "bee", "ant", "ant", "bee"]
    paths = [tmp_path / label / f"{at}.png" for at, label in enumerate(labels)]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    files = am.evaluate(model, str(tmp_path))
    mixed = [images[0], np.asarray(images[1]), encode(images[2]), images[3], paths[4]]
    for data in (
        (mixed, labels),
        (mixed, np.array([0, 1, 0, 0, 1])),
        list(zip(mixed, labels, strict=True)),
        zip(mixed, [0, 1, 0, 0, torch.tensor(1)], strict=True),
    ):
        result = am.evaluate(model, data, num_workers=0)
        assert result.labels.tolist() == [0, 1, 0, 0, 1]
        assert sorted(map(tuple, result.logits)) == sorted(map(tuple, files.logits))
    assert re.fullmatch(r"Evaluation\('images': 5 images, 2 classes, top-1 .*%\)", repr(result))
    assert len(repr(am.TrainResult(tmp_path, result, None))) < 400


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ([], "wrong-type"),
        (5, "wrong-type"),
        (["a.png", "b.png"], "wrong-type"),
        (([draw(0)], [0, 1]), "wrong-type"),
        ([(draw(0), "wasp")], "unknown-name"),
        ([(draw(0), 2)], "out-of-range"),
        ([(draw(0), 0.5)], "wrong-type"),
        ([(np.zeros((4, 4, 3)), 0)], "wrong-type"),
        ([(np.zeros((4, 4, 3, 1), np.uint8), 0)], "wrong-type"),
        ([(np.zeros((0, 4), np.uint8), 0)], "wrong-type"),
        ([(None, 0)], "wrong-type"),
        ((np.full((2, 1, 8), np.nan), [0, 1]), "not-finite"),
    ],
)
def test_what_is_not_images_with_labels(data: object, code: str):
    with user_error(code):
        am.evaluate(model_of_two(), data)


def test_a_models_transform_is_the_preprocessing_of_predict():
    model = model_of_two()
    for image in (draw(1), draw(2, (16, 16)), draw(3).convert("L"), draw(4).convert("CMYK")):
        inputs = model.transform(image)
        assert inputs.shape == (3, 16, 16)
        assert inputs.dtype == torch.float32
        with torch.no_grad():
            expected = model(inputs[None]).softmax(dim=1)[0]
        (found,) = am.predict(model, image, precision="float32")
        named = dict(zip(["ant", "bee"], expected.tolist(), strict=True))
        assert dict(found.classes) == pytest.approx(named, abs=1e-6)
    assert torch.equal(model.transform(np.asarray(draw(1))), model.transform(encode(draw(1))))
    with user_error("wrong-type"):
        model.transform(np.zeros((4, 4, 3)))


def test_a_model_in_a_notebook():
    model = model_of_two()
    model.class_names = ["<b>ant</b>", "bee"]
    text = model._repr_html_()
    assert "16x16" in text
    assert "&lt;b&gt;ant" in text
    assert "data:image/png;base64," in text
    assert len(text) < 20_000
    assert "data:image" not in am.create_model("small_resnet", 8, 2)._repr_html_()
