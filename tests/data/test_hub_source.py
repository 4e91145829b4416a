"""Data sets of the hub: columns, splits, classes, and every way in which it can fail."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allmlp.data.sources import hub, open_source, open_splits
from allmlp.errors import UserError
from conftest import draw, encode

PICTURES = [encode(draw(seed)) for seed in range(4)]


class Image:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Value:
    pass


class FakeDataset:
    """As much of a map-style data set as is used."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self._rows = features, rows

    def __len__(self) -> int:
        return len(self._rows)

    def select_columns(self, names: list[str]) -> FakeDataset:
        rows = [{name: row[name] for name in names} for row in self._rows]
        return FakeDataset({name: self.features[name] for name in names}, rows)

    def cast_column(self, name: str, feature: Any) -> FakeDataset:
        return FakeDataset({**self.features, name: feature}, self._rows)

    def __getitem__(self, at: int | str) -> Any:
        if isinstance(at, str):
            return [row[at] for row in self._rows]
        for name, feature in self.features.items():
            assert not (isinstance(feature, Image) and feature.decode), f"{name} is decoded"
        return self._rows[at]


def dataset(
    labels: list[Any], names: list[str] | None = None, label: str = "label", column: str = "image"
) -> FakeDataset:
    kind = Value() if names is None else ClassLabel(names)
    features: dict[str, Any] = {column: Image(), "id": Value(), label: kind}
    images = [{"bytes": PICTURES[at % 4], "path": None} for at in range(len(labels))]
    rows = [
        {column: image, "id": "x", label: name} for image, name in zip(images, labels, strict=True)
    ]
    return FakeDataset(features, rows)


