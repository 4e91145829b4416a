"""`mixer predict`: lists, folders of parts, what is shown, what is refused."""

import io
import json
import sys
from pathlib import Path

import pytest

import allmlp as am
from conftest import draw, make_class_folder, mixer, refused, tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tiny_model(["ant", "bee", "cat"])
    return am.save_model(model, tmp_path / "model.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_class_folder(tmp_path / "photos", {"x": 5})


def give(monkeypatch: pytest.MonkeyPatch, data: bytes, is_terminal: bool = False) -> None:
    """Puts something on standard input."""
    stream = io.BytesIO(data)
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_list_on_standard_input(capsys, monkeypatch, model, photos, tmp_path, separator, ended):
    name = "with\nnewline.png" if separator == "\0" else " with spaces.png"
    draw(3).save(photos / name)
    paths = [photos / "x" / "3.png", photos / name, photos / "gone.png", photos / "x" / "0.png"]
    text = separator.join(map(str, paths)) + separator * ended
    give(monkeypatch, text.encode())
    output = tmp_path / "out.jsonl"
    code, out, err = mixer(capsys, "predict", model, "-", "--output", output)
    assert code == 3
    assert "written" in out
    assert "images/s" in out
    assert err == f"bad image: {paths[2]}: cannot read the file: No such file or directory\n"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in paths]


@pytest.mark.parametrize(("data", "terminal"), [(b"", False), (b"\n\n", False), (b"", True)])
def test_no_list_on_standard_input(capsys, monkeypatch, model, data, terminal):
    give(monkeypatch, data, terminal)
    code, _, err = mixer(capsys, "predict", model, "-")
    assert (code, "no images on standard input" in err) == (2, True)


def test_a_folder_of_parts(capsys, model, photos, tmp_path):
    flags = ("--output", tmp_path / "out", "--part-size", 2, "--format", "jsonl")
    code, out, err = mixer(capsys, "predict", model, photos, *flags)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"written  {tmp_path / 'out'}: 3 parts, 5 images"
    assert lines[1].startswith("time ")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", *(f"part-0000{n}-of-00003.jsonl" for n in range(3))]
    code, out, err = mixer(capsys, "predict", model, photos, *flags)
    assert (code, err) == (0, "")
    there, written = out.splitlines()
    assert there == "parts    3 of 3 are there already"
    assert written.startswith("written")
    err = refused(capsys, tmp_path, "predict", model, photos, *flags, "--top-k", 1)
    assert "top_k was 3 and is now 1" in err


def test_many_bad_images_are_counted_and_some_are_named(capsys, model, photos):
    for number in range(25):
        (photos / f"{number:02}.png").write_text("x")
    code, out, err = mixer(capsys, "predict", model, photos)
    assert code == 3
    assert err.count("bad image: ") == 20
    assert err.endswith("... and 5 more bad images\n")
    assert out.count(".png") == 5
