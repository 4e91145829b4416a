"""Exported files, run by their own runtimes, against the models that they were made of."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

import allmlp as am
from allmlp.data.image import decode
from allmlp.data.sources import open_source
from allmlp.data.transforms import normalize
from allmlp.deploy import export_report
from allmlp.models.layers import preprocessing_of
from conftest import ROOT, draw, encode, mixer, tiny_model
from odd_images import NAMED, NOT_BY_PILLOW, REFUSED
from staged_models import small_cycle, small_permutator

WHY = "pip install 'allmlp[export]'"
onnx = pytest.importorskip("onnx", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)
pytest.importorskip("onnxruntime", reason=WHY)


def small_resnet() -> am.ImageClassifier:
    torch.manual_seed(0)
    model = am.create_model("small_resnet", 8, 5, width=8, num_stages=2, num_blocks=1)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    return model


FAMILIES: dict[str, Callable[[], am.ImageClassifier]] = {
    "not square": lambda: tiny_model(
        3, (8, 12), gelu="exact", in_channels=1, token_mixing="untied"
    ),
    "features": lambda: tiny_model(0),
    "grouped": lambda: tiny_model(token_mixing="grouped", token_groups=4),
    "views": lambda: tiny_model(token_mixing="views", token_groups=4),
    "pyramid": lambda: tiny_model(pyramid=((1, 2),)),
    "cycle_mlp": small_cycle,
    "vision_permutator": small_permutator,
    "small_resnet": small_resnet,
}


def random_images(model: am.ImageClassifier, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(count)
    shape = (count, model.config.in_channels, *model.config.image_size)
    return torch.randint(0, 256, shape, generator=random).byte()


@torch.no_grad()
def assert_equal(file: am.ExportedModel, model: am.ImageClassifier, limit: float = 1e-4) -> None:
    """Compares logits for a batch of one and of three images, to a share of the largest."""
    model.eval()
    for count in (1, 3):
        images = normalize(random_images(model, count), preprocessing_of(model))
        exact = model(images)
        assert (file(images) - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_onnx(family: str, tmp_path: Path):
    model = FAMILIES[family]()
    report = am.export(model, tmp_path / "m.onnx")
    assert report.passed, report.failures
    assert_equal(am.open_exported(tmp_path / "m.onnx"), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("not square", "float32"),
        ("not square", "bfloat16"),
        ("cycle_mlp", "bfloat16"),
        ("small_resnet", "bfloat16"),
    ],
)
def test_torch_export(family: str, precision: str, tmp_path: Path):
    model = FAMILIES[family]().eval()
    report = am.export(model, tmp_path / "m.pt2", precision=precision)
    assert report.passed, report.failures
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = normalize(random_images(model, 5), preprocessing_of(model))
    with torch.no_grad():
        exact, found = model(images), program(images)
    assert found.dtype == torch.float32
    error = float((found - exact).abs().max() / exact.abs().max())
    assert error <= 1e-5 if precision == "float32" else 1e-5 < error < 0.1


def test_a_file_is_one_file_and_tells_nothing_of_this_machine(tmp_path: Path):
    model = tiny_model()
    model.class_names = [f"class {at} é\n" for at in range(7)]
    model.source = "/home/somebody/runs/secret"
    report = am.export(model, tmp_path / "m.onnx")
    names = {each.name for each in tmp_path.iterdir()}
    assert names == {"m.onnx", "m.onnx.report.json", "m.onnx.report.md"}
    content = (tmp_path / "m.onnx").read_bytes()
    for word in (b"/work", b"site-packages", b"somebody", b".py", str(tmp_path).encode()):
        assert word not in content
    file = am.open_exported(tmp_path / "m.onnx")
    assert file.class_names == model.class_names
    assert file.preprocessing == preprocessing_of(model)
    assert file.config == model.config
    assert sum(each.numel() for each in file.parameters()) == sum(
        each.numel() for each in model.parameters()
    )
    values = json.loads((tmp_path / "m.onnx.report.json").read_text())
    assert values["kind"] == "export"
    assert values["export"]["passed"]
    assert values["export"]["files"] == {"m.onnx": len(content)}
    assert values["export"]["parity"]["largest_difference"] == report.parity.largest_difference
    page = (tmp_path / "m.onnx.report.md").read_text()
    assert "| agreement | 100.00% have the same top-1 class |" in page


def test_pixels_go_in_and_a_permutation_is_inside(tmp_path: Path):
    model = tiny_model()
    how = am.Preprocessing(
        image_size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), permutation="pixels"
    )
    model.preprocessing = how
    with pytest.raises(am.UserError, match="permuted pixels"):
        am.export(model, tmp_path / "m.onnx")
    am.export(model, tmp_path / "m.onnx", uint8_input=True)
    file = am.open_exported(tmp_path / "m.onnx")
    pixels = random_images(model, 3)
    with torch.no_grad():
        exact = model.eval()(normalize(pixels, how))
    raw = file.run(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))
    for found in (torch.from_numpy(raw), file(pixels)):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert file.preprocessing is not None
    assert file.preprocessing.permutation == "none"  # what is left to do outside
    torch.testing.assert_close(
        file(normalize(pixels, file.preprocessing)), exact, rtol=1e-4, atol=1e-4
    )
    given = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type
    assert given.elem_type == onnx.TensorProto.UINT8


@pytest.mark.slow
def test_bfloat16_halves_the_file(tmp_path: Path):
    model = tiny_model(hidden_dim=64, channels_mlp_dim=256)
    for precision in ("float32", "bfloat16"):
        am.export(model, tmp_path / f"{precision}.onnx", precision=precision)
    sizes = [(tmp_path / f"{each}.onnx").stat().st_size for each in ("float32", "bfloat16")]
    assert sizes[1] < 0.6 * sizes[0]
    assert_equal(am.open_exported(tmp_path / "bfloat16.onnx"), model, limit=0.05)
    with pytest.raises(AssertionError):
        assert_equal(am.open_exported(tmp_path / "bfloat16.onnx"), model)


@pytest.mark.slow
def test_a_grown_run_from_the_command_line(
    trained: am.TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, output = trained.run_folder, tmp_path / "digits16.onnx"
    code, out, err = mixer(
        capsys, "export", run, "--output", output, "--image-size", 16, "--data", "digits:test[:50]"
    )
    assert code == 0, err
    assert "16x16 pixels" in out
    assert "compared   50 images" in out
    assert out.endswith(f"written  {output}\n")
    assert_equal(am.open_exported(output), am.load_model(run, 16, quiet=True))
    code, _, err = mixer(capsys, "export", run, "--output", output)
    assert code == 2
    assert "already" in err


def test_a_file_that_fails_is_not_left_behind(
    trained: am.TrainResult,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(export_report.LARGEST_DIFFERENCE, "float32", -1.0)
    before = tmp_path / "m.onnx"
    before.write_bytes(b"the one before")
    code, out, _ = mixer(capsys, "export", trained.run_folder, "--output", before, "--overwrite")
    assert code == 1
    assert "failed" in out
    assert "removed" in out
    assert before.read_bytes() == b"the one before"
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


@pytest.fixture(scope="module")
def pixels_file(trained: am.TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixels") / "m.onnx"
    am.export(trained.run_folder, path, uint8_input=True)
    return path


def test_evaluate_runs_the_file(
    trained: am.TrainResult, pixels_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    lines = []
    for model in (trained.run_folder, pixels_file):
        code, out, err = mixer(capsys, "evaluate", model, "--data", "digits:test")
        assert code == 0, err
        lines.append([line for line in out.splitlines() if line.startswith(("top-1", "loss"))])
    assert lines[0] == lines[1]
    for flags in (["--image-size", 16], ["--resize-weights", "resample"]):
        code, _, err = mixer(capsys, "evaluate", pixels_file, "--data", "digits:test", *flags)
        assert (code, "one image size" in err) == (2, True)
    code, _, err = mixer(capsys, "convert", pixels_file, tmp_path / "x.safetensors")
    assert (code, "no weights" in err) == (2, True)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/classify_onnx.py as a module."""
    place = ROOT / "examples" / "classify_onnx.py"
    spec = importlib.util.spec_from_file_location("classify_onnx", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a model without class names."""
    path = tmp_path_factory.mktemp("nameless") / "x.onnx"
    am.export(tiny_model(num_classes=7), path)
    return path


def test_the_example_answers_as_we_do_for_every_kind_of_image(
    example: ModuleType, nameless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        **{name: data for name, (data, _) in NAMED.items() if name not in NOT_BY_PILLOW},
        "turned": encode(draw(1), exif=exif),
        "jpeg": encode(draw(2), "JPEG", quality=95, exif=exif),
        "grey_jpeg": encode(draw(3).convert("L"), "JPEG", quality=95),
        "cmyk_jpeg": encode(draw(4).convert("CMYK"), "JPEG"),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in kinds]
    example.main(str(nameless), paths)
    lines = capsys.readouterr().out.splitlines()
    for line, expected in zip(lines, am.predict(nameless, paths, num_workers=0), strict=True):
        assert expected.error is None
        path, _, answers = line.rpartition(": ")
        assert path == expected.path
        shares = {each.split()[0]: float(each.split()[1][:-1]) for each in answers.split(",")}
        for best, share in expected.classes:
            assert shares[best] == pytest.approx(share * 100, abs=0.5), line


def test_the_example_gives_the_pixels_of_the_decoder(example: ModuleType, tmp_path: Path):
    path = tmp_path / "x"
    for channels in (3, 1):
        how = {"exif_orientation": True, "channels": channels}
        for name, (data, _) in NAMED.items():
            path.write_bytes(data)
            try:
                image = example.decode(path, how)
            except UnidentifiedImageError:
                assert name in NOT_BY_PILLOW
                continue
            pixels = np.asarray(image).reshape(5, 5, channels)
            assert (pixels == decode(data, name, channels)).all(), name
    for data, _ in REFUSED.values():
        path.write_bytes(data)
        with pytest.raises((ValueError, UnidentifiedImageError)):
            example.decode(path, {"exif_orientation": True, "channels": 3})


def test_a_file_without_class_names_has_numbers_and_says_how_images_are_decoded(
    nameless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.png").write_bytes(encode(draw(1)))
    flags = ("--top-k", "7")
    code, out, err = mixer(capsys, "predict", nameless, tmp_path / "a.png", *flags)
    assert code == 0
    assert "the model carries no class names" in err
    assert sorted(re.findall(r"(\d) [\d.]+%", out)) == list("0123456")
    code, _, err = mixer(capsys, "evaluate", nameless, "--data", "digits:test")
    assert code == 2
    assert "carries no class names" in err
    assert "Export it again" in err
    said = {each.key: each.value for each in onnx.load(nameless).metadata_props}
    for word in ("EXIF", "2^bits - 1", "white", "first frame", "refused"):
        assert word.lower() in said["decoding"].lower()


@pytest.mark.slow
def test_the_example_needs_nothing_of_ours(
    trained: am.TrainResult, pixels_file: Path, tmp_path: Path
):
    (tmp_path / "a.png").write_bytes(open_source("digits:test").read(0))
    program = ROOT / "examples" / "classify_onnx.py"
    text = program.read_text()
    assert "allmlp" not in text
    assert "import torch" not in text
    expected = am.predict(trained.run_folder, [tmp_path / "a.png"], top_k=5)
    classes = ", ".join(f"{name} {share:.1%}" for name, share in expected[0].classes)
    am.export(trained.run_folder, tmp_path / "floats.onnx")
    for path in (tmp_path / "floats.onnx", pixels_file):
        command = [sys.executable, str(program), str(path), str(tmp_path / "a.png")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path / 'a.png'}: {classes}\n"


@pytest.mark.slow
def test_the_example_crops_small_images_where_the_file_says_so(tmp_path: Path):
    model = tiny_model(image_size=16)
    model.class_names = [f"class {at}" for at in range(7)]
    draw(0, (12, 10)).save(tmp_path / "a.png")
    said = []
    for crop_small in (False, True):
        model.preprocessing = am.Preprocessing(image_size=(16, 16), crop=0.6, crop_small=crop_small)
        am.export(model, tmp_path / "m.onnx", overwrite=True)
        expected = am.predict(model, [tmp_path / "a.png"], top_k=5)[0].classes
        program = str(ROOT / "examples" / "classify_onnx.py")
        command = [sys.executable, program, str(tmp_path / "m.onnx"), str(tmp_path / "a.png")]
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert said[-1].endswith(
            ", ".join(f"{name} {share:.1%}" for name, share in expected) + "\n"
        )
        found = am.predict(tmp_path / "m.onnx", [tmp_path / "a.png"], top_k=5)[0].classes
        assert [name for name, _ in found] == [name for name, _ in expected]
    assert said[0] != said[1]
