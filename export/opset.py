"""Which versions of ONNX's operator set can be written and run here."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import version

import onnx

from . import runtime
from .errors import ExportError

log = logging.getLogger(__name__)

LEAST_OPSET = 18
"""torch's exporter writes no older one, whatever it is asked for."""


@cache
def greatest_opset() -> int:
    """The newest opset that the installed onnx knows and the installed onnxruntime runs."""
    newest: int = onnx.defs.onnx_opset_version()
    return next(opset for opset in range(newest, LEAST_OPSET - 1, -1) if _runs(opset))


def check_opset(opset: int) -> None:
    """Raise ExportError where no file of this opset can be written and run here."""
    if not LEAST_OPSET <= opset <= greatest_opset():
        raise ExportError(
            f"opset {opset} cannot be written and run here: choose one from {LEAST_OPSET} to "
            f"{greatest_opset()} (onnxruntime {version('onnxruntime')}, onnx {version('onnx')})"
        )


def _runs(opset: int) -> bool:
    """Whether onnxruntime loads a model of this opset: it says so nowhere but in its answer."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "one node",
        [value("x", onnx.TensorProto.FLOAT, [1])],
        [value("y", onnx.TensorProto.FLOAT, [1])],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    ir_version = onnx.helper.find_min_ir_version_for(imports)
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    try:
        runtime.session(model.SerializeToString(), 1)
    except runtime.ArtifactError as refusal:
        log.debug("opset %d: %s", opset, refusal)
        return False
    return True
