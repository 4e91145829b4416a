"""Nearest neighbours against scikit-learn, with ties; in every format, and in a reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

import allmlp as am
from allmlp.deploy import neighbors
from allmlp.deploy.neighbors import Neighborhood, read_features
from conftest import make_class_folder, mixer, tiny_model


@pytest.mark.parametrize("at_once", [10, 2**24])
def test_equal_to_scikit_learn(monkeypatch, at_once: int):
    monkeypatch.setattr(neighbors, "_AT_ONCE", at_once)
    values = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    others = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    index = Neighborhood([f"{at}.png" for at in range(60)], list(values))
    theirs = NearestNeighbors(metric="cosine").fit(values)
    for queries, count in ((None, 7), (others, 7), (others, 60)):
        found = index.search(queries, count)
        distances, places = theirs.kneighbors(queries, count)
        assert [[n.row for n in row] for row in found] == places.tolist()
        similar = np.array([[n.similarity for n in row] for row in found])
        np.testing.assert_allclose(similar, 1 - distances, atol=2e-6)
        assert found[0][0].path == f"{places[0, 0]}.png"


def test_ties_go_by_row_and_bad_images_are_nobodys_neighbours():
    one, other = np.array([1.0, 2.0], np.float32), np.array([-3.0, 1.0], np.float32)
    index = Neighborhood(list("abcdef"), [one, None, 3 * one, other, 2 * one, 0 * one])
    found = index.search(None, 9)
    assert [[n.path for n in row] for row in found] == [
        ["c", "e", "f", "d"],
        ["a", "e", "f", "d"],
        ["f", "a", "c", "e"],
        ["a", "c", "f", "d"],
        ["a", "c", "d", "e"],
    ]
    assert [n.path for n in index.search(None, 1)[3]] == ["a"]
    assert Neighborhood(["a"], [one]).search(None, 3) == [[]]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_written_and_read(tmp_path: Path, suffix: str):
    folder = make_class_folder(tmp_path / "album", {"x": 5})
    (folder / "x" / "1_bad.png").write_text("no image")
    model, path = tiny_model(0), tmp_path / f"out{suffix}"
    fields = {"features": True, "num_workers": 0, "batch_size": 2, "device": "cpu"}
    found = am.predict(model, folder, output=path, neighbors=2, **fields)
    assert [len(row.neighbors) for row in found] == [2, 2, 0, 2, 2, 2]
    for at, row in enumerate(found):
        for neighbor in row.neighbors:
            assert neighbor.row not in (at, 2)
            assert found[neighbor.row].path == neighbor.path
    index = read_features(path)
    good = [row for row in found if row.features is not None]
    assert index.search(None, 2) == [row.neighbors for row in good]  # to the last digit
    # In a reference an image finds itself; parts hold the same.
    query = folder / "x" / "3.png"
    (row,) = am.predict(model, query, reference=path, neighbors=3, **fields)
    assert (row.neighbors[0].path, row.neighbors[0].similarity) == (str(query), 1.0)
    assert [n.path for n in row.neighbors[1:]] == [n.path for n in found[4].neighbors]
    parts = tmp_path / "parts"
    am.predict(model, folder, output=parts, reference=path, neighbors=3, part_size=4, **fields)
    assert len(list(parts.glob("part-*.csv"))) == 2
    with pytest.raises(am.UserError, match="another job"):
        am.predict(model, folder, output=parts, reference=path, neighbors=2, **fields)


def test_the_command_and_what_it_refuses(tmp_path: Path, capsys):
    folder = make_class_folder(tmp_path / "album", {"x": 3})
    weights, path = tmp_path / "m.safetensors", tmp_path / "out.csv"
    am.save_model(tiny_model(0), weights)
    flags = "--features", "--num-workers", 0, "--output"
    assert mixer(capsys, "predict", weights, folder, "--neighbors", 1, *flags, path)[0] == 0
    header, *rows = path.read_text().splitlines()
    assert header.endswith("feature_15,neighbor_1,row_1,similarity_1,error")
    assert len(rows) == 3
    (tmp_path / "odd.csv").write_text("path,error\na,\n")
    for options, code in (
        ({"neighbors": 2}, "needs"),
        ({"features": True, "reference": path}, "needs"),
        ({"features": True, "neighbors": 0}, "out-of-range"),
        ({"features": True, "neighbors": 2, "output": tmp_path / "folder"}, "conflict"),
        ({"features": True, "neighbors": 2, "reference": tmp_path / "odd.csv"}, "invalid"),
        ({"features": True, "neighbors": 2, "reference": tmp_path / "none.csv"}, "invalid"),
    ):
        with pytest.raises(am.UserError) as caught:
            am.predict(weights, folder, num_workers=0, **options)
        assert caught.value.code == code
    narrow = tmp_path / "narrow.safetensors"
    am.save_model(tiny_model(0, hidden_dim=8), narrow)
    with pytest.raises(am.UserError, match="16 features"):
        am.predict(narrow, folder, num_workers=0, features=True, neighbors=1, reference=path)
    assert not (tmp_path / "folder").exists()
