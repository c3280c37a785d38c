"""Publishes trained networks: TorchScript and ONNX files, their evidence, a library of models."""
