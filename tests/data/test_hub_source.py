"""Data sets of the hub: columns, splits, classes, and how it can fail."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allmlp.data.sources import open_source, open_splits
from allmlp.errors import UserError
from conftest import draw, encode

datasets = pytest.importorskip("datasets")

IMAGES = [encode(draw(seed)) for seed in range(4)]


def dataset(
    labels: list[Any],
    names: list[str] | None = None,
    label: str = "label",
    column: str = "image",
    images: list[Any] | None = None,
) -> Any:
    text = datasets.Value("string")
    features = {column: datasets.Image(), "id": text}
    features[label] = text if names is None else datasets.ClassLabel(names=names)
    own = [{"bytes": IMAGES[at % 4], "path": "a.png"} for at in range(len(labels))]
    rows = {column: images or own, "id": ["x"] * len(labels), label: labels}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts these splits, or an error, on the hub; returns the calls of `load_dataset`."""

    def put(result: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, name: str | None, *, revision: str | None, streaming: bool):
            calls.append((path, name, revision, streaming))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return put


def test_splits_bytes_and_labels(on_hub: Any):
    names = ["cat", "ant"]
    splits = {"test": dataset([1, 0], names), "train": dataset([0, 1, 0, 1], names)}
    calls = on_hub({**splits, "unlabelled_extra": dataset(["x"])})
    splits = open_splits("hf:owner/name")
    assert calls == [("owner/name", None, None, False)]
    assert list(splits) == ["train", "test"]
    train = splits["train"]
    assert (train.name, train.class_names) == ("hf:owner/name:train", ["cat", "ant"])
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.labels.dtype == np.int64
    assert [train.read(at) for at in range(4)] == IMAGES
    assert train.item_name(2) == "hf:owner/name:train[2]"
    assert pickle.loads(pickle.dumps(train)).read(1) == IMAGES[1]
    part = open_splits("hf:owner/na.me@v1.0/x#config=c:train[50%:]")["train"]
    assert calls[1] == ("owner/na.me", "c", "v1.0/x", False)
    assert part.read(0) == IMAGES[2]


def test_columns_are_chosen(on_hub: Any):
    on_hub({"train": dataset(["x", "y", "y", "x"], label="text", column="photo")})
    assert open_source("hf:a/b#label=text,image=photo").class_names == ["x", "y"]
    with pytest.raises(UserError, match="column 'id' is string, not struct"):
        open_source("hf:a/b#label=text,image=id")
    source = open_source("hf:a/b", labels="any")
    assert (source.read(3), source.class_names) == (IMAGES[3], ["unknown"])
    with pytest.raises(UserError, match="no label column found"):
        open_source("hf:a/b")
    on_hub({"train": dataset([0, 1], ["x", "y"], label="fine_label", column="photo")})
    assert open_source("hf:a/b#label=fine_label,image=photo").class_names == ["x", "y"]


def test_images_as_paths_and_missing_ones(on_hub: Any, tmp_path: Path):
    (tmp_path / "x.png").write_bytes(IMAGES[1])
    paths = [{"bytes": None, "path": str(tmp_path / name)} for name in ("x.png", "gone.png")]
    on_hub({"train": dataset(["a"] * 3, images=[*paths, None])})
    source = open_source("hf:a/b")
    assert source.read(0) == IMAGES[1]
    with pytest.raises(UserError, match="No such file"):
        source.read(1)
    with pytest.raises(UserError, match=r"the row has no image[\s\S]*hf:a/b:train\[2\]"):
        source.read(2)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"train": []}, "has rows"),
        ({"val": ["a"], "valid": ["a"]}, "val and valid"),
        (ValueError("Config name is missing: ['en']"), r"'en'[\s\S]*'hf:a/b#config=NAME'"),
        (RuntimeError("Dataset 'a/b' is a gated dataset"), r"gated[\s\S]*hf auth login"),
    ],
)
def test_failures_are_one_message(on_hub: Any, result: Any, message: str):
    if isinstance(result, dict):
        result = {name: dataset(labels) for name, labels in result.items()}
    on_hub(result)
    with pytest.raises(UserError, match=message):
        open_splits("hf:a/b")


def test_names_that_are_none_and_no_package(monkeypatch: pytest.MonkeyPatch):
    for name in ("hf:name", "hf:a/b/c", "hf:"):
        with pytest.raises(UserError, match="not a data set on the hub"):
            open_splits(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'allmlp\[data\]'"):
        open_splits("hf:a/b")
