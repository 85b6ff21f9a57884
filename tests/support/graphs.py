"""Build and run small ONNX graphs."""

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from questpress.export.conversion.rewrite import rewrite
from questpress.export.int8.quantizer import Prepared, int8_scope


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    *,
    given: Sequence[object] = ("batch", 3, 8, 8),
    outputs: Sequence[str] = ("output",),
    opset: int = 18,
) -> onnx.ModelProto:
    """Return a model with the float input "input" and float outputs of any shape."""
    graph = helper.make_graph(
        list(nodes),
        "by hand",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(given))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def prepared(model: onnx.ModelProto) -> Prepared:
    return Prepared(model, int8_scope(model), ())


def rewritten(model: onnx.ModelProto, batch: np.ndarray, rules: Collection[str] | None = None) -> list[str]:
    """Rewrite a model, assert that its outputs are the same, and return the rules that changed it."""
    before = copy.deepcopy(model)
    changed = rewrite(model, rules)
    assert_same_outputs(before, model, batch)
    return changed


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run_graph(model: onnx.ModelProto, batch: np.ndarray, *, optimized: bool = True) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": batch})


def assert_same_outputs(before: onnx.ModelProto, after: onnx.ModelProto, batch: np.ndarray) -> None:
    """Compare outputs within 1e-5 of their range, with and without the optimizations of ONNX Runtime."""
    onnx.checker.check_model(after, full_check=True)
    expected = run_graph(before, batch, optimized=False)
    for optimized in (True, False):
        for was, now in zip(expected, run_graph(after, batch, optimized=optimized), strict=True):
            assert now.shape == was.shape
            assert np.abs(now - was).max() <= 1e-5 * max(1.0, float(np.ptp(was)))
