"""JSON nested as deep as its file is long: one error that names the file, whoever reads it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import allmlp as am
from allmlp.data.sources import open_source
from allmlp.training.run_folder import config_of
from conftest import GOLDEN, tiny_model

READERS: dict[str, Callable[[Path], object]] = {
    "packed/packed.json": lambda path: open_source(str(path.parent)),
    "shards/train.index.safetensors": lambda path: open_source(str(path.parent)),
    "weights/model.safetensors": am.load_model,
    "model/config.json": lambda path: am.load_model(path.parent),
    "run/config.json": lambda path: config_of(path.parent),
    "lists/list.jsonl": lambda path: open_source(str(path)),
    "lists/selection.json": lambda path: open_source(str(path)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("depth", [500, 5_000, 100_000])
def test_deep_json_is_one_error(tmp_path: Path, name: str, depth: int):
    am.save_model(tiny_model(), tmp_path / "model")
    shutil.copytree(GOLDEN / "old_shards", tmp_path / "shards")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    deep = '{"a":' * depth + "1" + "}" * depth
    if path.suffix == ".safetensors":
        metadata = {"allmlp": deep, "allmlp_shards": deep}
        safetensors.numpy.save_file({"label": np.zeros(1, np.int64)}, path, metadata)
    else:
        path.write_text(deep)
    with pytest.raises(am.UserError) as caught:
        READERS[name](path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
