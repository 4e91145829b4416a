"""int8 quantization of the dense layers of a float32 ONNX graph.

Activations are uint8 with a zero point, weights symmetric with a scale per output unit, and use 7
of 8 bits: without VNNI, x86 CPUs add two products in 16 bits, where 2 x 255 x 127 would saturate.
QuantizeLinear and DequantizeLinear surround ordinary matmuls (QDQ), which ONNX Runtime and OpenVINO
both turn into int8 kernels.

A layer's sensitivity is the RMS change of the logits with only that layer in int8, relative to the
RMS of the logits. The most sensitive layers are the first to be kept in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from allmlp.deploy.formats import onnx_session
from allmlp.deploy.onnx_graph import layer_of
from allmlp.errors import UserError
from allmlp.names import import_extra

# Candidate ranges: they cover the activations of this fraction of the batches. Clipping rare
# outliers gives a finer resolution.
QUANTILES = (1.0, 0.9, 0.5)
_IMAGES_TO_JUDGE = 64
_TYPES = ["MatMul", "Gemm"]


class Int8:
    """Quantizes a graph, with the one of `QUANTILES` that changes the logits least.

    `sensitivity` (most sensitive layers first) is empty until a layer is kept in float32.
    """

    def __init__(
        self, graph: Any, batches: Iterable[np.ndarray], folder: Path, num_threads: int
    ) -> None:
        dense = {constant.name for constant in graph.graph.initializer if len(constant.dims) == 2}
        self.layers = [  # (node, layer of the model)
            (node.name, layer_of(node))
            for node in graph.graph.node
            if node.op_type in _TYPES and node.input[1] in dense
        ]
        if len(self.layers) < 2:  # not worth it for the head alone
            what = "int8 is for dense layers, and this model has next to none"
            raise UserError(what, fix="Export it in float32", code="unsupported")
        self.graph, self.num_threads = graph, num_threads
        self.sensitivity: dict[tuple[str, str], float] = {}
        self._ranges = self._measure(batches, folder)
        self._exact = self._logits(graph)
        self.quantile = min(QUANTILES, key=lambda q: self._error(self._quantized(self.layers, q)))

    def quantized(self, num_float32: int) -> tuple[Any, list[str]]:
        """Returns the graph with `num_float32` layers in float32, and their names."""
        if num_float32 and not self.sensitivity:
            errors = [self._error(self._quantized([one], self.quantile)) for one in self.layers]
            found = zip(self.layers, errors, strict=True)
            self.sensitivity = dict(sorted(found, key=lambda pair: -pair[1]))
        kept = list(self.sensitivity)[:num_float32]
        int8 = [layer for layer in self.layers if layer not in kept]
        return self._quantized(int8, self.quantile), [layer for _, layer in kept]

    def _measure(self, batches: Iterable[np.ndarray], folder: Path) -> list[dict[str, Any]]:
        """Returns the activation ranges of each batch by name; keeps the first images."""
        quantization = import_extra("onnxruntime.quantization", "export")
        path = folder / ".calibration.onnx"
        path.write_bytes(self.graph.SerializeToString())
        calibrator = quantization.create_calibrator(path, _TYPES, str(folder / ".ranges.onnx"))
        first, ranges, self.num_images = [], [], 0
        for batch in batches:
            if self.num_images < _IMAGES_TO_JUDGE:
                first.append(batch[: _IMAGES_TO_JUDGE - self.num_images])
            self.num_images += len(batch)
            calibrator.calibrate_tensors_range = None  # reset for this batch
            reader = iter([{"images": batch}, None])
            calibrator.collect_data(SimpleNamespace(get_next=lambda reader=reader: next(reader)))
            ranges.append(dict(calibrator.compute_data().items()))
        if not first:
            raise UserError("no image to calibrate with", where="calibration", code="no-images")
        self._images = np.concatenate(first)
        return ranges

    def _quantized(self, layers: list[tuple[str, str]], quantile: float) -> Any:
        quantization = import_extra("onnxruntime.quantization", "export")
        kinds = quantization.QuantType
        bounds = {}
        for name in self._ranges[0]:
            found = np.array([ranges[name].range_value for ranges in self._ranges])
            low, high = found.reshape(-1, 2).T
            bound = np.quantile(low, 1.0 - quantile), np.quantile(high, quantile)
            bounds[name] = tuple(np.array([value], np.float32) for value in bound)
        graph = copy.deepcopy(self.graph)
        quantizer = quantization.QDQQuantizer(
            graph,
            True,
            True,
            kinds.QInt8,
            kinds.QUInt8,
            quantization.TensorsData(quantization.CalibrationMethod.MinMax, bounds),
            [node for node, _ in layers],
            [],
            _TYPES,
            {"OpTypesToExcludeOutputQuantization": _TYPES, "WeightSymmetric": True},
        )
        quantizer.quantize_model()
        return quantizer.model.model

    def _error(self, graph: Any) -> float:
        """Returns the error of a graph's logits relative to their spread."""
        spread = self._exact - self._exact.mean(axis=1, keepdims=True)
        size = float(np.sqrt((spread**2).mean()))
        error = float(np.sqrt(((self._logits(graph) - self._exact) ** 2).mean()))
        return error / size if size else error

    def _logits(self, graph: Any) -> np.ndarray:
        session = onnx_session(graph.SerializeToString(), self.num_threads)
        starts = range(0, len(self._images), 8)
        batches = (self._images[start : start + 8] for start in starts)
        return np.concatenate([session.run(None, {"images": batch})[0] for batch in batches])
