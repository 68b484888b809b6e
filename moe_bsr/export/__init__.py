"""Export of a trained run to a device: ONNX graphs, weights, labels, a model card, and a program without torch."""
