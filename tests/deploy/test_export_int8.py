"""int8: what is quantised, which layers are left out by measurement, and OpenVINO's files."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.data.source import EncodedImages, PackedBytes, Source, labelled
from allmlp.data.transforms import normalize
from allmlp.models.layers import preprocessing_of
from conftest import encode, tiny_model, user_error
from staged_models import small_cycle

WHY = "pip install 'allmlp[export]'"
onnx = pytest.importorskip("onnx", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=WHY)

OUTLIER = "blocks.1.channel_mixing.dense_0"


def noise(model: am.ImageClassifier, count: int, name: str) -> Source:
    """Images of noise that have the model's own answers for labels: it is always right."""
    height, width = model.config.image_size
    pixels = np.random.default_rng(len(name)).integers(0, 256, (count, height, width, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        labels = model.eval()(normalize(images, preprocessing_of(model))).argmax(1).numpy()
    files = PackedBytes(encode(Image.fromarray(image)) for image in pixels)
    return labelled(EncodedImages(files, name), name, model.class_names, labels)


def named(model: am.ImageClassifier) -> am.ImageClassifier:
    model.class_names = list("abcdefghij")[: model.config.num_classes]
    return model


def int8(model: am.ImageClassifier, path: Path, **options: Any) -> am.ExportReport:
    sources = {"calibration": noise(model, 40, "calibration"), "data": noise(model, 60, "test")}
    return am.export(model, path, precision="int8", **{**sources, **options})


def with_outliers(outlier: float, layers: tuple[int, ...]) -> am.ImageClassifier:
    """Layers that see one huge number, which they do not use: int8 sees only that."""
    model = named(tiny_model(hidden_dim=32))
    with torch.no_grad():
        for layer in layers:
            model.blocks[layer].layer_norm_1.bias[3] = outlier
            model.blocks[layer].channel_mixing.dense_0.weight[:, 3] = 0.0
        model.head.bias[:] = torch.arange(7.0) / 70.0
    return model


@pytest.mark.slow
def test_the_layer_that_suffers_stays_in_float32(tmp_path: Path):
    model = with_outliers(1e4, (1,))
    report = int8(model, tmp_path / "m.onnx", max_accuracy_drop=10.0)
    assert report.passed, report.lines()
    assert report.num_layers == 9  # four layers in each of two blocks, and the head
    assert report.kept[0] == OUTLIER
    assert report.attempts[0][0] == 0
    assert report.attempts[0][1] > 10.0  # with every layer in int8
    assert report.attempts[-1][1] <= 10.0
    assert report.parity.num_images == 60
    assert am.open_exported(tmp_path / "m.onnx").info.float32_layers == tuple(report.kept)
    text = "\n".join(report.lines())
    assert f"int8        {9 - len(report.kept)} of 9 dense layers" in text
    assert f"float32     {OUTLIER}" in text


@pytest.mark.slow
def test_int8_that_costs_too_much_is_not_written(tmp_path: Path):
    worse = with_outliers(1e6, (0, 1))  # beyond what leaving out half of the layers can repair
    with torch.no_grad():
        worse.pre_head_layer_norm.bias[0] = 1e6
        worse.head.weight[:, 0] = 0.0
        for block in worse.blocks:
            for mlp in (block.channel_mixing, block.token_mixing):
                mlp.dense_0.bias[0] = 1e6
                mlp.dense_1.weight[:, 0] = 0.0
    test = noise(worse, 60, "test")
    report = int8(worse, tmp_path / "m.onnx", calibration=test, data=test)
    assert not report.passed
    assert report.path is None
    assert not list(tmp_path.iterdir())
    assert "4 of 9 layers" in report.failures[-1]
    assert any("calibrated on the data" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda: tiny_model(token_mixing="views", token_groups=4), 11),
        (lambda: tiny_model(token_mixing="untied"), 5),  # its own products have no matrix
        (small_cycle, 25),
    ],
)
def test_int8_of_other_families(build, layers, tmp_path):
    model = named(build())
    report = int8(model, tmp_path / "m.onnx", max_accuracy_drop=100)
    assert (report.num_layers, report.kept) == (layers, [])
    assert 1e-4 < report.parity.relative < 0.2


@pytest.mark.slow
def test_onnx_runtime_multiplies_in_int8_with_weights_of_7_bits(tmp_path: Path):
    int8(named(tiny_model(hidden_dim=32)), tmp_path / "m.onnx", max_accuracy_drop=100)
    constants = onnx.load(tmp_path / "m.onnx").graph.initializer
    weights = [onnx.numpy_helper.to_array(value) for value in constants if value.data_type == 3]
    weights = [weight for weight in weights if weight.ndim == 2]
    assert len(weights) == 9
    assert max(np.abs(weight.astype(int)).max() for weight in weights) <= 64
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 8
    assert kinds["QGemm"] == 1  # the head
    assert not {"MatMul", "Gemm", "FusedMatMul", "DequantizeLinear"} & set(kinds)


@pytest.mark.slow
def test_calibration_that_cannot_be(tmp_path: Path):
    net = named(am.create_model("small_resnet", 8, 7, width=8, num_stages=2, num_blocks=1))
    torch.nn.init.normal_(net.head.weight)
    with user_error("unsupported"):  # convolutions only
        int8(net, tmp_path / "m.onnx")
    model = named(tiny_model(hidden_dim=32))
    files = EncodedImages(PackedBytes([b"x"]), "bad")
    bad = labelled(files, "bad", list("abcdefg"), np.zeros(1, np.int64))
    with user_error("no-images"):
        int8(model, tmp_path / "m.onnx", calibration=bad)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_openvino(precision: str, tmp_path: Path):
    pytest.importorskip("openvino", reason="pip install 'allmlp[openvino]'")
    model, path = named(tiny_model(hidden_dim=32)), tmp_path / "m.xml"
    if precision == "int8":
        report = int8(model, path, uint8_input=True, max_accuracy_drop=15.0)
    else:
        report = am.export(model, path, precision=precision, uint8_input=True)
    assert report.passed, report.lines()
    assert set(report.files) == {"m.xml", "m.bin"}
    file = am.open_exported(path)
    assert file.class_names == model.class_names
    assert file.info.precision == precision
    assert file.runtime.startswith("openvino 2")
    limit = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.3}[precision]
    for count in (1, 3):
        images = torch.randint(0, 256, (count, 3, 8, 8)).byte()
        with torch.no_grad():
            exact = model.eval()(normalize(images, preprocessing_of(model)))
        assert (file(images) - exact).abs().max() <= limit * exact.abs().max()
    assert b"/work" not in path.read_bytes()
    (tmp_path / "m.bin").unlink()
    with pytest.raises(am.UserError, match=r"m\.bin"):
        am.open_exported(path)


@pytest.mark.slow
def test_openvino_runs_an_onnx_file_too(tmp_path: Path):
    pytest.importorskip("openvino", reason="pip install 'allmlp[openvino]'")
    am.export(tiny_model(), tmp_path / "m.onnx")
    images = torch.randn(3, 3, 8, 8)
    first, second = (
        am.open_exported(tmp_path / "m.onnx", runtime=runtime)(images)
        for runtime in ("onnxruntime", "openvino")
    )
    assert (first - second).abs().max() <= 1e-4 * first.abs().max()
