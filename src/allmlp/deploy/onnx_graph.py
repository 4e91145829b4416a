"""Export to an ONNX graph in memory, and transformations of such graphs."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from allmlp.data.transforms import pixel_order
from allmlp.errors import UserError
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.names import import_extra

OPSET = 20  # the first with a GELU operator
LARGEST = 2**31 - 2**20  # bytes: the protobuf limit, minus space for the graph itself
_SCOPES = "pkg.torch.onnx.name_scopes"


class Uint8Input(nn.Module):
    """A model that normalizes, and permutes if it was trained so, uint8 (N, H, W, channels)."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model
        how = preprocessing_of(model)
        order = pixel_order(how)
        self.order = None if order is None else nn.Buffer(torch.from_numpy(order))
        self.mean = nn.Buffer(torch.tensor(how.mean).view(1, -1, 1, 1))
        self.std = nn.Buffer(torch.tensor(how.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2)
        if self.order is not None:
            x = x.flatten(2).index_select(2, self.order).view(x.shape)
        return self.model((x.to(torch.float32) / 255.0 - self.mean) / self.std)


def graph_module(model: ImageClassifier, *, uint8_input: bool) -> tuple[nn.Module, Tensor]:
    """Returns the module to export, in eval mode, and an example input with N = 2."""
    channels, (height, width) = model.config.in_channels, model.config.image_size
    if uint8_input:
        return Uint8Input(model).eval(), torch.zeros(2, height, width, channels, dtype=torch.uint8)
    return model.eval(), torch.zeros(2, channels, height, width)


def to_onnx(net: nn.Module, example: Tensor) -> Any:
    """Exports a module in eval mode to an `onnx.ModelProto` with a dynamic batch size."""
    optimizer = import_extra("onnxscript.optimizer", "export")
    num_bytes = sum(tensor.nbytes for tensor in net.state_dict().values())
    if num_bytes >= LARGEST:
        what = f"the weights are {num_bytes / 2**30:.2f} GiB, and an ONNX file holds at most 2"
        fix = "Export as torch-export, or a smaller model"
        raise UserError(what, fix=fix, code="too-large")
    batch = torch.export.Dim("batch", min=1)
    with _quietly():
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        assert program is not None
        # Folds everything that depends on weights only, such as transposed kernels.
        optimizer.optimize(program.model, input_size_limit=2**62, output_size_limit=2**62)
        return program.model_proto


def with_metadata(model: Any, metadata: dict[str, str]) -> Any:
    """Returns a copy with this metadata and without information about this machine."""
    model = copy.deepcopy(model)
    graph = model.graph
    del graph.value_info[:]
    for part in [*graph.node, *graph.initializer, *graph.input, *graph.output, graph]:
        del part.metadata_props[:]
        part.doc_string = ""
    import_extra("onnx.helper", "export").set_model_props(model, metadata)
    graph.name = "allmlp"
    return model


def to_bfloat16(model: Any) -> Any:
    """Returns a copy with matrices and kernels in bfloat16, each followed by a cast to float32."""
    onnx = import_extra("onnx", "export")
    model = copy.deepcopy(model)
    graph = model.graph
    casts = []
    for constant in graph.initializer:
        if constant.data_type != onnx.TensorProto.FLOAT or len(constant.dims) < 2:
            continue
        values = torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
        bits = values.bfloat16().contiguous().view(torch.int16).numpy()
        name, half = constant.name, f"{constant.name}_bfloat16"
        kind, shape = onnx.TensorProto.BFLOAT16, values.shape
        constant.CopyFrom(onnx.helper.make_tensor(half, kind, shape, bits.tobytes(), raw=True))
        casts.append(onnx.helper.make_node("Cast", [half], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    return model


def layer_of(node: Any) -> str:
    """Returns the name of the model's layer that a node was exported from."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if scopes is None:
        return node.name
    names = [name for name in ast.literal_eval(scopes)[:-1] if name]
    return names[-1].removeprefix("model.") if names else node.name


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hides the exporters' debug output."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
