"""Reshapes to the size of the batch, as older exporters write them."""

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from questpress.export.conversion.onnx_export import constant_reshapes

from tests.support.graphs import answers


def flattened(shape: list[int | str]) -> onnx.ModelProto:
    """x [batch, 2, 3, 4] → Reshape(x, Concat(Shape(x)[0:1], [24])), its output annotated with ``shape``."""
    nodes = [
        helper.make_node("Shape", ["input"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["input", "target"], ["flat"], allowzero=1),
        helper.make_node("Relu", ["flat"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "flattened",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2, 3, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 24])],
        [numpy_helper.from_array(np.array([24], np.int64), "rest")],
        value_info=[helper.make_tensor_value_info("flat", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_reshape_to_the_size_of_the_batch_gets_a_constant_target_and_answers_as_before() -> None:
    before = flattened(["batch", 24])
    model = onnx_ir.from_proto(before)
    assert constant_reshapes(model) == 1
    after = onnx_ir.to_proto(model)
    reshape = next(one for one in after.graph.node if one.op_type == "Reshape")
    constants = {one.name: numpy_helper.to_array(one).tolist() for one in after.graph.initializer}
    assert constants[reshape.input[1]] == [-1, 24]
    onnx.checker.check_model(after, full_check=True)
    for batch in (1, 2, 5):
        x = np.random.default_rng(batch).standard_normal((batch, 2, 3, 4), np.float32)
        np.testing.assert_array_equal(answers(after, x)[0], np.maximum(x.reshape(batch, 24), 0))
    assert constant_reshapes(model) == 0


@pytest.mark.parametrize("shape", [["batch", "rest"], [2, 24], ["batch", 0]])
def test_what_is_not_known_beside_the_batch_is_left_to_the_graph(shape: list[int | str]) -> None:
    assert constant_reshapes(onnx_ir.from_proto(flattened(shape))) == 0
