"""Malicious ONNX files, and the error message that rejects each."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Harm = Callable[[onnx.ModelProto], None]


def little() -> onnx.ModelProto:
    """Return a convolution and global average pooling, from images to two values."""
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["y"])],
        "little",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2, 1, 1])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "hidden")
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="weights.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=tensor))


def external_in_a_sparse_tensor(model: onnx.ModelProto) -> None:
    values = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    values.external_data.add(key="location", value="/etc/passwd")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def external_in_a_branch(model: onnx.ModelProto) -> None:
    inner = little()
    external(inner)
    model.graph.node.append(helper.make_node("If", ["y"], ["z"], then_branch=inner.graph))


def a_strange_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil.example", 1))


def a_strange_node(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "evil.example"


def a_promise(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2_000_000


def an_impossible_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**31, 2**31, 2, 2]


def a_negative_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -3


def a_circle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def a_deep_nest(model: onnx.ModelProto) -> None:
    graph = little().graph
    for _ in range(12):
        outer = little().graph
        outer.node.append(helper.make_node("If", ["y"], ["z"], then_branch=graph))
        graph = outer
    model.graph.CopyFrom(graph)


def external_in_a_function(model: onnx.ModelProto) -> None:
    hidden = numpy_helper.from_array(np.ones(2, np.float32), "hidden")
    hidden.ClearField("raw_data")
    hidden.external_data.add(key="location", value="weights.bin")
    define(model, "F", [helper.make_node("Constant", [], ["b"], value=hidden)])


def external_in_a_functions_default(model: onnx.ModelProto) -> None:
    inner = little()
    external(inner)
    define(model, "F", [helper.make_node("Relu", ["a"], ["b"])])
    model.functions[0].attribute_proto.append(helper.make_attribute("body", inner.graph))


def external_to_train_with(model: onnx.ModelProto) -> None:
    inner = little()
    external(inner)
    model.training_info.add().initialization.CopyFrom(inner.graph)


def external_by_a_list(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "hidden")
    tensor.external_data.add(key="location", value="/dev/zero")
    node = helper.make_node("Constant", [], ["k"])
    node.attribute.append(helper.make_attribute("values", [tensor]))
    model.graph.node.insert(0, node)


def a_file_for_a_provider(model: onnx.ModelProto) -> None:
    node = helper.make_node("EPContext", ["y"], ["z"], domain="com.microsoft", ep_cache_context="../x")
    model.graph.node.append(node)


def define(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> None:
    """Return a local function of the model, from ``a`` to ``b``."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", name, ["a"], ["b"], nodes, opsets))
    if len(model.opset_import) == 1:
        model.opset_import.append(helper.make_opsetid("own", 1))


def a_function_that_calls_itself(model: onnx.ModelProto) -> None:
    define(model, "F", [helper.make_node("G", ["a"], ["b"], domain="own")])
    define(model, "G", [helper.make_node("F", ["a"], ["b"], domain="own")])
    model.graph.node.append(helper.make_node("F", ["y"], ["z"], domain="own"))


def functions_of_functions(model: onnx.ModelProto) -> None:
    for depth in range(9):
        inner = helper.make_node(f"F{depth - 1}", ["a"], ["b"], domain="own") if depth else None
        leaf = helper.make_node("Relu", ["a"], ["b"])
        define(model, f"F{depth}", [inner or leaf] * 10)
    model.graph.node.append(helper.make_node("F8", ["y"], ["z"], domain="own"))


def two_functions_of_a_name(model: onnx.ModelProto) -> None:
    for _ in range(2):
        define(model, "F", [helper.make_node("Relu", ["a"], ["b"])])


def a_strange_domain_of_a_function(model: onnx.ModelProto) -> None:
    define(model, "F", [helper.make_node("Run", ["a"], ["b"], domain="evil.example")])


def an_empty_promise(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[0] = 2_000_000


def a_zero_and_a_huge_side(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [2**60, 0, 1, 1]
    tensor.raw_data = b""


def a_thousand_sides(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1] * 1000


def a_huge_sparse_tensor(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**16, 2**16]))


def a_circle_in_a_branch(model: onnx.ModelProto) -> None:
    inner = little()
    a_circle(inner)
    inner.graph.node[0].input[0] = "later"
    model.graph.node.append(helper.make_node("If", ["y"], ["z"], then_branch=inner.graph))


def a_long_name(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "x" * 1_000_000


def nothing(model: onnx.ModelProto) -> None:
    model.graph.ClearField("node")


def no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


HARMS: list[tuple[Harm, str]] = [
    (external, "refers to data in another file"),
    (external_in_an_attribute, "refers to data in another file"),
    (external_in_a_sparse_tensor, "refers to data in another file"),
    (external_in_a_branch, "refers to data in another file"),
    (a_strange_domain, "operators of 'evil.example'"),
    (a_strange_node, "operator 'Conv' of 'evil.example'"),
    (a_promise, "24 bytes, not 24,000,000"),
    (an_impossible_size, "impossible size"),
    (a_negative_size, "impossible size"),
    (a_circle, "has a cycle"),
    (a_deep_nest, "nested more than 8 deep"),
    (external_in_a_function, r"refers to data in another file 'weights.bin'"),
    (external_in_a_functions_default, "refers to data in another file"),
    (external_to_train_with, "contains training graphs"),
    (external_by_a_list, "refers to data in another file '/dev/zero'"),
    (a_file_for_a_provider, "operator 'EPContext'"),
    (a_function_that_calls_itself, "functions that call themselves"),
    (functions_of_functions, "more than 200,000 nodes, including those of its functions"),
    (two_functions_of_a_name, "two functions of the same name"),
    (a_strange_domain_of_a_function, "operator 'Run' of 'evil.example'"),
    (an_empty_promise, "with 0 elements, not 6,000,000"),
    (a_zero_and_a_huge_side, "impossible size"),
    (a_thousand_sides, r"impossible size .* …"),
    (a_huge_sparse_tensor, "sparse tensor of an impossible size"),
    (a_circle_in_a_branch, "input 'later' no earlier node computes"),
    (a_long_name, "input 'x+…'"),
    (nothing, "contains no network"),
    (no_type, "of unknown type"),
]
