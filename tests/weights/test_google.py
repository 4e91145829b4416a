"""Google's .npz: the same bits in and out, both generations of names, any order of keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.weights import google
from conftest import GOLDEN, tiny_model

pytestmark = pytest.mark.numerics

PARAMS = GOLDEN / "official_tiny_params.npz"


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def first_generation(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The older names, written out by hand: LayerNorms numbered among all modules, extra axes."""
    names = {"stem": "embedding", "pre_head_layer_norm": "Mixer/encoder_norm", "head": "head"}
    old = {}
    for key, value in arrays.items():
        parts = key.split("/")
        if not parts[0].startswith("MixerBlock_"):
            old[f"{names[parts[0]]}/{parts[1]}"] = value
            continue
        block = f"Mixer/encoderblock_{parts[0].removeprefix('MixerBlock_')}"
        if parts[1].startswith("LayerNorm"):
            number = {"LayerNorm_0": "LayerNorm_0", "LayerNorm_1": "LayerNorm_2"}[parts[1]]
            old[f"{block}/{number}/{parts[2]}"] = value
        else:
            number = {"Dense_0": "1", "Dense_1": "2"}[parts[2]]
            old[f"{block}/{parts[1]}_phase_0/{parts[3]}{number}"] = value[None]
    return old


def test_the_golden_file_gives_googles_logits():
    model = am.load_model(PARAMS)
    with np.load(GOLDEN / "official_tiny_io.npz") as io:
        images = torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)
        expected = torch.from_numpy(io["logits"])
    assert (model(images) - expected).abs().max() <= 1e-5
    assert model.config.gelu == "tanh"
    assert model.config.num_blocks == 3
    assert model.config.image_size == (32, 32)
    assert model.preprocessing == am.Preprocessing(image_size=(32, 32))


def test_the_golden_round_trip_is_bit_for_bit(tmp_path: Path):
    path = am.save_model(am.load_model(PARAMS), tmp_path / "out.npz", format="google")
    before, after = arrays_of(PARAMS), arrays_of(path)
    assert set(before) == set(after)
    for key, value in before.items():
        assert after[key].dtype == value.dtype == np.float32
        assert after[key].shape == value.shape
        assert after[key].tobytes() == value.tobytes()


def test_the_older_generation_is_the_same_model(tmp_path: Path):
    arrays = arrays_of(PARAMS)
    path = tmp_path / "old.npz"
    np.savez(path, **first_generation(arrays))
    old, new = am.load_model(path), am.load_model(PARAMS)
    assert old.config == new.config
    for name, value in new.state_dict().items():
        assert torch.equal(old.state_dict()[name], value)


def test_writing_the_older_generation(tmp_path: Path):
    model = am.load_model(PARAMS)
    written = google.first_from_ours(dict(model.state_dict()))
    assert "Mixer/encoderblock_2/token_mixing_phase_0/kernel1" in written
    assert "embedding/kernel" in written
    google.write_npz(tmp_path / "old.npz", dict(model.state_dict()), first_generation=True)
    assert set(arrays_of(tmp_path / "old.npz")) == set(written)
    back = am.load_model(tmp_path / "old.npz").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(back[name], value)


def test_blocks_come_in_natural_order(tmp_path: Path):
    model = tiny_model(num_blocks=11).eval()
    path = am.save_model(model, tmp_path / "deep.npz", format="google")
    blocks = [key.split("/")[0] for key in arrays_of(path) if "token_mixing/Dense_0/kernel" in key]
    assert blocks == [f"MixerBlock_{number}" for number in range(11)]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(am.load_model(path)(images), model(images))


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_wrapped_trees(tmp_path: Path, prefix: str):
    arrays = {f"{prefix}{key}": value for key, value in arrays_of(PARAMS).items()}
    arrays["opt/state/step"] = np.array(3)
    path = tmp_path / "wrapped.npz"
    np.savez(path, **arrays)
    assert torch.equal(
        am.load_model(path).state_dict()["stem.weight"],
        am.load_model(PARAMS).state_dict()["stem.weight"],
    )


def test_bfloat16_is_read_exactly(tmp_path: Path):
    arrays, expected = {}, {}
    for key, value in arrays_of(PARAMS).items():
        tensor = torch.from_numpy(value).bfloat16()
        arrays[key] = tensor.view(torch.int16).numpy().view("V2")
        expected[key] = tensor.float()
    path = tmp_path / "half.npz"
    np.savez(path, **arrays)
    state = am.load_model(path).state_dict()
    for key, value in expected.items():
        assert torch.equal(google.from_ours(dict(state))[key], value)


