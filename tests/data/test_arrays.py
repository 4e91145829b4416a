"""Arrays as data: what is read, statistics, splits, and what is wrong with files."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allmlp.data.source import array_row, join, subset, unlabelled, values_of
from allmlp.data.sources import notes_of, open_source, open_splits
from allmlp.data.sources.arrays import ArrayRows, statistics
from allmlp.errors import UserError
from conftest import user_error

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(50, 3, (12, 2, 6)), np.array(["no", "yes", "no"] * 4)


def savez(path: Path, **arrays: Any) -> str:
    np.savez(path, **{key: np.asarray(value) for key, value in arrays.items()})
    return str(path)


@pytest.mark.parametrize("kind", ["npz", "npy_labels", "npy_y", "npy_csv", "parquet"])
def test_all_kinds_of_files_hold_the_same_rows(tmp_path: Path, kind: str):
    path = tmp_path / ("x.npy" if kind == "npy_y" else f"ecg.{kind[:3]}")
    if kind == "npz":
        savez(path, x=X, y=Y)
    elif kind == "parquet":
        path = path.with_suffix(".parquet")
        pq.write_table(pa.table({"series": X.tolist(), "label": Y.tolist()}), path)
    else:
        np.save(path, X)
        if kind == "npy_csv":
            path.with_suffix(".csv").write_text("label\n" + "\n".join(Y))
        else:
            np.save(tmp_path / ("y.npy" if kind == "npy_y" else "ecg_labels.npy"), Y)
    source = open_source(str(path))
    assert source.class_names == ["no", "yes"]
    assert [source.label_text(at) for at in range(12)] == Y.tolist()
    again = pickle.loads(pickle.dumps(source))  # as in spawned workers
    for row in (source, again):
        np.testing.assert_array_equal(array_row(row, 7), X[7, :, None].astype(np.float32))


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (np.arange(24).reshape(4, 6), (1, 1, 6)),
        (np.arange(96, dtype=np.uint8).reshape(4, 2, 3, 4), (2, 3, 4)),
        (np.asfortranarray(X), (2, 1, 6)),
    ],
)
def test_shapes_and_integers(tmp_path: Path, values: np.ndarray, shape: tuple[int, ...]):
    np.save(tmp_path / "a.npy", values)
    source = open_source(str(tmp_path / "a.npy"), labels="none")
    rows = np.stack([array_row(source, at) for at in range(len(values))])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, values.reshape(len(values), *shape).astype(np.float32))


def test_arrays_of_other_lengths_are_no_columns(tmp_path: Path):
    savez(tmp_path / "ecg.npz", x=X, y=Y, fs=250, leads=np.array(["I", "II"]))
    source = open_source(str(tmp_path / "ecg.npz"))
    assert len(source) == 12
    assert any("fs, leads" in note for note in notes_of({"": source}))
    savez(tmp_path / "ecg.npz", x=X, y=Y.astype(object))
    with pytest.raises(UserError, match=r"astype\(str\)"):
        open_source(str(tmp_path / "ecg.npz"))


def test_names_of_keras_and_scikit_learn(tmp_path: Path):
    hot = np.eye(3, dtype=int)[[0, 2, 1, 2]]
    arrays = {"X_train": X[:4], "y_train": hot, "X_test": X[4:6], "y_test": hot[:2]}
    splits = open_splits(savez(tmp_path / "a.npz", **arrays))
    assert {name: len(source) for name, source in splits.items()} == {"train": 4, "test": 2}
    assert splits["train"].class_names == ["0", "1", "2"]
    assert splits["train"].labels.tolist() == [0, 2, 1, 2]
    assert splits["test"].item_name(1).endswith("a.npz:X_test[1]")
    several = savez(tmp_path / "b.npz", x=X[:2], y=[[0, 1, 1], [1, 0, 0]])
    assert open_source(several).labels.tolist() == [[False, True, True], [True, False, False]]


def test_statistics_are_those_of_numpy_for_any_split():
    values = RANDOM.normal([[[1e5], [-2.0]]], [[[0.5], [30.0]]], (60, 2, 7)).astype(np.float32)
    values = np.concatenate([values, np.full((60, 1, 7), 4, np.float32)], axis=1)
    source = unlabelled(ArrayRows(values, "x"), "x")
    part = subset(join([source, source], "twice"), np.arange(10, 70), "part")
    rows = np.concatenate([values, values])[10:70].astype(np.float64)
    mean, std = statistics(part)
    np.testing.assert_allclose(mean, rows.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], rows.std(axis=(0, 2))[:2], rtol=1e-9)
    assert std[2] == 1.0  # constant


def test_groups_folds_and_column_of_splits(tmp_path: Path):
    group, fold = np.repeat(np.arange(6), 2), np.tile([1, 2, 3], 4)
    x, y = np.tile(np.arange(12.0)[:, None], 3), np.array(["a", "b"] * 6)
    path = savez(tmp_path / "g.npz", x=x, y=y, patient=group, fold=fold)
    source = open_source(f"{path}#group=patient")
    assert values_of(source, "group") == [str(one) for one in group]
    assert values_of(source, "fold") == [str(one) for one in fold]
    np.save(tmp_path / "s.npy", x)
    lines = [f"{'test' if at > 8 else 'train'},{label}" for at, label in enumerate(y)]
    (tmp_path / "s.csv").write_text("split,label\n" + "\n".join(lines))
    own = open_splits(str(tmp_path / "s.npy"))
    assert {name: len(source) for name, source in own.items()} == {"train": 9, "test": 3}
    assert array_row(own["test"], 0)[0, 0, 0] == 9


def _with(at: tuple[int, ...], value: float) -> np.ndarray:
    values = X.copy()
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("arrays", "code", "named"),
    [
        ({"x": _with((3, 1, 4), np.nan), "y": Y}, "not-finite", "[3]"),
        ({"x": _with((5, 0, 0), 1e39), "y": Y}, "not-finite", "[5]"),
        ({"x": X, "y": Y[:11]}, "lengths", "11"),
        ({"x": X}, "missing", "no labels"),
        ({"x": X[:, 0, 0], "y": Y}, "shape", "(12,)"),
        ({"x": X.astype(str), "y": Y}, "shape", "U"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :, 1:]}, "invalid", "several shapes"),
    ],
)
def test_unusable_arrays(tmp_path: Path, arrays: Any, code: str, named: str):
    with user_error(code, named, "to fix: "):
        open_source(savez(tmp_path / "a.npz", **arrays))


def test_damaged_files_and_python_objects(tmp_path: Path):
    whole = Path(savez(tmp_path / "a.npz", x=X, y=Y)).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.npz").write_bytes(whole[:400] + bytes(100) + whole[500:])
    np.save(tmp_path / "d.npy", np.array([[1.0], [1.0, 2.0]], dtype=object))
    for name in ("b.npz", "c.npz", "d.npy"):
        with user_error("damaged", name):
            open_source(str(tmp_path / name), labels="none")
    np.save(tmp_path / "x_test.npy", X)
    assert [*open_splits(str(tmp_path / "x_test.npy"), labels="none")] == ["test"]


def test_lists_of_several_lengths(tmp_path: Path):
    table = pa.table({"x": [[1.0, 2.0], [3.0, 4.0], [5.0]], "label": [0, 1, 0]})
    pq.write_table(table, tmp_path / "a.parquet")
    with user_error("lengths", "a.parquet[2]"):
        open_source(str(tmp_path / "a.parquet"))
    table = pa.table({"x": [[1.0, 2.0], [3.0, 4.0]], "label": [["a", "b"], ["a"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet")).labels.tolist() == [[True, True], [True, False]]
