"""`--json`, `--quiet` and `--config` of the commands."""

import json

import pytest

from allmlp import __version__
from conftest import draw, mixer, ran


@pytest.fixture
def run(trained):
    return trained.run_folder


def only_object(out: str) -> dict:
    values = json.loads(out)
    assert values["allmlp"] == __version__
    return values


def test_json_is_the_only_output_and_holds_the_result(run, tmp_path, capsys):
    line = ("evaluate", run, "--data", "digits:test", "--output", tmp_path / "e", "--json")
    out, err = ran(capsys, *line)
    assert "top-1" in err
    found, file = only_object(out), json.loads((tmp_path / "e/evaluation.json").read_text())
    assert found["source"] == str(run)
    assert found["top1"] == file["top1"]


@pytest.mark.parametrize(
    "line", ["models", "models --weights", "env", "data check digits", "--help"]
)
def test_every_command_prints_one_object(line, capsys):
    out, _ = ran(capsys, *line.split(), "--json")
    assert only_object(out)


def test_json_of_predictions_has_every_image_and_keeps_the_exit_code(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    draw(0).save(tmp_path / "good.png")
    code, out, _ = mixer(capsys, "predict", run, tmp_path, "--json", "--top-k", 1)
    assert code == 3
    bad, good = only_object(out)["predictions"]
    assert bad["error"]
    assert len(good["classes"]) == 1


@pytest.mark.parametrize(
    ("line", "code"),
    [("models --sizes 3", "usage"), ("modles", "unknown-name"), ("finetune x", "missing")],
)
def test_json_of_an_error(line, code, capsys):
    exit_code, out, err = mixer(capsys, *line.split(), "--json")
    assert exit_code == 2
    error = only_object(out)["error"]
    assert set(error) == {"code", "what", "where", "fix"}
    assert error["code"] == code
    assert err


def test_quiet_prints_errors_only(run, capsys):
    assert mixer(capsys, "evaluate", run, "--data", "digits:test", "--quiet") == (0, "", "")
    code, out, err = mixer(capsys, "evaluate", run, "--data", "nothing", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


def test_config_gives_options_and_flags_win(tmp_path, capsys):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"image_size": [64, 32], "num_classes": 3, "weights": False}))
    found = only_object(mixer(capsys, "models", "--config", file, "--json")[1])["models"]
    assert {tuple(model["image_size"]) for model in found} == {(64, 32)}
    line = ("models", f"--config={file}", "--image-size", 128, "--json")
    found = only_object(mixer(capsys, *line)[1])["models"]
    assert {tuple(model["image_size"]) for model in found} == {(128, 128)}
    file.write_text(json.dumps({"set": {"token_mixing": "untied"}}))
    found = only_object(mixer(capsys, "models", "--config", file, "--json")[1])["models"]
    assert found
    assert all(model["name"].startswith("mixer") for model in found)


def test_settings_of_config_and_of_the_line_add_up(tmp_path, capsys):
    file, run = tmp_path / "options.json", tmp_path / "run"
    sizes = {"hidden_dim": 8, "num_blocks": 1, "tokens_mlp_dim": 8, "channels_mlp_dim": 8}
    own = {f"model.overrides.{name}": value for name, value in sizes.items()}
    file.write_text(json.dumps({"set": {**own, "epochs": 3, "patience": 2}}))
    line = ("train", "--config", file, "--set", "epochs=1", "--output", run, "--device", "cpu")
    assert mixer(capsys, *line)[0] == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["patience"]) == (1, 2)
    assert config["model"]["overrides"]["hidden_dim"] == 8


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"image_sise": 3}', "unknown-name"),
        ('{"image_size": "big"}', "usage"),
        ('{"version": 2}', "invalid"),
        ("[1]", "invalid"),
        (None, "missing-file"),
    ],
)
def test_a_wrong_config_is_one_error(text, code, tmp_path, capsys):
    file = tmp_path / "options.json"
    if text is not None:
        file.write_text(text)
    exit_code, out, _ = mixer(capsys, "models", "--config", file, "--json")
    assert exit_code == 2
    assert only_object(out)["error"]["code"] == code


def test_config_of_a_run_repeats_it_in_another_folder(run, tmp_path, capsys):
    again = tmp_path / "b"
    line = ("train", "--config", run / "config.json", "--output", again, "--seed", 1, "--json")
    assert only_object(ran(capsys, *line)[0])["run_folder"] == str(again)
    first, second = (json.loads((path / "config.json").read_text()) for path in (run, again))
    assert second == {**first, "seed": 1, "output": str(again)}
