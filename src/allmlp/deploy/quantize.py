"""A float32 ONNX graph -> the same graph with its dense layers in int8.

Static, post-training: the range of every layer's input is measured on real images and written into
the file. Inputs are uint8 with one scale and zero point; weights are symmetric int8 with a scale
for each output unit, of which 7 bits are used: without VNNI an x86 processor adds two products in
16 bits, where 255 x 127 twice would saturate. It is written as QuantizeLinear and DequantizeLinear
around ordinary products (QDQ), which ONNX Runtime and OpenVINO both turn into their own int8
kernels. Source: Jacob et al. 2018 (arXiv 1712.05877); the ONNX operators of these names.

Convolutions (the stem, and what joins the stages of the staged families), LayerNorm, GELU, sums and
products whose weights are no matrix stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from allmlp.deploy.extras import needed
from allmlp.deploy.onnx_graph import constants_of, copied, layer_of
from allmlp.deploy.runner import onnx_session
from allmlp.errors import UserError

LEVELS_OF_INPUTS, LARGEST_WEIGHT = 255, 63


@dataclass(frozen=True)
class Product:
    """A dense layer of a graph, which int8 can compute.

    Attributes:
        layer: its name in the model: "blocks.0.token_mixing.dense_0".
        node: the name of its node.
        inputs: the name of the activations that it reads.
        weight: the name of its constant matrix.
        is_transposed: the matrix is (out, in), and not (in, out).
    """

    layer: str
    node: str
    inputs: str
    weight: str
    is_transposed: bool


@dataclass(frozen=True)
class Ranges:
    """The least and largest input of a layer, float32, one of each for every image."""

    least: np.ndarray
    largest: np.ndarray

    def bounds(self, quantile: float) -> tuple[float, float]:
        """Returns what holds the inputs of so large a share of the images; always with 0 in it."""
        least = float(np.quantile(self.least, 1.0 - quantile))
        largest = float(np.quantile(self.largest, quantile))
        return min(least, 0.0), max(largest, 0.0)


def find_products(model: Any) -> list[Product]:
    """Returns the dense layers of an ONNX model, in the order of the graph."""
    matrices = {name for name, each in constants_of(model).items() if len(each.dims) == 2}
    vectors = {name for name, each in constants_of(model).items() if len(each.dims) == 1}
    found: list[Product] = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in matrices:
            continue
        settings = {each.name: each for each in node.attribute}
        if "transA" in settings and settings["transA"].i:
            continue
        factors = [settings[name].f for name in ("alpha", "beta") if name in settings]
        has_bias = len(node.input) > 2 and bool(node.input[2])
        if any(factor != 1.0 for factor in factors) or (has_bias and node.input[2] not in vectors):
            continue
        is_transposed = "transB" in settings and bool(settings["transB"].i)
        product = Product(layer_of(node), node.name, node.input[0], node.input[1], is_transposed)
        found.append(product)
    return found


def measure_ranges(
    model: Any, products: list[Product], batches: Iterable[np.ndarray], num_threads: int
) -> dict[str, Ranges]:
    """Returns the range of every layer's input over images, by the name of the input.

    Args:
        model: in float32.
        products: the layers.
        batches: inputs of the graph, the same as when it is used.
        num_threads: of the processor.

    Raises:
        UserError: there are no images, or an input is not finite.
    """
    onnx = needed("onnx")

    names = list(dict.fromkeys(product.inputs for product in products))
    watched = copied(model)
    graph = watched.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "mixer_axis"))
    del graph.output[:]
    for at, name in enumerate(names):
        flat = f"mixer_flat_{at}"
        graph.node.append(onnx.helper.make_node("Flatten", [name], [flat], axis=1))
        for kind in ("Min", "Max"):
            out = f"mixer_{kind}_{at}"
            graph.node.append(
                onnx.helper.make_node(f"Reduce{kind}", [flat, "mixer_axis"], [out], keepdims=0)
            )
            graph.output.append(
                onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None)
            )
    session = onnx_session(watched.SerializeToString(), num_threads)
    found: list[list[np.ndarray]] = [[] for _ in range(2 * len(names))]
    for batch in batches:
        for place, each in zip(found, session.run(None, {"images": batch}), strict=True):
            place.append(each)
    if not found[0]:
        raise UserError("no image to calibrate with", where="--calibration")
    joined = [np.concatenate(each) for each in found]
    for at, each in enumerate(joined):
        if not np.isfinite(each).all():
            what = f"the model computes values that are not finite ({names[at // 2]})"
            raise UserError(what, where="--calibration", fix="Are the weights damaged?")
    return {name: Ranges(joined[2 * at], joined[2 * at + 1]) for at, name in enumerate(names)}


def quantized(
    model: Any, products: list[Product], ranges: dict[str, Ranges], quantile: float = 1.0
) -> Any:
    """Returns a copy of the model in which these layers compute in int8.

    Args:
        model: in float32.
        products: the layers; the others stay as they are.
        ranges: of their inputs.
        quantile: the share of the images whose inputs are in range whole, see `Ranges.bounds`.
    """
    onnx = needed("onnx")
    chosen = {product.node: product for product in products}
    made = copied(model)
    graph = made.graph
    constants = constants_of(made)
    nodes, done = list(graph.node), set()
    del graph.node[:]
    for node in nodes:
        product = chosen.get(node.name)
        if product is None:
            graph.node.append(node)
            continue
        inside = f"{product.inputs}_dequantized"
        if inside not in done:  # several layers may read the same
            done.add(inside)
            low, high = ranges[product.inputs].bounds(quantile)
            graph.node.extend(_quantize_inputs(graph, product.inputs, inside, low, high))
        weight = f"{node.name}_weight"
        array = onnx.numpy_helper.to_array(constants[product.weight])
        matrix = array.T if product.is_transposed else array
        graph.node.append(_quantize_weight(graph, weight, matrix))
        inputs, kind = [inside, weight], "MatMul"
        if len(node.input) > 2 and node.input[2]:
            bias = onnx.numpy_helper.to_array(constants[node.input[2]])
            graph.node.append(_quantize_bias(graph, f"{node.name}_bias", bias, product, weight))
            inputs, kind = [*inputs, f"{node.name}_bias"], "Gemm"
        made_node = onnx.helper.make_node(kind, inputs, node.output, name=node.name)
        made_node.metadata_props.extend(node.metadata_props)
        graph.node.append(made_node)
    _drop_unused(graph)
    return made


def _quantize_inputs(graph: Any, name: str, out: str, low: float, high: float) -> list[Any]:
    onnx = needed("onnx")
    scale = (high - low) / LEVELS_OF_INPUTS
    scale = scale if scale > np.finfo(np.float32).tiny else 1.0  # a layer that only sees zeros
    zero = np.uint8(np.clip(round(-low / scale), 0, LEVELS_OF_INPUTS))
    values = {"scale": np.float32(scale), "zero": zero}
    for kind, value in values.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), f"{name}_{kind}"))
    settings, inner = [f"{name}_scale", f"{name}_zero"], f"{name}_quantized"
    return [
        onnx.helper.make_node("QuantizeLinear", [name, *settings], [inner]),
        onnx.helper.make_node("DequantizeLinear", [inner, *settings], [out]),
    ]


def _quantize_weight(graph: Any, name: str, matrix: np.ndarray) -> Any:
    """Adds an (in, out) matrix in int8, and returns the node that makes numbers of it again."""
    onnx = needed("onnx")
    scale = np.abs(matrix).max(axis=0) / LARGEST_WEIGHT
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, 1.0).astype(np.float32)
    whole = np.clip(np.rint(matrix / scale), -LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int8)
    parts = {"int8": whole, "scale": scale, "zero": np.zeros(len(scale), dtype=np.int8)}
    for kind, value in parts.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}_{kind}"))
    inputs = [f"{name}_{kind}" for kind in parts]
    return onnx.helper.make_node("DequantizeLinear", inputs, [name], axis=1)


def _quantize_bias(graph: Any, name: str, bias: np.ndarray, product: Product, weight: str) -> Any:
    """Adds the bias in the unit of the int8 sums, int32, without which ONNX Runtime stays slow."""
    onnx = needed("onnx")
    values = {each.name: each for each in graph.initializer}
    unit = np.float32(onnx.numpy_helper.to_array(values[f"{product.inputs}_scale"]))
    scale = unit * onnx.numpy_helper.to_array(values[f"{weight}_scale"])
    whole = np.clip(np.rint(bias.astype(np.float64) / scale), -(2**31) + 1, 2**31 - 1)
    for kind, value in {"int32": whole.astype(np.int32), "scale": scale}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}_{kind}"))
    return onnx.helper.make_node(
        "DequantizeLinear", [f"{name}_int32", f"{name}_scale"], [name], axis=0
    )


def _drop_unused(graph: Any) -> None:
    """Forgets constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
