"""ONNX export, int8 quantization, the artifact and its runtime, and latency measurement."""

import os

# Disable ONNX Runtime's telemetry before it is imported, as runtime.py does in an artifact.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
