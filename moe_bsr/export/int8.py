"""Quantize graphs to int8 by onnxruntime's dynamic quantization, which needs no calibration images.

Weights are rounded once, with one scale per matrix. Activations are rounded in each call, by their range. Routers and
heads stay in float32: they have a few kilobytes, and a rounded router would send tokens to other experts.
"""

import logging
import tempfile
from pathlib import Path

import onnx
from onnx import numpy_helper

from moe_bsr.export.graph import Model, Weights

ENDINGS = ("_quantized", "_scale", "_zero_point")  # suffixes of the tensors by which onnxruntime replaces a weight


def quantized(models: dict[str, Model]) -> dict[str, Model]:
    """Return the quantized graphs by name. They share weights as before."""
    weights = Weights()
    return {name: _quantized(model, weights) for name, model in models.items()}


def _quantized(model: Model, weights: Weights) -> Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = model.inside()
    left = [node.name for node in proto.graph.node if node.name.endswith(("router", "/head"))]
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, before)
        logger = logging.getLogger()
        disabled, logger.disabled = logger.disabled, True  # onnxruntime would advise steps that change nothing here
        try:
            quantize_dynamic(
                before, after, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], nodes_to_exclude=left
            )
        finally:
            logger.disabled = disabled
        found = onnx.load(after)
    constants, used = [], []
    for tensor in found.graph.initializer:
        origin = next((tensor.name.removesuffix(end) for end in ENDINGS if tensor.name.endswith(end)), tensor.name)
        owner = model.weights.owners.get(tensor.name, model.weights.owners.get(origin))
        if owner is None:
            constants.append(tensor)
        else:
            weights.add(tensor.name, numpy_helper.to_array(tensor), owner)
            used.append(tensor.name)
    del found.graph.initializer[:]
    found.graph.initializer.extend(constants)
    return Model(found, used, weights)