def test_other_byte_and_axis_orders(tmp_path: Path):
    arrays = {
        key: np.asfortranarray(value.astype(">f4")) for key, value in arrays_of(PARAMS).items()
    }
    path = tmp_path / "big.npz"
    np.savez_compressed(path, **arrays)
    state, expected = am.load_model(path).state_dict(), am.load_model(PARAMS).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_what_the_layout_has_no_place_for_lies_beside_it(tmp_path: Path):
    model = tiny_model(num_classes=2, gelu="exact", image_size=(8, 16)).eval()
    model.class_names = ["ant", "bee"]
    model.preprocessing = am.Preprocessing(image_size=(8, 16), mean=0.0, std=1.0)
    path = am.save_model(model, tmp_path / "mine.npz", format="google")
    assert json.loads((tmp_path / "mine.json").read_text())["class_names"] == ["ant", "bee"]
    loaded = am.load_model(path)
    assert loaded.config == model.config
    assert (loaded.class_names, loaded.preprocessing) == (model.class_names, model.preprocessing)
    (tmp_path / "mine.json").unlink()
    with pytest.raises(am.UserError, match="8 patches of 4x4 pixels, which is no square"):
        am.load_model(path)
    assert am.load_model(path, image_size=(8, 16)).config.image_size == (8, 16)


def test_a_description_of_other_weights_is_left_aside(tmp_path: Path):
    """Another file of the same name was copied over mine.npz, as Google's four invite to."""
    model = tiny_model(num_classes=2, gelu="exact").eval()
    model.class_names = ["ant", "bee"]
    path = am.save_model(model, tmp_path / "mine.npz", format="google")
    other = am.save_model(tiny_model(num_classes=2, num_blocks=1), tmp_path / "b.npz", "google")
    path.write_bytes(other.read_bytes())
    loaded = am.load_model(path)
    assert (loaded.class_names, loaded.config.gelu) == (None, "tanh")


def test_somebody_elses_json_is_not_replaced(tmp_path: Path):
    (tmp_path / "mine.json").write_text('{"my": "notes"}')
    with pytest.raises(am.UserError, match="would be replaced, and it is not the description"):
        am.save_model(tiny_model(), tmp_path / "mine.npz", format="google")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.json"]


def test_half_precision_models_are_written_as_float32(tmp_path: Path):
    model = tiny_model().bfloat16()
    path = am.save_model(model, tmp_path / "half.npz", format="google")
    assert all(value.dtype == np.float32 for value in arrays_of(path).values())
    assert sorted(arrays_of(path)) == sorted(google.from_ours(dict(model.state_dict())))


def test_names_of_files_and_formats_go_together(tmp_path: Path):
    model = tiny_model()
    with pytest.raises(am.UserError, match=r"format google is a \.npz file[\s\S]*Call it x\.npz"):
        am.save_model(model, tmp_path / "x.safetensors", format="google")
    with pytest.raises(am.UserError, match=r"format timm is a \.safetensors file"):
        am.save_model(model, tmp_path / "x.npz", format="timm")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_named_as_in_the_file(tmp_path: Path):
    arrays = arrays_of(PARAMS)
    arrays["MixerBlock_1/LayerNorm_0/gamma"] = arrays.pop("MixerBlock_1/LayerNorm_0/scale")
    arrays["MixerBlock_2/token_mixing/Dense_0/kernel"] = np.zeros((64, 12), np.float32)
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    with pytest.raises(am.UserError) as caught:
        am.load_model(path)
    message = str(caught.value)
    assert "missing: MixerBlock_1/LayerNorm_0/scale (24,)" in message
    assert "extra: MixerBlock_1/LayerNorm_0/gamma (24,)" in message
    assert (
        "misshapen: MixerBlock_2/token_mixing/Dense_0/kernel is (64, 12), the architecture wants "
        "(16, 12)" in message
    )
    assert str(path) in message
    del arrays["stem/kernel"]
    np.savez(path, **arrays)
    with pytest.raises(am.UserError, match="the names are Google's, but stem/kernel is missing"):
        am.load_model(path)
    arrays = {key: value for key, value in arrays_of(PARAMS).items() if "Block_1" not in key}
    np.savez(path, **arrays)
    with pytest.raises(am.UserError, match=r"missing: MixerBlock_1/LayerNorm_0/bias \(24,\)"):
        am.load_model(path)


def test_a_file_of_something_else(tmp_path: Path):
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3, np.float32))
    with pytest.raises(am.UserError, match=r"no MLP-Mixer: none of the 1 tensors .*weights"):
        am.load_model(path)
    np.savez(path)
    with pytest.raises(am.UserError, match="not weights|without weights|no tensors|begins"):
        am.load_model(path)
