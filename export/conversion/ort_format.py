"""Files in ONNX Runtime's own format (.ort), which its minimal builds read.

ONNX Runtime does not optimize such a file when it loads it. So it is optimized here, by all but the NCHWc
layout, whose blocks have the width of this processor's vectors. ONNX Runtime's own tool,
`convert_onnx_models_to_ort`, does the same but cannot leave out `DISABLED_OPTIMIZERS`.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from .. import runtime
from ..errors import ExportError
from .onnx_export import OnnxFile, describe

NOT_PORTABLE = "NchwcTransformer"


def write_ort(source: Path, path: Path, target: str | None) -> OnnxFile:
    """Convert an ONNX file; `path` ends with `.ort`, and `target` is the int8 target, None for fp32.

    Opset and IR version in the result are those of `source`. Raises ExportError if onnxruntime cannot.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    options.add_session_config_entry("session.save_model_format", "ORT")
    # Otherwise int8 activations become uint8, which the kernels of x86 require.
    options.add_session_config_entry("session.qdqisint8allowed", str(int(target == "arm64")))
    try:
        ort.InferenceSession(
            str(source),
            options,
            providers=[runtime.CPU],
            disabled_optimizers=[*runtime.DISABLED_OPTIMIZERS, NOT_PORTABLE],
        )
    except Exception as error:  # onnxruntime's exceptions have no common public class
        reason = " ".join(str(error).split())
        raise ExportError(f"{source.name} cannot be converted to {path.suffix}: {reason}") from error
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return replace(describe(source), path=path, bytes=len(content), sha256=sha256)
