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
from conftest import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"


def shard_index(folder: Path, deep: str) -> Path:
    shutil.copy(GOLDEN / "old_shards" / "train-000000.tar", folder)
    path = folder / "train.index.safetensors"
    tensors = {"label": np.zeros(1, np.int64)}
    safetensors.numpy.save_file(tensors, path, {"allmlp_shards": deep})
    return path


def weights_header(folder: Path, deep: str) -> Path:
    path = folder / "model.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1)}, path, {"allmlp": deep})
    return path


def weights_config(folder: Path, deep: str) -> Path:
    am.save_model(tiny_model(), folder)
    (folder / "config.json").write_text(deep)
    return folder / "config.json"


def written(name: str) -> Callable[[Path, str], Path]:
    def write(folder: Path, deep: str) -> Path:
        (folder / name).write_text(deep)
        return folder / name

    return write


READERS: dict[str, tuple[Callable[[Path, str], Path], Callable[[Path], object]]] = {
    "packed data": (written("packed.json"), lambda path: open_source(str(path.parent))),
    "index of shards": (shard_index, lambda path: open_source(str(path.parent))),
    "header of weights": (weights_header, am.load_model),
    "description of weights": (weights_config, lambda path: am.load_model(path.parent)),
    "run": (written("config.json"), lambda path: config_of(path.parent)),
    "list": (written("list.jsonl"), lambda path: open_source(str(path))),
    "selection": (written("selection.json"), lambda path: open_source(str(path))),
}


@pytest.mark.parametrize("name", list(READERS))
@pytest.mark.parametrize("depth", [500, 5_000, 100_000])
def test_deep_json_is_one_error(tmp_path: Path, name: str, depth: int):
    write, read = READERS[name]
    path = write(tmp_path, '{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(am.UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
