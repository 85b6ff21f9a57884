"""Files of a fixed batch size: the same outputs, one image after another."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from questpress.export.conversion.batch import fix_batch, has_fixed_batch, set_batch
from questpress.export.int8 import quantizer
from questpress.export.runtime import Classifier

from tests.support.networks import color_classifier, images, onnx_file, quantize_int8


def dims(path: Path) -> list[int | str]:
    graph = onnx.load(path).graph
    sizes = [value.type.tensor_type.shape.dim[0] for value in (*graph.input, *graph.output)]
    return [size.dim_value or size.dim_param for size in sizes]


def test_file_of_single_images_computes_the_same(tmp_path: Path) -> None:
    dynamic, path = color_classifier(tmp_path / "dynamic.onnx"), color_classifier(tmp_path / "fixed.onnx")
    file = fix_batch(onnx_file(path))
    assert dims(dynamic) == ["batch", "batch"] and dims(path) == [1, 1]
    assert (file.bytes, file.sha256) == (path.stat().st_size, onnx_file(path).sha256)
    fixed, batch = Classifier.load(path, threads=1), images(5, 8)
    expected = Classifier.load(dynamic, threads=1).logits(batch)
    np.testing.assert_array_equal(fixed.logits(batch), expected)
    with pytest.raises(Exception, match="invalid dimensions"):
        fixed.session.run(None, {"input": batch})
    model = onnx.load(path)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    assert [dim.dim_value for dim in shapes["pooled"]] == [1, 3, 1, 1]
    set_batch(model, None)
    assert not has_fixed_batch(model) and has_fixed_batch(onnx.load(path))


def test_int8_file_of_a_fixed_file_is_fixed_and_equals_the_dynamic_one(tmp_path: Path) -> None:
    outputs = []
    for name in ("dynamic", "fixed"):
        path = color_classifier(tmp_path / f"{name}.onnx")
        if name == "fixed":
            fix_batch(onnx_file(path))
            assert quantizer.prepare(path).fixed_batch
        int8 = quantize_int8(path, tmp_path / f"{name}.int8.onnx", [images(4, 8), images(2, 8, seed=1)])
        assert dims(int8.path) == ([1, 1] if name == "fixed" else ["batch", "batch"])
        outputs.append(Classifier.load(int8.path, threads=1).logits(images(5, 8, seed=2)))
    np.testing.assert_array_equal(*outputs)
