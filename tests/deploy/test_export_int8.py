"""int8: what it computes, which layers are left out by measurement, and OpenVINO's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.data.source import EncodedImages, PackedBytes, labelled
from allmlp.data.transforms import normalize
from allmlp.deploy.int8 import calibrate
from allmlp.deploy.onnx_graph import graph_module, halved, to_onnx
from allmlp.deploy.quantize import Ranges, find_products, measure_ranges, quantized
from allmlp.models.layers import preprocessing_of
from conftest import encode, mixer, tiny_model
from staged_models import small_cycle

WHY = "pip install 'allmlp[export]'"
onnx = pytest.importorskip("onnx", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=WHY)

OUTLIER = "blocks.1.channel_mixing.dense_0"


def noise(model: am.ImageClassifier, count: int, name: str) -> EncodedImages:
    """Images of noise that have the model's own answers for labels: it is always right."""
    height, width = model.config.image_size
    pixels = np.random.default_rng(len(name)).integers(0, 256, (count, height, width, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        labels = model.eval()(normalize(images, preprocessing_of(model))).argmax(1).numpy()
    files = PackedBytes(encode(Image.fromarray(each)) for each in pixels)
    assert model.class_names is not None
    return labelled(EncodedImages(files, name), name, model.class_names, labels)


def named_model(**changes: object) -> am.ImageClassifier:
    model = tiny_model(hidden_dim=32, **changes)
    model.class_names = list("abcdefg")
    return model


@pytest.fixture(scope="module")
def model() -> am.ImageClassifier:
    """One whose layer OUTLIER sees one huge number, which it does not use: int8 sees only that."""
    made = named_model()
    with torch.no_grad():
        made.blocks[1].layer_norm_1.bias[3] = 1e4
        made.blocks[1].channel_mixing.dense_0.weight[:, 3] = 0.0
        made.head.bias[:] = torch.arange(7.0) / 70.0
    return made


@pytest.fixture(scope="module")
def graph(model: am.ImageClassifier) -> object:
    return to_onnx(*graph_module(model, uint8_input=False))


def run(graph: object, images: np.ndarray) -> np.ndarray:
    content = graph.SerializeToString()  # pyright: ignore[reportAttributeAccessIssue]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def test_ranges_are_those_of_the_layers(model: am.ImageClassifier, graph: object):
    products = find_products(graph)
    names = {each.layer: each for each in products}
    assert len(products) == 9  # four layers in each of two blocks, and the head
    assert OUTLIER in names
    assert "head" in names
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(OUTLIER)
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1)))
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    found = measure_ranges(graph, products, [images[:2].numpy(), images[2:].numpy()], 1)
    ranges = found[names[OUTLIER].inputs]
    np.testing.assert_allclose(ranges.largest, seen[0].amax(1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(ranges.least, seen[0].amin(1).numpy(), rtol=1e-3)
    with pytest.raises(am.UserError, match="not finite"):
        measure_ranges(graph, products, [np.full((1, 3, 8, 8), np.nan, np.float32)], 1)
    with pytest.raises(am.UserError, match="no image"):
        measure_ranges(graph, products, [], 1)


def test_bounds_hold_zero_and_a_share_of_the_images():
    ranges = Ranges(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 60.0]))
    assert ranges.bounds(1.0) == (0.0, 60.0)
    assert ranges.bounds(0.5) == (0.0, 5.0)
    assert Ranges(-ranges.largest, -ranges.least).bounds(1.0) == (-60.0, 0.0)


def test_the_arithmetic_of_int8_is_that_of_its_definition(graph: object):
    """One layer, computed by hand from the numbers in the file."""
    products = find_products(graph)
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    ranges = measure_ranges(graph, products, [images], 1)
    head = next(each for each in products if each.layer == "head")
    made = quantized(graph, [head], ranges)
    onnx.checker.check_model(made)
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in made.graph.initializer}
    whole = constants[f"{head.node}_weight_int8"]
    assert whole.dtype == np.int8
    assert (np.abs(whole).max(axis=0) == 63).all()  # every unit uses its whole scale
    scale, zero = constants[f"{head.inputs}_scale"], constants[f"{head.inputs}_zero"]
    assert zero.dtype == np.uint8
    features = tiny_features(graph, head.inputs, images)
    steps = np.clip(np.rint(features / scale) + zero, 0, 255) - zero
    product = steps @ (whole * constants[f"{head.node}_weight_scale"]) * scale
    np.testing.assert_allclose(run(made, images), product + bias_of(graph), rtol=1e-4, atol=1e-3)


def tiny_features(graph: object, name: str, images: np.ndarray) -> np.ndarray:
    cut = onnx.ModelProto()
    cut.CopyFrom(graph)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return run(cut, images)


def bias_of(graph: object) -> np.ndarray:
    constants = graph.graph.initializer  # pyright: ignore[reportAttributeAccessIssue]
    return onnx.numpy_helper.to_array(next(each for each in constants if each.name == "head.bias"))