Fake = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a module `datasets` in place that returns these splits or raises; returns its calls."""

    def put(result: dict[str, FakeDataset] | Exception) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, name: str | None, *, revision: str | None, streaming: bool):
            calls.append((path, name, revision, streaming))
            if isinstance(result, Exception):
                raise result
            return result

        module = types.ModuleType("datasets")
        config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
        module.__dict__.update(load_dataset=load_dataset, Image=Image, config=config)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    monkeypatch.setattr(hub, "is_reachable", lambda endpoint: True)
    return put


def test_splits_bytes_and_labels(fake: Fake):
    calls = fake(
        {
            "test": dataset([1, 0], ["cat", "ant"]),
            "train": dataset([0, 1, 1, 0], ["cat", "ant"]),
            "unlabelled_extra": dataset([None]),
        }
    )
    splits = open_splits("hf:owner/name")
    assert calls == [("owner/name", None, None, False)]
    assert list(splits) == ["train", "test"]
    train = splits["train"]
    assert (train.name, train.class_names) == ("hf:owner/name:train", ["cat", "ant"])
    assert train.labels.tolist() == [0, 1, 1, 0]
    assert train.labels.dtype == np.int64
    assert [train.read(at) for at in range(4)] == PICTURES
    assert train.item_name(2) == "hf:owner/name:train[2]"


def test_revision_configuration_split_and_part(fake: Fake):
    calls = fake({"train": dataset(["b", "a", "b", "a"]), "validation": dataset(["a"])})
    part = open_splits("hf:owner/na.me@v1.0/x#config=c:train[50%:]")
    assert calls == [("owner/na.me", "c", "v1.0/x", False)]
    assert list(part) == ["train"]
    assert part["train"].read(0) == PICTURES[2]
    assert part["train"].name == "hf:owner/na.me@v1.0/x#config=c:train[50%:]"


def test_columns_are_chosen(fake: Fake):
    both = dataset([0, 1], ["x", "y"], label="fine_label", column="photo")
    both.features["coarse_label"] = ClassLabel(["all"])
    for row in both._rows:
        row["coarse_label"] = 0
    fake({"train": both})
    with pytest.raises(UserError, match=r"fine_label, coarse_label[\s\S]*#label=fine_label"):
        open_source("hf:a/b")
    assert open_source("hf:a/b#label=coarse_label").class_names == ["all"]
    assert open_source("hf:a/b#label=fine_label,image=photo").class_names == ["x", "y"]
    with pytest.raises(UserError, match="column 'id' is .* not of images"):
        open_source("hf:a/b#label=fine_label,image=id")
    with pytest.raises(UserError, match="no column 'image'"):
        open_source("hf:a/b#label=fine_label,image=image")


def test_labels_that_are_none(fake: Fake):
    names = ["x", "y"]
    fake({"train": dataset([0, 1], names), "test": dataset([-1, -1], names)})
    assert list(open_splits("hf:a/b")) == ["train"]
    for labels, classes in (([0, -1], names), (["a", None], None), ([["a"], ["b"]], None)):
        fake({"train": dataset(labels, classes)})
        with pytest.raises(UserError, match=r"hf:a/b:train\[\d\]"):
            open_splits("hf:a/b")
    fake({"train": dataset([10, 2, 10])})
    assert open_source("hf:a/b").class_names == ["2", "10"]
    assert open_source("hf:a/b").labels.tolist() == [1, 0, 1]


def test_images_as_paths_and_missing_ones(fake: Fake, tmp_path: Path):
    (tmp_path / "x.png").write_bytes(PICTURES[1])
    rows = dataset(["a"] * 4)
    rows._rows[0]["image"] = {"bytes": None, "path": str(tmp_path / "x.png")}
    rows._rows[1]["image"] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    rows._rows[2]["image"] = None
    fake({"train": rows})
    source = open_source("hf:a/b")
    assert source.read(0) == PICTURES[1]
    with pytest.raises(UserError, match="No such file"):
        source.read(1)
    with pytest.raises(UserError, match=r"the row has no image[\s\S]*hf:a/b:train\[2\]"):
        source.read(2)


def test_splits_of_other_names(fake: Fake):
    fake({"small": dataset(["a"])})
    with pytest.raises(UserError, match="none of the splits train, .* small"):
        open_splits("hf:a/b")
    fake({"val": dataset(["a"]), "valid": dataset(["a"])})
    with pytest.raises(UserError, match="two splits for one: val and valid"):
        open_splits("hf:a/b")


@pytest.mark.parametrize("name", ["hf:name", "hf:a/b/c", "hf:a/b@", "hf:", "hf:a/b c"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="not a data set on the hub"):
        open_splits(name)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "hf download --repo-type dataset a/b"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']"),
            r"'en', 'de'[\s\S]*'hf:a/b#config=NAME'",
        ),
        (RuntimeError("Dataset 'a/b' is a gated dataset"), r"gated[\s\S]*hf auth login"),
    ],
)
def test_failures_are_one_message(fake: Fake, raised: Exception, message: str):
    fake(raised)
    with pytest.raises(UserError, match=message) as told:
        open_splits("hf:a/b")
    assert told.value.fix


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'allmlp\[data\]'"):
        open_splits("hf:a/b")


def test_without_labels(fake: Fake):
    fake({"train": dataset(["x"] * 2, label="text"), "test": dataset(["x"] * 4, label="text")})
    source = open_source("hf:a/b", labels="any")
    assert [source.read(at) for at in range(4)] == PICTURES
    assert source.class_names == ["unknown"]
    assert len(open_source("hf:a/b:train[:1]", labels="any")) == 1
    with pytest.raises(UserError, match="no label column found"):
        open_source("hf:a/b")
    fake({"train": dataset([]), "test": dataset(["a"])})
    assert list(open_splits("hf:a/b")) == ["test"]
    fake({"train": dataset([])})
    with pytest.raises(UserError, match="has rows"):
        open_source("hf:a/b", labels="any")


def test_without_a_network_the_cache_is_all(fake: Fake, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for reachable in (True, False):
        fake({"train": dataset(["a"])})
        monkeypatch.setattr(hub, "is_reachable", lambda endpoint, on=reachable: on)
        seen: list[bool] = []
        load = sys.modules["datasets"].load_dataset

        def look(*args: Any, load: Any = load, seen: list[bool] = seen, **kwargs: Any) -> Any:
            config = sys.modules["datasets"].config
            seen.append(constants.HF_HUB_OFFLINE and config.HF_HUB_OFFLINE)
            return load(*args, **kwargs)

        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", look)
        open_splits("hf:a/b")
        assert seen == [not reachable]
        assert not constants.HF_HUB_OFFLINE


def test_the_real_package(monkeypatch: pytest.MonkeyPatch):
    """Whatever version is installed does as the fake one."""
    pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["x", "y"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "img": [{"bytes": data, "path": "a.png"} for data in PICTURES] + [None],
        "fine_label": [0, 1, 1, 0, 0],
        "text": ["10", "9", "10", "9", "9"],
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    both = datasets.DatasetDict({"train": whole, "test": whole.select([3, 1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: both)
    monkeypatch.setattr(hub, "is_reachable", lambda endpoint: True)
    splits = open_splits("hf:a/b")
    assert splits["train"].class_names == ["x", "y"]
    assert splits["train"].labels.tolist() == [0, 1, 1, 0, 0]
    assert [splits["train"].read(at) for at in range(4)] == PICTURES
    with pytest.raises(UserError, match="the row has no image"):
        splits["train"].read(4)
    assert [splits["test"].read(at) for at in range(2)] == [PICTURES[3], PICTURES[1]]
    assert splits["test"].labels.tolist() == [0, 1]
    assert pickle.loads(pickle.dumps(splits["test"])).read(1) == PICTURES[1]
    texts = open_source("hf:a/b#label=text:train")
    assert texts.class_names == ["9", "10"]
    assert texts.labels.tolist() == [1, 0, 1, 0, 0]
