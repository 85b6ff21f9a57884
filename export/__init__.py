"""ONNX export, int8 quantization, the artifact and its runtime, and latency measurement."""

import os

# ONNX Runtime 1.31 and later sends telemetry and keeps a device id in the user's cache, unless this is set
# before it is imported. This file ships with every artifact.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
