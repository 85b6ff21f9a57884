"""Ranges are those of all calibration images, whatever the chunks they come in."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from questpress.export.int8 import quantizer
from questpress.export.int8.quantizer import CHUNK, METHODS, calibrate_ranges, chunks

from tests.support.graphs import graph_of, weights

node = helper.make_node
OPERATORS = ("Conv", "Relu")


def two_layers() -> onnx.ModelProto:
    """The input doubled, its negative part cut, and a layer that reads it."""
    nodes = [
        node("Conv", ["input", "double"], ["a"], name="doubles"),
        node("Relu", ["a"], ["b"], name="cuts"),
        node("Conv", ["b", "w"], ["output"], name="reads"),
    ]
    double = 2 * np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    return graph_of(nodes, {"double": double, "w": weights(4, 3, 1, 1)})


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 8, 8), dtype=np.float32)


def range_of(found: Mapping[str, object], name: str) -> tuple[float, float]:
    low, high = found[name].range_value[:2]  # type: ignore[attr-defined]
    return low.item(), high.item()


def with_outlier() -> np.ndarray:
    """Five chunks; one pixel of the first is far off on either side."""
    batch = images(5 * CHUNK)
    batch[0, 0, 0, 0], batch[1, 1, 1, 1] = 50.0, -30.0
    return batch


def test_minmax_is_the_least_and_the_largest_over_all_images() -> None:
    batch = with_outlier()
    found, n = calibrate_ranges(two_layers(), [batch], "minmax", OPERATORS)
    assert n == 5 * CHUNK
    assert range_of(found, "input") == (-30.0, 50.0)
    assert range_of(found, "a") == (-60.0, 100.0)
    assert range_of(found, "b") == (0.0, 100.0)
    plain, _ = calibrate_ranges(two_layers(), [images(5 * CHUNK)], "minmax", OPERATORS)
    assert range_of(plain, "input") == (float(images(40).min()), float(images(40).max()))


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_outlier_of_the_first_chunk_is_in_the_histogram_at_the_end(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[Mapping[str, tuple[np.ndarray, ...]]] = []
    collector = quantizer.calibrate.HistogramCollector
    compute = collector.compute_collection_result

    def watched(self: object) -> object:
        collected.append(self.histogram_dict)  # type: ignore[attr-defined]
        return compute(self)

    monkeypatch.setattr(collector, "compute_collection_result", watched)
    batch = with_outlier()
    found, _ = calibrate_ranges(two_layers(), [batch], method, OPERATORS)
    counts, edges, least, largest, *_ = collected[0]["input"]
    assert (float(least), float(largest)) == (-30.0, 50.0)
    assert counts.sum() == batch.size
    occupied = np.flatnonzero(counts)
    assert edges[occupied[-1]] <= 50.0 <= edges[occupied[-1] + 1] + 1e-4
    assert edges[occupied[0]] - 1e-4 <= -30.0 <= edges[occupied[0] + 1]
    low, high = range_of(found, "input")
    assert -30.0 <= low < high <= 50.0


def test_percentile_cuts_half_of_what_it_leaves_out_on_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = METHODS["percentile"]
    monkeypatch.setitem(METHODS, "percentile", (kind, {**options, "percentile": 98}))
    batch = images(40)
    found, _ = calibrate_ranges(two_layers(), [batch], "percentile", OPERATORS)
    low, high = range_of(found, "input")
    width = 2 * float(np.abs(batch).max()) / 2048
    assert low == pytest.approx(np.percentile(batch, 1), abs=2 * width)
    assert high == pytest.approx(np.percentile(batch, 99), abs=2 * width)


def test_moving_average_is_its_recurrence_over_chunks() -> None:
    batch = images(3 * CHUNK + 3) * np.linspace(1, 3, 3 * CHUNK + 3, dtype=np.float32)[:, None, None, None]
    low, high = float(batch[:CHUNK].min()), float(batch[:CHUNK].max())
    for start in range(CHUNK, len(batch), CHUNK):
        chunk = batch[start : start + CHUNK]
        low += 0.05 * (float(chunk.min()) - low)
        high += 0.05 * (float(chunk.max()) - high)
    found, _ = calibrate_ranges(two_layers(), [batch], "moving-average", OPERATORS)
    assert range_of(found, "input") == pytest.approx((low, high), rel=1e-6)
    assert range_of(found, "a") == pytest.approx((2 * low, 2 * high), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_images_are_processed_in_chunks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    session = quantizer._session

    class Watched:
        def __init__(self, real: ort.InferenceSession) -> None:
            self.real = real

        def run(self, names: object, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            seen.append(len(feed["input"]))
            return self.real.run(names, feed)

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    monkeypatch.setattr(quantizer, "_session", lambda path: Watched(session(path)))
    _, n = calibrate_ranges(two_layers(), [images(20), images(3)], method, OPERATORS)
    assert seen == [8, 8, 4, 3] and n == 23


def test_chunks_are_all_images_in_their_order() -> None:
    batches = [images(20), images(0), images(9, seed=1).astype(np.float64)]
    cut = list(chunks(batches))
    assert [len(chunk) for chunk in cut] == [8, 8, 4, 8, 1]
    assert all(chunk.dtype == np.float32 and chunk.flags.c_contiguous for chunk in cut)
    assert np.array_equal(np.concatenate(cut), np.concatenate([batches[0], batches[2]]).astype(np.float32))