def test_onnx_runtime_multiplies_in_int8(graph: object, tmp_path: Path):
    products = find_products(graph)
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    made = quantized(graph, products, measure_ranges(graph, products, [images], 1))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(each.op_type for each in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == len(products) - 1
    assert kinds["QGemm"] == 1  # the head
    assert not {"MatMul", "Gemm", "FusedMatMul", "DequantizeLinear"} & set(kinds)


def test_the_layer_that_suffers_stays_in_float32(model: am.ImageClassifier, tmp_path: Path):
    path = tmp_path / "m.onnx"
    report = am.export(
        model,
        path,
        precision="int8",
        calibration=noise(model, 40, "calibration"),
        data=noise(model, 60, "test"),
        max_accuracy_drop=10.0,
    )
    assert report.passed, report.lines()
    assert report.kept[0] == OUTLIER
    assert report.attempts[0][0] == 0
    assert report.attempts[0][1] > 10.0  # with every layer in int8
    assert report.attempts[-1][1] <= 10.0
    assert report.parity.num_images == 60
    assert am.open_exported(path).about.kept == tuple(report.kept)
    text = "\n".join(report.lines())
    assert f"int8        {9 - len(report.kept)} of 9 dense layers" in text
    assert f"float32     {OUTLIER}" in text


@pytest.mark.slow
def test_int8_that_costs_too_much_is_not_written(model: am.ImageClassifier, tmp_path: Path):
    with torch.no_grad():  # beyond what leaving out half of the layers can mend
        worse = named_model()
        for block in worse.blocks:
            for norm, layer in ((block.layer_norm_1, block.channel_mixing.dense_0),):
                norm.bias[3] = 1e6
                layer.weight[:, 3] = 0.0
        worse.pre_head_layer_norm.bias[0] = 1e6
        worse.head.weight[:, 0] = 0.0
        for block in worse.blocks:
            block.channel_mixing.dense_0.bias[0] = 1e6
            block.channel_mixing.dense_1.weight[:, 0] = 0.0
            block.token_mixing.dense_0.bias[0] = 1e6
            block.token_mixing.dense_1.weight[:, 0] = 0.0
    test = noise(worse, 60, "test")
    report = am.export(worse, tmp_path / "m.onnx", precision="int8", calibration=test, data=test)
    assert not report.passed
    assert report.path is None
    assert not list(tmp_path.iterdir())
    assert "4 of 9 layers" in report.failures[-1]
    assert any("calibrated on the data" in each for each in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda: tiny_model(token_mixing="views", token_groups=4), 11),
        (lambda: tiny_model(token_mixing="untied"), 5),  # its own products have no matrix
        (small_cycle, 25),
    ],
)
def test_int8_of_other_families(build: Callable[[], am.ImageClassifier], layers: int):
    net = build().eval()
    made = to_onnx(*graph_module(net, uint8_input=False))
    images = torch.randn(8, 3, *net.config.image_size, generator=torch.Generator().manual_seed(1))
    found = calibrate(made, lambda: [images.numpy()], 1, "")
    assert len(found.products) == layers
    with torch.no_grad():
        exact = net(images).numpy()
    error = np.abs(run(found.file(0)[0], images.numpy()) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05


def test_a_network_of_convolutions_is_refused(tmp_path: Path):
    net = am.create_model("small_resnet", 8, 7, width=8, num_stages=2, num_blocks=1)
    net.class_names = list("abcdefg")
    test = noise(net, 4, "test")
    with pytest.raises(am.UserError, match="next to none: small ResNet"):
        am.export(net, tmp_path / "m.onnx", precision="int8", calibration=test, data=test)


@pytest.mark.slow
def test_int8_of_real_digits_and_the_calibration_split(
    trained: am.TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ("--precision", "int8", "--calibration", "digits", "--calibration-images", 100)
    code, out, err = mixer(
        capsys, "export", trained.run_folder, "--output", tmp_path / "m.onnx", *flags,
        "--data", "digits:test", "--max-accuracy-drop", 2,
    )  # fmt: skip
    assert code == 0, out + err
    assert "calibrated  100 images of digits:train" in out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_openvino(precision: str, tmp_path: Path):
    pytest.importorskip("openvino", reason="pip install 'allmlp[openvino]'")
    plain = named_model()
    own: dict[str, object] = {}
    if precision == "int8":
        own = {"calibration": noise(plain, 40, "calibration"), "data": noise(plain, 60, "test")}
        own["max_accuracy_drop"] = 15.0
    path = tmp_path / "m.xml"
    report = am.export(plain, path, precision=precision, uint8_input=True, **own)  # pyright: ignore
    assert report.passed, report.lines()
    assert set(report.files) == {"m.xml", "m.bin"}
    assert any("two files" in each for each in report.notes)
    file = am.open_exported(path)
    assert file.class_names == plain.class_names
    assert file.about.precision == precision
    assert file.runtime.startswith("openvino 2")
    limit = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.3}[precision]
    for count in (1, 3):
        images = torch.randint(0, 256, (count, 3, 8, 8)).byte()
        with torch.no_grad():
            exact = plain.eval()(normalize(images, preprocessing_of(plain)))
        assert (file(images) - exact).abs().max() <= limit * exact.abs().max()
    assert b"/work" not in path.read_bytes()
    (tmp_path / "m.bin").unlink()
    with pytest.raises(am.UserError, match=r"lie in a \.bin"):
        am.open_exported(path)


@pytest.mark.slow
def test_openvino_runs_an_onnx_file_too(graph: object, model: am.ImageClassifier, tmp_path: Path):
    pytest.importorskip("openvino", reason="pip install 'allmlp[openvino]'")
    am.export(model, tmp_path / "m.onnx")
    images = torch.randn(3, 3, 8, 8)
    first, second = (
        am.open_exported(tmp_path / "m.onnx", runtime=runtime)(images)
        for runtime in ("onnxruntime", "openvino")
    )
    assert (first - second).abs().max() <= 1e-4 * first.abs().max()


def test_halved_weights_are_bfloat16(graph: object):
    constants = halved(graph).graph.initializer
    kinds = {len(each.dims): each.data_type for each in constants if each.data_type != 7}
    assert kinds[2] == kinds[4] == onnx.TensorProto.BFLOAT16
    assert kinds[1] == onnx.TensorProto.FLOAT
