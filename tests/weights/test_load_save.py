"""Models to and from files: the same bits back, and one clear error for everything else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import allmlp as am
from allmlp import io
from allmlp.models.layers import classes_of, preprocessing_of
from allmlp.weights.description import WEIGHTS
from conftest import draw, mixer, tiny_model, user_error


def saved(tmp_path: Path, **changes: object) -> tuple[am.ImageClassifier, Path]:
    model = tiny_model(["ant", "bee", "cat"], **changes)
    model.preprocessing = am.Preprocessing(image_size=(8, 8), resize="squash", std=0.25)
    folder = tmp_path / "model"
    am.save_model(model, folder)
    return model, folder


def assert_same_model(first: am.ImageClassifier, second: am.ImageClassifier) -> None:
    assert first.config == second.config
    assert first.class_names == second.class_names
    assert first.preprocessing == second.preprocessing
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    for (name, a), (other, b) in pairs:
        assert name == other
        assert torch.equal(a, b)


def test_round_trips(tmp_path: Path):
    model, folder = saved(tmp_path, gelu="exact", stochastic_depth=0.1)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = am.load_model(folder)
    assert_same_model(loaded, model)
    assert not loaded.training
    alone = am.save_model(model, tmp_path / "new" / "alone.safetensors")
    assert_same_model(am.load_model(str(alone)), model)
    text = (folder / "config.json").read_text()  # it counts for a folder, not for other files
    (folder / "config.json").write_text(text.replace('"bee"', '"wasp"'))
    assert am.load_model(folder).class_names == ["ant", "wasp", "cat"]
    am.save_model(model, folder / "other.safetensors")
    assert am.load_model(folder / "other.safetensors").class_names == ["ant", "bee", "cat"]
    (folder / "config.json").write_text('{"recipe": "digits"}')  # of another program
    assert am.load_model(folder / WEIGHTS).class_names == ["ant", "bee", "cat"]


def test_a_file_without_a_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, folder = saved(tmp_path)
    save_file(dict(model.state_dict()), folder / WEIGHTS)
    assert_same_model(am.load_model(folder), model)
    (folder / "config.json").unlink()  # now only the tensors say what they are
    loaded = am.load_model(folder)
    assert loaded.config == model.config
    assert loaded.class_names is None
    assert loaded.preprocessing == am.Preprocessing(image_size=(8, 8))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Google's is assumed" in captured.err
    am.load_model(folder, quiet=True)
    assert capsys.readouterr().err == ""


def test_another_number_of_classes(tmp_path: Path):
    model, folder = saved(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    loaded = am.load_model(folder, num_classes=5)
    assert torch.equal(torch.rand(1), expected)  # loading draws no random numbers
    assert (loaded.config.num_classes, loaded.class_names) == (5, None)
    assert loaded.preprocessing == model.preprocessing
    assert am.load_model(folder, num_classes=3).class_names == ["ant", "bee", "cat"]


def test_another_image_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = saved(tmp_path)
    assert am.load_model(folder, image_size=8).config.image_size == (8, 8)
    assert capsys.readouterr().err == ""
    grown = am.load_model(folder, image_size=(16, 24))
    assert grown.config.image_size == (16, 24)
    assert grown.preprocessing == am.Preprocessing(image_size=(16, 24), resize="squash", std=0.25)
    assert grown.class_names == ["ant", "bee", "cat"]
    assert "8x8 -> 16x24 pixels: block-diagonal, 2x3 tiles" in capsys.readouterr().err
    for wrong in ("16", -8, (8, 8, 8), (8, 0), (8.0, 8), 11):
        with pytest.raises(am.UserError):
            am.load_model(folder, image_size=wrong)
    with user_error("unknown-name"):
        am.load_model(folder, image_size=16, resize_weights="bigger")


def test_names_and_places_that_cannot_be(tmp_path: Path):
    places = (tmp_path / "nowhere", tmp_path, "~nosuchuser/x", "x" * 300, "~nosuchuser/x.npz")
    for source in places:
        with pytest.raises(am.UserError):
            am.load_model(source)
    model = tiny_model()
    for target, format, named in (
        ("~nosuchuser/x", "allmlp", "nosuchuser"),
        (tmp_path / "caf\udce9", "allmlp", "UTF-8"),
        (tmp_path / "x", "onnx", "'onnx'"),
        (tmp_path / "x.safetensors", "google", "Call it x.npz"),
        (tmp_path / "x.npz", "timm", "Call it x.safetensors"),
    ):
        with pytest.raises(am.UserError, match=named):
            am.save_model(model, target, format)
    assert not list(tmp_path.iterdir())
    with pytest.raises(am.UserError, match="GiB"):
        am.load_model(am.save_model(model, tmp_path / "x"), num_classes=10**12)


def test_what_is_not_a_model_of_ours_is_not_replaced(tmp_path: Path, trained: am.TrainResult):
    config = (trained.run_folder / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "mine.json").write_text('{"my": "notes"}')
    targets = (
        (trained.run_folder, "allmlp"),
        (tmp_path, "allmlp"),
        (tmp_path / "mine.npz", "google"),
    )
    for target, format in targets:
        with pytest.raises(am.UserError, match="not the description of a model"):
            am.save_model(tiny_model(), target, format, overwrite=True)
    assert (tmp_path / "config.json").read_bytes() == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "mine.json"]


def test_what_a_model_carries(tmp_path: Path, trained: am.TrainResult):
    with pytest.raises(am.UserError, match="no class names"):
        classes_of(tiny_model(num_classes=2))
    names = [str(number) for number in range(12)]  # names do not make a head answer
    fresh = am.load_model(trained.run_folder, num_classes=12, class_names=names, quiet=True)
    path = am.save_model(fresh, tmp_path / "new.safetensors")
    for act in (
        lambda: am.evaluate(fresh, "digits:test"),
        lambda: am.predict(path, "digits:test"),
        lambda: am.export(fresh, tmp_path / "m.pt2"),
    ):
        with pytest.raises(am.UserError, match=r"for 12 classes is new"):
            act()
    with pytest.raises(am.UserError, match="no head"):
        am.predict(am.load_model(trained.run_folder, num_classes=0, quiet=True), "digits:test")
    with pytest.raises(am.UserError, match="got -1"):
        am.load_model(trained.run_folder, num_classes=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_float32_in_memory(tmp_path: Path, dtype: torch.dtype):
    model, folder = saved(tmp_path)
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    for name, value in am.load_model(folder).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float())


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_weights_that_are_not_finite(tmp_path: Path, bad: str):
    model, path = tiny_model(), tmp_path / "m.safetensors"
    weight = model.blocks[1].channel_mixing.dense_0.weight
    weight.data[0] = 3e38  # finite, as their sum is not
    am.save_model(model, path)
    assert am.load_model(path, quiet=True).state_dict().keys() == model.state_dict().keys()
    weight.data[1, :2] = float(bad)
    am.save_model(model, path, overwrite=True)
    with pytest.raises(am.UserError, match=r"blocks.1.*weight .*: 2 of its") as caught:
        am.load_model(path, quiet=True)
    assert caught.value.code == "not-finite"


def test_the_file_may_change_after_loading(tmp_path: Path):
    """What `cp other model.safetensors` does: it empties the file under us."""
    model, folder = saved(tmp_path)
    pickled = tmp_path / "weights.pth"
    torch.save(model.state_dict(), pickled)
    for path in (folder / "model.safetensors", pickled):
        loaded = am.load_model(path, quiet=True)
        with path.open("rb+") as file:
            file.truncate(100)
        assert torch.equal(loaded.stem.weight, model.stem.weight)
        assert loaded(torch.zeros(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("format", ["allmlp", "timm", "google"])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_weights_and_description_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, failing: int
):
    first, _ = saved(tmp_path, gelu="exact")
    target = tmp_path / ("x.npz" if format == "google" else "x")
    am.save_model(first, target, format)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    second = tiny_model(num_classes=3, hidden_dim=8)
    with pytest.raises(am.UserError, match="No space left on device"):
        am.save_model(second, target, format, overwrite=True)
    calls.clear()
    with pytest.raises(am.UserError, match="No space left on device"):
        am.save_model(second, tmp_path / f"new{target.suffix}", format)
    monkeypatch.undo()
    assert_same_model(am.load_model(target), first)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and "new" in str(file)]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_save_killed_between_its_renames_is_seen(tmp_path: Path):
    """New weights beside the old description: the header, which is of the new ones, counts."""
    _, folder = saved(tmp_path)
    old = (folder / "config.json").read_bytes()
    second = tiny_model(num_classes=3, gelu="exact", num_blocks=1).eval()
    am.save_model(second, folder, overwrite=True)
    (folder / "config.json").write_bytes(old)
    assert_same_model(am.load_model(folder), second)


def test_foreign_weights_take_class_names_mean_and_std(tmp_path, capsys):
    foreign = tmp_path / "foreign.safetensors"
    save_file(dict(tiny_model(num_classes=3).state_dict()), foreign)
    (tmp_path / "names.txt").write_text("ant\nbee \ncat\n")
    (tmp_path / "names.json").write_text('["ant", "bee", "cat"]')
    given = {"mean": (0.4, 0.5, 0.6), "std": 0.25}
    model = am.load_model(foreign, class_names=tmp_path / "names.txt", **given)
    assert model.class_names == ["ant", "bee", "cat"]
    assert model.preprocessing == am.Preprocessing(image_size=(8, 8), **given)
    options = ["--class-names", tmp_path / "names.json", "--mean", 0.4, 0.5, 0.6, "--std", 0.25]
    assert mixer(capsys, "convert", foreign, tmp_path / "own", *options)[0] == 0
    own = am.load_model(tmp_path / "own")
    assert (own.class_names, own.preprocessing) == (model.class_names, model.preprocessing)
    draw(1).save(tmp_path / "a.png")
    code, out, err = mixer(capsys, "predict", foreign, tmp_path / "a.png", *options)
    assert (code, "ant" in out) == (0, True), err
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    wrongs: list[dict[str, Any]] = [
        {"class_names": str(tmp_path / "names.txt")},
        {"class_names": tmp_path / "none.txt"},
        {"class_names": foreign},
        {"mean": (0.1, 0.2)},
        {"std": (0.0,)},
    ]
    for wrong in wrongs:
        with pytest.raises(am.UserError) as caught:
            am.load_model(foreign, **wrong)
        assert caught.value.where, wrong
        with pytest.raises(am.UserError):
            am.predict(model, tmp_path / "a.png", **wrong)  # a model object has its own


def test_a_head_that_was_replaced_is_saved_as_it_is(tmp_path: Path):
    model = tiny_model(num_classes=7)
    model.head = torch.nn.Linear(model.config.hidden_dim, 3)
    model.class_names = ["ant", "bee", "cat"]
    am.save_model(model, tmp_path / "m")
    loaded, images = am.load_model(tmp_path / "m"), torch.randn(2, 3, 8, 8)
    assert (loaded.config.num_classes, loaded.class_names) == (3, model.class_names)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_heads_of_other_kinds(tmp_path: Path):
    model = tiny_model(num_classes=10)
    plain = [row.classes for row in am.predict(model, "digits:test[:5]")]
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.1), model.head)
    assert [row.classes for row in am.predict(model, "digits:test[:5]")] == plain
    model.head = None
    with pytest.raises(am.UserError, match="no head"):
        am.predict(model, "digits:test[:5]")


def test_a_model_of_other_channels_takes_arrays(tmp_path: Path):
    rules = preprocessing_of(tiny_model(in_channels=4))
    assert (rules.channels, rules.kind, rules.mean, rules.std) == (4, "arrays", 0.0, 1.0)
