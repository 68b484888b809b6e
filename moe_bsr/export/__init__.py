"""A trained run leaves for a device: ONNX graphs, weights, labels, a model card, and a program that needs no torch."""
