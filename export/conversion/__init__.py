"""Conversion to ONNX: export from PyTorch, uint8 input, and checks of untrusted files."""
