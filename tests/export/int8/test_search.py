"""The search goes step by step, stops where the budget holds, and takes the best of what holds it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.errors import CalibratorError, ExportError
from questpress.export.int8 import quantizer
from questpress.export.int8.correction import measure_sensitivity
from questpress.export.int8.fake_quantize import FakeQuantized
from questpress.export.int8.quantizer import (
    METHODS,
    Prepared,
    calibrate_ranges,
    prepare,
    quantize,
    read_recipe,
)
from questpress.export.int8.search import Judge, Learned, Search, search
from questpress.export.int8.targets import find_target
from questpress.export.results import Verdict

from tests.support.graphs import constants, graph_of, prepared, weights
from tests.support.networks import images, small_conv_net

node = helper.make_node
TYPES = find_target("x86-vnni")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    path = tmp_path_factory.mktemp("search") / "small.onnx"
    return prepare(export_onnx(small_conv_net(), path, 16, metadata={}).path)


def make_judge(verdicts: Sequence[Verdict]) -> Judge:
    """A judge that returns these verdicts in turn, and then the last one."""
    left = list(verdicts)

    def judge(path: Path) -> Verdict:
        assert path.is_file()
        return left.pop(0) if len(left) > 1 else left[0]

    return judge


def verdict(score: float, holds: bool, sqnr: float = 10.0) -> Verdict:
    return Verdict(score=score, lost=100 - score, holds=holds, sqnr=sqnr)


NO = verdict(50, False)


def run_search(small: Prepared, folder: Path, judge: Judge, **more: object) -> Search:
    folder.mkdir()
    return search(small, [images(24)], TYPES, folder, judge, **more)  # type: ignore[arg-type]


def names(result: Search) -> list[str]:
    return [candidate.name for candidate in result.candidates]


def test_search_stops_at_calibrators_if_the_budget_holds(small: Prepared, tmp_path: Path) -> None:
    verdicts = [verdict(90, True), verdict(92, True), NO, verdict(91, True), NO]
    reported: list[str] = []
    result = run_search(small, tmp_path / "a", make_judge(verdicts), progress=reported.append)
    assert names(result) == reported == list(METHODS)
    assert result.chosen == 1 and result.sources == () and result.stopped is None


def test_steps_come_in_their_order_and_end_with_the_first_that_holds(small: Prepared, tmp_path: Path) -> None:
    result = run_search(small, tmp_path / "a", make_judge([NO]), calibrators=["minmax", "percentile"])
    every = names(result)
    # Nothing was better than the first calibrator, so every step starts from it.
    assert every[:4] == ["minmax", "percentile", "minmax, equalized", "minmax, biases corrected"]
    islands = result.candidates[4:]
    assert islands and all(x.name == f"minmax, {len(x.kept_float)} nodes float" for x in islands)
    assert result.chosen is None and result.sources
    for n in range(1, len(every)):
        first = run_search(
            small,
            tmp_path / f"b{n}",
            make_judge([*[NO] * n, verdict(80, True), NO]),
            calibrators=["minmax", "percentile"],
        )
        assert names(first) == every[: max(n + 1, 2)]
        assert first.chosen == n
        assert bool(first.sources) == (n >= 4)
        if n in (2, 4):
            assert read_recipe(first.files[n].path) == first.files[n].recipe


def test_step_starts_from_the_best_so_far(small: Prepared, tmp_path: Path) -> None:
    verdicts = [NO, *(verdict(score, False) for score in (60, 70, 40, 75, 10))]
    result = run_search(small, tmp_path / "a", make_judge(verdicts), calibrators=["minmax", "moving-average"])
    assert names(result)[:5] == [
        "minmax",
        "moving-average",
        "moving-average, equalized",
        "moving-average, equalized, biases corrected",
        # what correction made worse is not built upon
        f"moving-average, equalized, {len(result.candidates[4].kept_float)} nodes float",
    ]
    last, made_by = result.candidates[4], result.files[4].recipe
    assert last.equalized and not last.bias_corrected and last.calibration == "moving-average"
    assert made_by["equalized"] and not made_by["bias_corrected"]
    assert made_by["calibration"] == {"method": "moving-average", "images": 24}


def test_islands_grow_and_each_holds_the_one_before(small: Prepared, tmp_path: Path) -> None:
    result = run_search(small, tmp_path / "a", make_judge([NO]), calibrators=["minmax"])
    islands = [set(x.kept_float) for x in result.candidates if x.kept_float]
    assert len(islands) >= 2
    for less, more in pairwise(islands):
        assert less < more
    worst = result.sources[0]
    assert islands[0] == set(worst.nodes) and worst.sqnr == min(x.sqnr for x in result.sources)
    for candidate, file in zip(result.candidates, result.files, strict=True):
        assert set(candidate.kept_float) <= set(file.recipe["kept_float"])


def test_most_accurate_candidate_within_the_budget_ships(small: Prepared, tmp_path: Path) -> None:
    for n, (verdicts, chosen) in enumerate(
        [
            ([verdict(90, True), verdict(95, False, 99), verdict(91, True, 1), verdict(90, True, 50)], 2),
            ([verdict(90, True, 10), verdict(90, True, 30), verdict(90, True, 20), verdict(80, True, 90)], 1),
            ([verdict(90, True, 30), verdict(90, True, 30), verdict(90, True, 30), verdict(90, True, 30)], 0),
        ]
    ):
        result = run_search(small, tmp_path / str(n), make_judge(verdicts))
        assert result.chosen == chosen


def test_lossless_candidate_ends_the_first_step(small: Prepared, tmp_path: Path) -> None:
    """Without loss and with more noise the next calibrator is tried, too."""
    verdicts = [verdict(100, True, 15), verdict(100, True, 25), verdict(100, True, 30)]
    result = run_search(small, tmp_path / "a", make_judge(verdicts))
    assert names(result) == ["minmax", "percentile"] and result.chosen == 1


def test_fewer_float_islands_break_ties(small: Prepared, tmp_path: Path) -> None:
    result = run_search(small, tmp_path / "a", make_judge([verdict(90, True)]), calibrators=["minmax"])
    plain = result.candidates[0]
    island = plain.model_copy(update={"kept_float": ("a", "b"), "sqnr": 99.0})
    assert plain.rank > island.rank
    assert island.model_copy(update={"score": 90.1, "sqnr": 1.0}).rank > plain.rank
    assert plain.model_copy(update={"score": 99.0, "holds": False}).rank < island.rank


def test_learned_ranges_are_a_candidate_and_in_its_file(small: Prepared, tmp_path: Path) -> None:
    ranges, _ = calibrate_ranges(small.model, [images(24)], "minmax", small.scope.op_types)
    network = FakeQuantized(small, quantize(small, ranges, TYPES), TYPES)
    with torch.no_grad():
        for module in network.ranges.values():
            module.logs.fill_(-0.25)
    overrides = network.overrides()
    result = run_search(
        small,
        tmp_path / "a",
        make_judge([verdict(95, True), verdict(90, True)]),
        learned=Learned(small, overrides),
        calibrators=["minmax"],
    )
    assert names(result) == ["learned", "minmax"] and result.chosen == 0
    scales = [value for name, value in constants(onnx.load(str(result.files[0].path))).items()
              if name.endswith("_scale")]  # fmt: skip
    assert all(any(np.array_equal(x["scale"], scale) for scale in scales) for x in overrides.values())
    judge, learned = make_judge([verdict(95, True)]), Learned(small, overrides)
    alone = run_search(small, tmp_path / "b", judge, learned=learned, calibrators=[])
    assert names(alone) == ["learned"]


def test_learned_ranges_that_do_not_hold_are_not_equalized_but_corrected(
    small: Prepared, tmp_path: Path
) -> None:
    ranges, _ = calibrate_ranges(small.model, [images(24)], "minmax", small.scope.op_types)
    overrides = FakeQuantized(small, quantize(small, ranges, TYPES), TYPES).overrides()
    result = run_search(
        small,
        tmp_path / "a",
        make_judge([verdict(80, False), verdict(70, False), verdict(85, True)]),
        learned=Learned(small, overrides),
        calibrators=["minmax"],
    )
    assert names(result) == ["learned", "minmax", "learned, biases corrected"]


def test_search_needs_a_calibrator(small: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="requires at least one calibrator"):
        run_search(small, tmp_path / "a", make_judge([NO]), calibrators=[])


def test_graph_unsupported_by_torch_is_searched_by_calibrators(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["input", "w"], ["a"], name="conv"),
        node("CumSum", ["a", "axis"], ["b"], name="sums"),
        node("Conv", ["b", "v"], ["output"], name="last"),
    ]
    constants = {"w": weights(4, 3, 1, 1), "v": weights(2, 4, 1, 1), "axis": np.array(2)}
    model = graph_of(nodes, constants, given=("batch", 3, 16, 16))
    odd = prepared(model)
    result = run_search(odd, tmp_path / "a", make_judge([NO]))
    assert names(result) == list(METHODS) and result.chosen is None
    assert result.stopped is not None and "operator CumSum (sums)" in result.stopped
    held = run_search(odd, tmp_path / "b", make_judge([verdict(90, True)]))
    assert held.chosen is not None and held.stopped is None


def test_sensitive_come_worst_first_with_nodes_that_keep_them_from_being_rounded(small: Prepared) -> None:
    types = find_target("arm64")
    ranges, _ = calibrate_ranges(small.model, [images(24)], "minmax", small.scope.op_types)
    network = FakeQuantized(small, quantize(small, ranges, types), types).eval()
    sources = measure_sensitivity(small, network, images(8))
    assert {source.tensor for source in sources} == set(network.sources())
    assert [source.sqnr for source in sources] == sorted(source.sqnr for source in sources)
    made = {name: n for n in small.model.graph.node for name in n.output}
    for source in sources:
        assert source.nodes
        rounded = {
            name.removesuffix("_QuantizeLinear_Input").removesuffix("_quantized")
            for n in quantize(small, ranges, types, kept_float=source.nodes).graph.node
            if n.op_type in ("QuantizeLinear", "DequantizeLinear")
            for name in n.input[:1]
        }
        assert source.tensor not in rounded
        maker = made.get(source.tensor)
        if maker is not None and maker.op_type in ("Relu", "Clip"):
            assert maker.input[0] not in rounded  # what the activation cuts is not rounded in its place
    x = torch.from_numpy(images(8))
    with torch.no_grad(), network.rounding(frozenset()):
        exact = network(x)[network.output].double()
    with torch.no_grad(), network.rounding(frozenset({sources[0].tensor})):
        noise = (network(x)[network.output].double() - exact).square().sum()
    assert sources[0].sqnr == pytest.approx(10 * np.log10(float(exact.square().sum() / noise)), abs=1e-3)


def test_calibrator_that_cannot_cope_is_left_out_and_named(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = quantizer.create_calibrator

    def greedy(*given: Any, **more: Any) -> Any:
        calibrator = create(*given, **more)
        if more["calibrate_method"] == quantizer.CalibrationMethod.Entropy:

            def collect(_: Any) -> None:
                raise MemoryError

            calibrator.collect_data = collect
        return calibrator

    monkeypatch.setattr(quantizer, "create_calibrator", greedy)
    result = search(small, [images(24)], TYPES, tmp_path, lambda _: verdict(90, True))
    assert [candidate.name for candidate in result.candidates] == ["minmax", "percentile", "moving-average"]
    assert result.stopped is not None and "entropy needs more memory" in result.stopped
    with pytest.raises(CalibratorError, match="entropy"):
        search(small, [images(24)], TYPES, tmp_path, lambda _: verdict(90, True),
               calibrators=["entropy"])  # fmt: skip
