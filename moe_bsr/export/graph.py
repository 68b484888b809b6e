"""ONNX graphs written node by node, over weights that lie once in files which graphs share.

torch's own exporter takes about a minute a task, names tensors as it likes and cannot trace a mixture of experts. A
ViT needs thirty kinds of operators, so they are written directly. What is computed already is not computed twice:
asking a graph for an operation on the same inputs returns the first one's output. That alone makes tasks share
their common blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET = 20  # the first with Gelu; onnxruntime since 1.17, OpenVINO since 2024.1
IR_VERSION = 9  # of the same release of ONNX
ALIGNMENT = 64  # bytes: the start of a tensor in its file

SHARED_FILE = "weights.data"  # what belongs to no single task


def data_file(owner: str) -> str:
    """The file of the tensors of a task, or of "" those of all."""
    return f"{owner}.data" if owner else SHARED_FILE


@dataclass
class Weights:
    """The tensors of all graphs by name, and the task that each belongs to ("" for all).

    The owner decides about the file, never the size: where a large tensor of one task pushed others along, graphs of
    other tasks would read them at the wrong place, without an error.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, array: np.ndarray, owner: str) -> None:
        """Remember a tensor.

        Raises:
            ValueError: another tensor of the name is there: tasks do not share what they were said to share.
        """
        known = self.arrays.setdefault(name, array)
        if known is not array and not np.array_equal(known, array):
            raise ValueError(f"tensor {name}: two tasks have different values for it, so it cannot be shared")
        self.owners[name] = owner

    def write(self, folder: Path) -> dict[str, tuple[str, int, int]]:
        """Write the data files; returns (file, offset, length in bytes) by tensor.

        A tensor's place depends on the names and shapes in its own file alone.
        """
        places: dict[str, tuple[str, int, int]] = {}
        for owner in dict.fromkeys(self.owners.values()):
            with (folder / data_file(owner)).open("xb") as stream:
                for name in sorted(name for name, its in self.owners.items() if its == owner):
                    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
                    content = np.ascontiguousarray(self.arrays[name]).tobytes()
                    places[name] = data_file(owner), stream.tell(), len(content)
                    stream.write(content)
        return places


@dataclass
class Model:
    """A graph as ONNX without its weights, and which these are."""

    proto: Any
    used: list[str]
    weights: Weights

    def inside(self) -> Any:
        """With the weights in it: ONNX in one piece."""
        return self._with([numpy_helper.from_array(self.weights.arrays[name], name) for name in self.used])

    def over(self, places: Mapping[str, tuple[str, int, int]], metadata: Mapping[str, str]) -> Any:
        """With the weights where `Weights.write` put them."""
        model = self._with([_external(name, self.weights.arrays[name], places[name]) for name in self.used])
        helper.set_model_props(model, dict(metadata))
        return model

    def _with(self, tensors: list[Any]) -> Any:
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        model.graph.initializer.extend(tensors)
        return model


class Graph:
    """One graph in the making. Values are known by their names, as ONNX has them."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.used: dict[str, None] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.nodes: list[Any] = []
        self._constants: dict[tuple, tuple[str, np.ndarray]] = {}
        self._known: dict[tuple, list[str]] = {}

    def input(self, name: str, shape: list[int | str]) -> str:
        """A float32 input; a dimension with a name may have any length."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, value: str, name: str, shape: list[int | str]) -> None:
        """Give a float32 value out under a name."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str, tensor: Tensor, owner: str = "") -> str:
        """A tensor of the model, kept as float32 in the file of its owner.

        Raises:
            ValueError: it has other values than the one of this name before: see `Weights.add`.
        """
        full = f"{owner}/{name}" if owner else name
        self.weights.add(full, tensor.detach().cpu().float().contiguous().numpy(), owner)
        self.used[full] = None
        return full

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """Numbers that say how to compute, such as shapes; they lie in the graph itself."""
        array = np.array(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        return self._constants.setdefault(key, (f"constant_{len(self._constants)}", array))[0]

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """The output of an operation, or the list of its outputs if it has several.

        Args:
            name: of the node, for whoever has to find it again.
        """
        key = (kind, inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._known:
            name = name or f"{kind}_{len(self.nodes)}"
            self._known[key] = [name if outputs == 1 else f"{name}_{i}" for i in range(outputs)]
            self.nodes.append(helper.make_node(kind, list(inputs), self._known[key], name=name, **attributes))
        return self._known[key][0] if outputs == 1 else self._known[key]

    def finish(self) -> Model:
        constants = [numpy_helper.from_array(array, name) for name, array in self._constants.values()]
        graph = helper.make_graph(self.nodes, "moe_bsr", self.inputs, self.outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "moe_bsr"
        return Model(model, list(self.used), self.weights)


def _external(name: str, array: np.ndarray, place: tuple[str, int, int]) -> Any:
    """A tensor that lies in a file beside the graph."""
    file, offset, length = place
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
