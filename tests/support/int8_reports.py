"""Reports of invented int8 searches: with a file, without one, and with quantization-aware training."""

from typing import Any

from questpress.export.results import Candidate, FloatNode
from questpress.pipeline.runs.results import Int8Search, Recovery, Report

from tests.support.reports import accuracy, full, speedup, without


def tried(name: str, wrong: int, *, ships: bool = False, p50: float | None = 0.684, **more: Any) -> Candidate:
    """Return a candidate with ``wrong`` more errors than fp32, which is correct on 360 of 400 val images."""
    return Candidate(
        **{
            "name": name, "calibration": name.split(",")[0], "equalized": "equalized" in name,
            "bias_corrected": "corrected" in name, "kept_float": [], "score": (360 - wrong) / 4,
            "lost": wrong / 4, "p": 1.0 if not wrong else 0.5 ** abs(wrong), "sqnr": 24.0 - wrong / 2,
            "holds": wrong <= 2, "ships": ships, "bytes": 2_548_907, "p50": p50,
            "speedup": p50 and speedup("fp32", 1, 1.31 / p50, 1.31 / p50 - 0.03, 1.31 / p50 + 0.03),
            **more,
        },
    )  # fmt: skip


def searched(target: str, candidates: list[Candidate], **more: Any) -> Int8Search:
    ships = any(candidate.ships for candidate in candidates)
    return Int8Search(
        **{
            "target": target, "file": "artifact/student.int8.onnx" if ships else None, "max_drop": 0.5,
            "role": "val", "n": 400, "fp32_score": 90.0, "p50_fp32": 1.31, "tried": candidates, **more,
        },
    )  # fmt: skip


def with_int8() -> Report:
    """Return a report with two targets: a timed one whose third candidate ships, and another processor."""
    report = full()
    assert report.student_int8 is not None
    arm = "student.int8.arm64.onnx"
    here = searched(
        "x86-vnni",
        [
            tried("minmax", 9, p50=0.671),
            tried("entropy", 5, p50=0.674),
            tried("entropy, biases corrected", 1, ships=True),
            tried("percentile", 0, kept_float=["conv_1", "conv_7"], p50=0.9),
        ],
        test_score=report.student_int8.score,
        worst=[("features.0.0", 11.5), ("features.17.conv", 14.25)],
        float_parts=[
            FloatNode(name="conv_1", op_type="Conv", why="kept in float for accuracy"),
            FloatNode(name="logits", op_type="DequantizeLinear", why="conversion of the output to float"),
        ],
    )
    there = searched(
        "arm64",
        [tried("minmax", 0, ships=True, p50=None)],
        file=f"artifact/{arm}",
        p50_fp32=None,
        test_score=accuracy(300, 371),
        not_timed="made for arm64, and this machine is x86-vnni: it cannot be timed here",
    )
    return report.model_copy(update={"int8": [here, there]})


def with_recovery(*, learned_ships: bool = True) -> Report:
    report = full()
    candidates = [tried("learned", 1, ships=learned_ships), tried("minmax", 2, ships=not learned_ships)]
    recovery = Recovery(epochs=4, fake_val=90.5, fake_test=84.0, file="qat/student.onnx")
    return report.model_copy(update={"int8": [searched("x86-vnni", candidates)], "recovery": recovery})


def without_int8_file() -> Report:
    """Return a report in which no candidate is within the budget, so the fp32 file ships."""
    search = searched("x86-vnni", [tried("minmax", 13), tried("entropy", 7)])
    return without("student_int8").model_copy(update={"int8": [search], "warnings": []})
