"""Exported files, run by their own runtimes, against the models that they were made from."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import UnidentifiedImageError

import allmlp as am
import fake_timm
from allmlp.data.image import decode
from allmlp.data.sources import open_source
from allmlp.data.transforms import normalize
from allmlp.deploy import export as module
from allmlp.deploy import onnx_graph
from allmlp.evaluation import metrics
from allmlp.models.layers import preprocessing_of
from conftest import ROOT, draw, encode, mixer, ran, refused, tiny_model, turned, user_error
from odd_images import NAMED, NOT_BY_PILLOW, REFUSED
from staged_models import small_cycle, small_permutator

WHY = "pip install 'allmlp[export]'"
onnx = pytest.importorskip("onnx", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)
pytest.importorskip("onnxruntime", reason=WHY)
EXAMPLE = ROOT / "examples" / "classify_onnx.py"


def small_resnet() -> am.ImageClassifier:
    torch.manual_seed(0)
    model = am.create_model("small_resnet", 8, 5, width=8, num_stages=2, num_blocks=1)
    torch.nn.init.normal_(model.head.weight)
    return model


FAMILIES: dict[str, Callable[[], am.ImageClassifier]] = {
    "not square": lambda: tiny_model(
        3, (8, 12), gelu="exact", in_channels=1, token_mixing="untied"
    ),
    "grouped pyramid": lambda: tiny_model(
        token_mixing="grouped", token_groups=4, pyramid=((1, 2),)
    ),
    "views, features": lambda: tiny_model(0, token_mixing="views", token_groups=4),
    "cycle_mlp": small_cycle,
    "vision_permutator": small_permutator,
    "small_resnet": small_resnet,
}


def random_images(model: am.ImageClassifier, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(count)
    shape = (count, model.config.in_channels, *model.config.image_size)
    return torch.randint(0, 256, shape, generator=random).byte()


@torch.no_grad()
def error(file: Any, model: am.ImageClassifier, pixels: torch.Tensor) -> float:
    """The largest difference of a logit, as a fraction of the largest logit."""
    images = normalize(pixels, preprocessing_of(model))
    exact = model.eval()(images)
    return float((file(images) - exact).abs().max() / exact.abs().max())


def assert_equal(file: am.ExportedModel, model: am.ImageClassifier, limit: float = 1e-4) -> None:
    for count in (1, 3):  # a batch may have any size
        assert error(file, model, random_images(model, count)) <= limit


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
    model = FAMILIES[family]()
    report = am.export(model, tmp_path / "m.pt2", precision=precision)
    assert report.passed, report.failures
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = random_images(model, 5)
    with torch.no_grad():
        logits = program(normalize(images, preprocessing_of(model)))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # the head's are not rounded
    found = error(program, model, images)
    assert found <= 1e-5 if precision == "float32" else 1e-5 < found < 0.1


@pytest.mark.slow
def test_a_file_describes_itself_and_does_not_reveal_this_machine(tmp_path: Path):
    model = tiny_model([f"class {at} é\n" for at in range(7)])
    model.source = "/home/somebody/runs/secret"
    report = am.export(model, tmp_path / "m.onnx")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m.onnx", "m.onnx.report.json"}
    content = (tmp_path / "m.onnx").read_bytes()
    for word in (b"/work", b"site-packages", b"somebody", b".py", str(tmp_path).encode()):
        assert word not in content
    file = am.open_exported(tmp_path / "m.onnx")
    assert file.class_names == model.class_names
    assert file.preprocessing == preprocessing_of(model)
    assert file.config == model.config
    assert file.info.num_parameters == sum(weight.numel() for weight in model.parameters())
    values = json.loads((tmp_path / "m.onnx.report.json").read_text())
    assert (values["kind"], values["export"]["passed"]) == ("export", True)
    assert values["export"]["files"] == {"m.onnx": len(content)}
    assert values["export"]["parity"]["largest_difference"] == report.parity.largest_difference
    assert all(speed["latency_ms"] > 0 for speed in values["export"]["speed"].values())


@pytest.mark.slow
def test_uint8_input_with_the_permutation_inside(tmp_path: Path):
    model = tiny_model()
    how = am.Preprocessing(
        image_size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), permutation="pixels"
    )
    model.preprocessing = how
    with pytest.raises(am.UserError) as caught:
        am.export(model, tmp_path / "m.onnx")
    assert caught.value.where == "uint8_input"
    am.export(model, tmp_path / "m.onnx", uint8_input=True)
    file = am.open_exported(tmp_path / "m.onnx")
    pixels = random_images(model, 3)
    with torch.no_grad():
        exact = model.eval()(normalize(pixels, how))
    assert file.preprocessing.permutation == "none"  # what is left to do outside
    raw = file.run(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))
    for found in (torch.from_numpy(raw), file(pixels), file(normalize(pixels, file.preprocessing))):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    given = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type
    assert given.elem_type == onnx.TensorProto.UINT8


@pytest.mark.slow
def test_a_resized_run_from_the_command_line(trained, tmp_path, capsys):
    run, output = trained.run_folder, tmp_path / "digits16.onnx"
    flags = ("--image-size", 16, "--data", "digits:test[:50]")
    out, _ = ran(capsys, "export", run, "--output", output, *flags)
    assert "16x16 pixels" in out
    assert "compared    50 images" in out
    assert out.endswith(f"written  {output}\n")
    assert_equal(am.open_exported(output), am.load_model(run, 16, quiet=True))
    assert str(output) in refused(capsys, tmp_path, "export", run, "--output", output)


@pytest.mark.slow
def test_a_file_that_fails_is_not_kept(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(module.LARGEST_DIFFERENCE, "float32", -1.0)
    before = tmp_path / "m.onnx"
    before.write_bytes(b"the one before")
    code, out, _ = mixer(capsys, "export", trained.run_folder, "--output", before, "--overwrite")
    assert (code, "failed" in out) == (1, True)
    assert before.read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_the_criteria():
    exact, single = np.array([[1.0, 0.0], [0.0, 2.0]]), am.Decision()
    same = module.compare(exact, exact, "x", single)
    assert (same.top1_agreement, same.largest_difference, same.drop) == (1.0, 0.0, 0.0)
    assert same.failures("float32", 0.0) == []
    found = module.compare(exact, exact[:, ::-1], "x", single)
    other = dataclasses.replace(found, accuracy=(0.9, 0.894))
    assert other.top1_agreement == 0.0
    assert len(other.failures("float32", 0.5)) == 2
    assert len(other.failures("int8", 0.5)) == 1
    assert other.failures("int8", 0.6) == []
    unknown = module.compare(exact, exact * float("nan"), "x", single)
    assert len(unknown.failures("int8", 100.0)) == 1
    several = am.Decision(labels="multi", thresholds=(0.9, 0.5))  # the first logits: from 2.2 on
    changed = exact + np.array([[0.0, 0.1], [0.0, -0.1]])
    assert module.compare(exact, changed, "x", several).top1_agreement == 1.0
    changed = exact - np.array([0.0, 0.1])
    assert module.compare(exact, changed, "x", several).top1_agreement == 0.5


@pytest.mark.slow
def test_several_labels_per_image(example: SimpleNamespace, tmp_path: Path, capsys):
    """Their metric is the mean average precision; the answers are all classes that reach theirs."""
    model = tiny_model(["ant", "bee", "cat"])
    model.decision = am.Decision(labels="multi", temperature=0.5, thresholds=(0.45, 0.5, 0.55))
    paths = [tmp_path / f"{at}.png" for at in range(8)]
    for at, path in enumerate(paths):
        draw(at).save(path)
    lines = [f"{path},{'ant|bee' if at % 2 else 'cat'}" for at, path in enumerate(paths)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    report = am.export(model, tmp_path / "m.onnx", data=str(tmp_path / "list.csv"))
    text = "\n".join(report.lines())
    before = am.evaluate(model, str(tmp_path / "list.csv")).mean_average_precision
    assert f"mAP         {before:.2%} original, {before:.2%} file" in text
    assert "100.00% have the same labels" in text
    assert "accuracy" not in text
    expected = am.predict(model, paths, num_workers=0)
    assert len({len(row.answers) for row in expected}) > 1
    example.main(str(tmp_path / "m.onnx"), list(map(str, paths)))
    for line, row in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        said = line.removeprefix(f"{row.path}: ").split(", ")
        names = [text.rpartition(" ")[0] for text in said if text != "none of the classes"]
        assert names == [name for name, _ in row.classes if name in row.answers]


def test_the_example_says_unsure(example: SimpleNamespace, nameless: Path, tmp_path: Path, capsys):
    draw(0).save(tmp_path / "a.png")
    for unsure_below in (0.05, 0.99):
        entry = {"decision": json.dumps({"unsure_below": unsure_below})}
        path = rewritten(nameless, entry, tmp_path / "m.onnx")
        example.main(str(path), [str(tmp_path / "a.png")])
        assert (": unsure (" in capsys.readouterr().out) is (unsure_below > 0.5)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "ending": ("m.tflite", {}, "m.tflite"),
    "precision": ("m.onnx", {"precision": "float16"}, "float16"),
    "no calibration": ("m.onnx", {"precision": "int8", "data": "digits:test"}, "calibration"),
    "no data": ("m.onnx", {"precision": "int8", "calibration": "digits:train"}, "data"),
    "int8": ("m.pt2", {"precision": "int8", "calibration": "a", "data": "b"}, ".pt2"),
    "drop": ("m.onnx", {"max_accuracy_drop": -1.0}, "-1.0"),
    "drop nan": ("m.onnx", {"max_accuracy_drop": float("nan")}, "nan"),
    "name": ("m.onnx", {"overwite": True}, "overwrite"),
    "calibration for float32": ("m.onnx", {"calibration": "digits:train"}, "int8"),
    "resizing": ("m.onnx", {"resize_weights": "resample"}, "image_size"),
    "size of a model in memory": ("m.onnx", {"image_size": 16}, "image_size"),
    "no folder": ("nowhere/m.onnx", {}, "nowhere"),
    "folder": ("folder.onnx", {}, "folder.onnx"),
    "there": ("there.onnx", {}, "there.onnx"),
    "a report there": ("reported.onnx", {}, "reported.onnx.report.json"),
    "weights there": ("pair.xml", {}, "pair.bin"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named_and_nothing_is_written(name: str, tmp_path: Path):
    (tmp_path / "folder.onnx").mkdir()
    for file in ("there.onnx", "reported.onnx.report.json", "pair.bin"):
        (tmp_path / file).write_bytes(b"theirs")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    output, options, word = WRONG[name]
    with pytest.raises(am.UserError, match=re.escape(word)):
        am.export(tiny_model(), tmp_path / output, **options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_the_weights_are_not_overwritten(tmp_path: Path):
    torch.save(tiny_model().state_dict(), tmp_path / "m.bin")
    before = (tmp_path / "m.bin").read_bytes()
    with pytest.raises(am.UserError, match="input"):
        am.export(tmp_path / "m.bin", tmp_path / "m.xml", overwrite=True)
    assert (tmp_path / "m.bin").read_bytes() == before


def test_more_logits_than_an_evaluation_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "LARGEST_LOGITS", 0)
    monkeypatch.chdir(tmp_path)
    model = tiny_model([*"0123456789"])
    assert am.export(model, "m.onnx", precision="bfloat16", data="digits:test[:20]").passed
    result = am.evaluate("m.onnx", "digits:test[:20]")
    assert result.precision == "bfloat16 (of the file)"


def test_weights_that_do_not_fit_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_graph, "LARGEST", 100)
    with user_error("too-large"):
        am.export(tiny_model(), tmp_path / "m.onnx")


# --- exported files where a model is taken --------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the digits' classes, m.safetensors, and beside it m.onnx, the file of it."""
    folder, model = tmp_path_factory.mktemp("exported"), tiny_model([*"0123456789"])
    model.head.weight.data.mul_(0.1)  # no class is certain
    am.save_model(model, folder / "m.safetensors")
    am.export(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_evaluate_runs_the_file(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    lines = []
    for model in (exported.with_suffix(".safetensors"), exported):
        out, _ = ran(capsys, "evaluate", model, "--data", "digits:test")
        lines.append([line for line in out.splitlines() if line.startswith(("top-1", "loss"))])
    assert lines[0] == lines[1]
    for flags in (["--image-size", 16], ["--device", "cuda"]):
        line = ("evaluate", exported, "--data", "digits:test", *flags)
        assert "an exported file" in refused(capsys, tmp_path, *line)
    line = ("convert", exported, tmp_path / "x.safetensors")
    assert str(exported) in refused(capsys, tmp_path, *line)


def test_what_needs_weights_or_features_is_an_error(exported: Path, tmp_path: Path):
    file = am.open_exported(exported)
    for use in (
        lambda: am.save_model(file, tmp_path / "x.safetensors"),
        lambda: am.few_shot(file, "digits", shots=(1,)),
        lambda: am.predict(file, "digits:test[:5]", features=True),
        lambda: am.predict(file, "digits:test[:5]", device="cuda"),
        lambda: am.predict(file, "digits:test[:5]", precision="bfloat16"),
        lambda: am.evaluate(file, "digits:test", device="cuda"),
        lambda: am.export(file, tmp_path / "new.pt2"),
        lambda: am.export(exported, tmp_path / "new.pt2"),
        lambda: am.inspect(file),
        lambda: am.inspect(tiny_model(), compare=file),
        lambda: am.benchmark({"file": file}),
        lambda: am.load_model(exported),
    ):
        with pytest.raises(am.UserError, match="exported file"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_model_of_timm_becomes_a_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "m.pt2"
    with monkeypatch.context() as patch:
        fake_timm.install(patch)
        model = am.create_model("timm:fake_cnn", num_classes=5).eval()
        torch.nn.init.normal_(model.head.weight)
        assert am.export(model, path).passed
    opened = torch.export.load(path).module()
    assert error(opened, model, random_images(model, 3)) < 1e-4  # without timm


def test_files_that_are_not_opened(tmp_path: Path):
    (tmp_path / "m.pt2").write_bytes(b"")
    (tmp_path / "m.xml").write_bytes(b"<net/>")
    (tmp_path / "there.onnx").write_bytes(b"")
    (tmp_path / "html.onnx").write_bytes(b"<html>no</html>")
    (tmp_path / "zeros.onnx").write_bytes(b"\x08\x0a" + 200 * b"\x00")
    for name, options, word in (
        ("there.onnx", {}, "there.onnx"),
        ("html.onnx", {}, "html.onnx"),
        ("zeros.onnx", {}, "zeros.onnx"),
        ("m.pt2", {}, "program"),
        ("m.tflite", {}, ".onnx"),
        ("m.onnx", {}, "m.onnx"),
        ("m.xml", {}, "m.bin"),
        ("m.xml", {"runtime": "onnxruntime"}, "onnxruntime"),
        ("m.xml", {"runtime": "tensorrt"}, "tensorrt"),
        ("there.onnx", {"num_threads": 10**6}, "1000000"),
    ):
        with pytest.raises(am.UserError, match=re.escape(word)):
            am.open_exported(tmp_path / name, **options)
    with pytest.raises(am.UserError, match="program"):
        am.predict(tmp_path / "m.pt2", "digits:test")


def rewritten(path: Path, entries: dict[str, Any], target: Path) -> Path:
    """A copy of an ONNX file that says something else about itself; None takes an entry out."""
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props} | entries
    del model.metadata_props[:]
    for key, value in kept.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, target)
    return target


def test_descriptions_that_are_damaged(nameless: Path, tmp_path: Path):
    entries = {entry.key: entry.value for entry in onnx.load(nameless).metadata_props}
    own = json.loads(entries["allmlp"])
    for wrong in (
        {"allmlp": None},
        {"allmlp": json.dumps({**own, "version": 99})},
        {"allmlp": json.dumps({**own, "version": "x"})},
        {"allmlp": json.dumps({**own, "architecture": {"family": "gpt"}})},
        {"allmlp": "["},
        {"class_names": '["a"]'},
        {"class_names": "[1, 2]"},
        {"preprocessing": '{"image_size": [16, 16]}'},
        {"decision": '{"temperature": "hot"}'},
    ):
        path = rewritten(nameless, wrong, tmp_path / "m.onnx")
        with pytest.raises(am.UserError) as caught:
            am.open_exported(path)
        assert caught.value.where == str(path), wrong
    old = {"allmlp": None, "mlp_mixer": entries["allmlp"].replace("allmlp", "mlp_mixer")}
    file = am.open_exported(rewritten(nameless, old, tmp_path / "m.onnx"))  # before the new name
    assert file.config.num_classes == 10


# --- the file without this package ----------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(scope="module")
def nameless(exported: Path) -> Path:
    """As the file of a model without class names is."""
    return rewritten(exported, {"class_names": "null"}, exported.with_name("nameless.onnx"))


def test_the_example_answers_as_we_do_for_every_kind_of_image(example, nameless, tmp_path, capsys):
    kinds = {
        **{name: data for name, (data, _) in NAMED.items() if name not in NOT_BY_PILLOW},
        "turned": encode(draw(1), exif=turned(6)),
        "jpeg": encode(draw(2), "JPEG", quality=95, exif=turned(6)),
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
        found = {text.split()[0]: float(text.split()[1][:-1]) for text in answers.split(",")}
        for name, probability in expected.classes:
            assert found[name] == pytest.approx(probability * 100, abs=0.5), line


def test_the_example_gives_the_pixels_of_the_decoder(example: SimpleNamespace, tmp_path: Path):
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
    flags = ("--top-k", "10")
    code, out, err = mixer(capsys, "predict", nameless, tmp_path / "a.png", *flags)
    assert (code, "class names" in err) == (0, True)
    assert sorted(re.findall(r"(\d) [\d.]+%", out)) == list("0123456789")
    line = ("evaluate", nameless, "--data", "digits:test")
    assert "class names" in refused(capsys, tmp_path, *line)
    said = {entry.key: entry.value for entry in onnx.load(nameless).metadata_props}
    for word in ("EXIF", "2^bits - 1", "white", "first frame", "refused"):
        assert word.lower() in said["decoding"].lower()


@pytest.mark.slow
def test_the_example_needs_nothing_of_ours(trained: am.TrainResult, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(open_source("digits:test").read(0))
    text = EXAMPLE.read_text()
    assert "allmlp" not in text
    assert "import torch" not in text
    expected = am.predict(trained.run_folder, [tmp_path / "a.png"], top_k=5)
    classes = ", ".join(f"{name} {share:.1%}" for name, share in expected[0].classes)
    for uint8_input in (False, True):
        path = tmp_path / f"{uint8_input}.onnx"
        am.export(trained.run_folder, path, uint8_input=uint8_input)
        command = [sys.executable, str(EXAMPLE), str(path), str(tmp_path / "a.png")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path / 'a.png'}: {classes}\n"


@pytest.mark.slow
def test_the_example_crops_small_images_where_the_file_says_so(example, tmp_path, capsys):
    model = tiny_model([f"class {at}" for at in range(7)], 16)
    draw(0, (12, 10)).save(tmp_path / "a.png")
    said = []
    for crop_small in (False, True):
        model.preprocessing = am.Preprocessing(image_size=(16, 16), crop=0.6, crop_small=crop_small)
        am.export(model, tmp_path / "m.onnx", overwrite=True)
        expected = am.predict(model, [tmp_path / "a.png"], top_k=5)[0].classes
        example.main(str(tmp_path / "m.onnx"), [str(tmp_path / "a.png")])
        said.append(capsys.readouterr().out)
        classes = ", ".join(f"{name} {share:.1%}" for name, share in expected)
        assert said[-1].endswith(f"{classes}\n")
    assert said[0] != said[1]
