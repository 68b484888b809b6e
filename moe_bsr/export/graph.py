"""Build ONNX graphs node by node. Their weights are stored once, in files that the graphs share.

torch's own exporter takes about a minute per task, chooses the tensors' names itself and cannot trace a mixture of
experts. A ViT needs only thirty kinds of operators, so the nodes are written directly. A graph never computes the same
twice: if it already has an operation on the same inputs, that operation's output is returned. This is how tasks come to
share their common blocks.
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
IR_VERSION = 9  # from the same release of ONNX
ALIGNMENT = 64  # bytes; each tensor starts at a multiple of it in its file

SHARED_FILE = "weights.data"  # tensors that belong to no single task


def data_file(owner: str) -> str:
    """Return the name of the file with a task's tensors, or with the shared ones if `owner` is ""."""
    return f"{owner}.data" if owner else SHARED_FILE


@dataclass
class Weights:
    """Tensors of all graphs by name, and the task that each belongs to ("" if shared).

    Each owner has a file of its own. If tasks wrote to one file, a larger tensor of one task would move the tensors
    behind it, and graphs of other tasks would silently read them at the wrong offset.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, array: np.ndarray, owner: str) -> None:
        """Add a tensor.

        Raises:
            ValueError: there is a tensor of this name with other values, so the tasks cannot share it.
        """
        known = self.arrays.setdefault(name, array)
        if known is not array and not np.array_equal(known, array):
            raise ValueError(f"tensor {name}: two tasks have different values for it, so it cannot be shared")
        self.owners[name] = owner

    def write(self, folder: Path) -> dict[str, tuple[str, int, int]]:
        """Write the data files and return (file, offset, length in bytes) of each tensor.

        A tensor's offset depends only on the names and shapes of the tensors in its own file.
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
    """ONNX model without its weights.

    Attributes:
        used: names of its weights.
        weights: tensors of all graphs.
    """

    proto: Any
    used: list[str]
    weights: Weights

    def inside(self) -> Any:
        """Return the model with its weights inside it."""
        return self._with([numpy_helper.from_array(self.weights.arrays[name], name) for name in self.used])

    def over(self, places: Mapping[str, tuple[str, int, int]], metadata: Mapping[str, str]) -> Any:
        """Return the model with references to the files where `Weights.write` put the weights."""
        model = self._with([_external(name, self.weights.arrays[name], places[name]) for name in self.used])
        helper.set_model_props(model, dict(metadata))
        return model

    def _with(self, tensors: list[Any]) -> Any:
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        model.graph.initializer.extend(tensors)
        return model


class Graph:
    """Builder of one graph. A value in it is represented by its name, as in ONNX."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.used: dict[str, None] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.nodes: list[Any] = []
        self._constants: dict[tuple, tuple[str, np.ndarray]] = {}
        self._known: dict[tuple, list[str]] = {}

    def input(self, name: str, shape: list[int | str]) -> str:
        """Add a float32 input and return it. A dimension given by a name may have any length."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, value: str, name: str, shape: list[int | str]) -> None:
        """Make a float32 value an output of the graph with this name."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str, tensor: Tensor, owner: str = "") -> str:
        """Add a tensor of the model, stored as float32 in the file of its owner, and return it.

        Raises:
            ValueError: there is a tensor of this name with other values, see `Weights.add`.
        """
        full = f"{owner}/{name}" if owner else name
        self.weights.add(full, tensor.detach().cpu().float().contiguous().numpy(), owner)
        self.used[full] = None
        return full

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """Add a constant such as a shape, stored in the graph itself, and return it."""
        array = np.array(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        return self._constants.setdefault(key, (f"constant_{len(self._constants)}", array))[0]

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """Add an operation, unless the graph has it already, and return its output, or a list of several outputs.

        Args:
            outputs: number of outputs.
            name: name of the node, if it must be found again later.
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
    """Return a tensor whose values are in a file beside the graph."""
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
