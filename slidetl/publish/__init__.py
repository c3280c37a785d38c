"""Publishes what was trained: TorchScript and ONNX files, their evidence, a library of models."""
