"""A model -> an ONNX graph in memory, and what is done to such a graph.

Everything that a file needs is in the graph: the batch may have any size, weights are constants in
the form in which they are multiplied, and nothing tells of the machine that it was made on.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allmlp.data.permutation import pixel_order
from allmlp.data.transforms import normalize
from allmlp.deploy.extras import needed
from allmlp.errors import UserError
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.preprocessing import Preprocessing

OPSET = 20  # the first with a GELU of its own
LARGEST = 2**31 - 2**20  # bytes: what a protobuf message can hold, less the graph itself
_SCOPES = "pkg.torch.onnx.name_scopes"


class WithPixels(nn.Module):
    """A model that takes uint8 images (N, H, W, channels), as decoders give them.

    Values are brought to the model's range, and permuted where the model was trained so, inside.

    Args:
        model: with its preprocessing.
    """

    order: Tensor | None
    mean: Tensor
    std: Tensor

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model
        preprocessing = preprocessing_of(model)
        order = pixel_order(preprocessing)
        self.register_buffer("order", None if order is None else torch.from_numpy(order))
        for name in ("mean", "std"):
            value = getattr(preprocessing, name)
            each = value if isinstance(value, tuple) else (value,) * preprocessing.channels
            self.register_buffer(name, torch.tensor(each).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of uint8 images (N, H, W, channels)."""
        x = images.permute(0, 3, 1, 2)
        if self.order is not None:
            x = x.flatten(2).index_select(2, self.order).view(x.shape)
        return self.model((x.to(torch.float32) / 255.0 - self.mean) / self.std)


def graph_module(model: ImageClassifier, *, uint8_input: bool) -> tuple[nn.Module, Tensor]:
    """Returns what is to be exported, in evaluation mode, and an example of its input, N = 2."""
    config = model.config
    height, width = config.image_size
    random = torch.Generator().manual_seed(0)
    if uint8_input:
        shape = (2, height, width, config.in_channels)
        return WithPixels(model).eval(), torch.randint(0, 256, shape, generator=random).byte()
    return model.eval(), torch.randn(2, config.in_channels, height, width, generator=random)


def inputs_of(images: Tensor, preprocessing: Preprocessing, *, uint8_input: bool) -> np.ndarray:
    """Returns uint8 images (N, channels, H, W) as what an exported graph takes."""
    if uint8_input:
        return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    return normalize(images, preprocessing).numpy()


def to_onnx(net: nn.Module, example: Tensor) -> Any:
    """Returns a module as an ONNX model (`onnx.ModelProto`) whose batch may have any size.

    Args:
        net: in evaluation mode, on the CPU.
        example: an input of it.

    Raises:
        UserError: the weights are more than a file can hold.
    """
    optimizer = needed("onnxscript.optimizer")
    check_size(sum(each.nbytes for each in net.state_dict().values()))
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
        # What depends on weights only is computed here, of any size: transposed kernels.
        optimizer.optimize(program.model, input_size_limit=2**62, output_size_limit=2**62)
        return program.model_proto


def check_size(num_bytes: int) -> None:
    """Refuses weights that do not fit into one ONNX file.

    Raises:
        UserError: they are 2 GB or more.
    """
    if num_bytes >= LARGEST:
        what = f"the weights are {num_bytes / 2**30:.2f} GiB, and an ONNX file holds at most 2"
        raise UserError(what, where="--format", fix="--format torch-export, or a smaller model")


def finish(model: Any, metadata: dict[str, str]) -> None:
    """Takes out what tells of this machine, and puts in what a reader of the file must know."""
    for each in [*model.graph.node, *model.graph.value_info, *model.graph.initializer]:
        del each.metadata_props[:]
        each.doc_string = ""
    for each in [*model.graph.input, *model.graph.output, model.graph]:
        del each.metadata_props[:]
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    model.graph.name = "allmlp"


def halved(model: Any) -> Any:
    """Returns a copy whose matrices and kernels are stored in bfloat16, half as large.

    A cast to float32 stands behind each: in what precision it is multiplied, the runtime decides.
    """
    onnx = needed("onnx")
    made = copied(model)
    graph = made.graph
    casts = []
    for constant in graph.initializer:
        if constant.data_type != onnx.TensorProto.FLOAT or len(constant.dims) < 2:
            continue
        values = torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
        bits = values.bfloat16().contiguous().view(torch.int16).numpy()
        name = constant.name
        constant.Clear()
        constant.name = f"{name}_bfloat16"
        constant.data_type = onnx.TensorProto.BFLOAT16
        constant.dims.extend(values.shape)
        constant.raw_data = bits.tobytes()
        casts.append(
            onnx.helper.make_node("Cast", [constant.name], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    return made


def copied(model: Any) -> Any:
    """Returns a copy of an ONNX model."""
    onnx = needed("onnx")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def constants_of(model: Any) -> dict[str, Any]:
    """Returns the constants of an ONNX model, `onnx.TensorProto` by their names."""
    return {each.name: each for each in model.graph.initializer}


def layer_of(node: Any) -> str:
    """Returns the name, in the model, of the layer that a node came from."""
    scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), None)
    if scopes is None:
        return node.name
    names = [each for each in ast.literal_eval(scopes)[:-1] if each]
    return names[-1].removeprefix("model.") if names else node.name


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps back what exporters say to their own developers."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
