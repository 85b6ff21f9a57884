"""Reshapes whose target the graph computes from the size of the batch, written with a constant target."""

import numpy as np
import onnx_ir

_CONSTANT = ("Constant", "")


def constant_reshapes(model: onnx_ir.Model) -> int:
    """Give such reshapes the target [-1, …], and return how many there were; the graph computes the same.

    PyTorch 2.11's exporter writes ``x.flatten(1)`` as Shape, Slice or Concat, and Reshape, where later ones
    write one Reshape. What counts the elements keeps a graph from being calibrated, equalised and trained as
    a chain of float operators, and costs two more kernels a run.
    """
    graph = model.graph
    found = 0
    for node in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        target, output = node.inputs[1], node.outputs[0]
        if target is None or _known(target) or output.shape is None or not output.shape:
            continue
        batch, *rest = output.shape.dims
        if isinstance(batch, int) or not all(isinstance(size, int) and size > 0 for size in rest):
            continue
        name = f"{output.name}_target"
        constant = onnx_ir.tensor(np.array([-1, *rest], np.int64), name=name)
        value = onnx_ir.Value(
            name=name,
            const_value=constant,
            shape=onnx_ir.Shape([len(output.shape)]),
            type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        )
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        found += 1
    return found


def _known(value: onnx_ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (
        producer is not None and (producer.op_type, producer.domain) == _CONSTANT
    )
