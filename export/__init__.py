"""From a trained network to the files that ship, and what runs them."""

import os

# ONNX Runtime of 1.31 and later tells its makers of the machine it runs on, and keeps a number for it in the
# user's cache, unless this is said before it is imported. As in runtime.py, which ships alone.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
