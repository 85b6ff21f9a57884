"""Invented results of validations and comparisons."""

from questpress.pipeline.api.compare import group_runs
from questpress.pipeline.evaluation.results import (
    ClassMeasure,
    ComparedFile,
    ComparedRun,
    Comparison,
    Network,
    Validation,
)
from questpress.pipeline.runs.results import Example
from questpress.pipeline.runs.scores import Calibration, Proportion, ReliabilityBin

from tests.support import reports


def calibration() -> Calibration:
    edges = [100 * i / 15 for i in range(16)]
    bins = [ReliabilityBin(low=edges[0], high=edges[1], n=0)] + [
        ReliabilityBin(low=edges[i], high=edges[i + 1], n=i, confidence=edges[i] + 3, accuracy=6 * i)
        for i in range(1, 15)
    ]
    return Calibration(
        ece=4.1, ece_low=2, ece_high=6, confidence=84, accuracy=80, gap_low=1, gap_high=7, entropy=0.5,
        nll=0.61, n=105, bins=bins,
    )  # fmt: skip


def validation() -> Validation:
    """Return a validation with long names."""
    names = [f"{'long' * 9} name {i}" for i in range(12)]

    def network(name: str, role: str, precision: str | None) -> Network:
        return Network.model_validate(
            {
                "name": name, "role": role, "source": "runs/" + "shop" * 20, "file": "student.onnx",
                "bytes": 2_500_000, "sha256": "9c2f" * 16, "precision": precision, "image_size": 96,
                "classes": names, "score": reports.accuracy(80, 105), "calibration": calibration(),
                "per_class": [
                    ClassMeasure(label=name, n=9, predicted=8, correct=7, recall=Proportion.from_counts(7, 9))
                    for name in names
                ],
                "confusion": [(i, k, 9 if i == k else 2) for i in range(12) for k in range(12) if i % 3],
                "teacher": None if role == "teacher" else "teacher",
                "agreement": None if role == "teacher" else Proportion.from_counts(90, 105), "mistakes": 25,
            },
        )  # fmt: skip

    networks = [network(f"shop{'x' * 30} {kind}", "student", kind) for kind in ("int8", "fp32")]
    networks.append(network("teacher", "teacher", None))
    return Validation(
        title=f"{'shop' * 20} on photos",
        command="compress validate " + "x" * 200,
        data="photos",
        source="photos",
        split="all",
        n=105,
        images="0" * 64,
        per_class=dict.fromkeys(names, 9),
        networks=networks,
        examples=[
            Example(name=f"{'a' * 60}/{i}.jpg", label=names[i], teacher=names[i], teacher_probability=0.5,
                    teacher_correct=True, student=names[(i + 1) % 12], student_probability=0.9,
                    student_correct=False, png=reports.png(i))
            for i in range(12)
        ],
        skipped=[("broken" * 30, "the file is empty")],
        warnings=["A warning."],
        notes=["A note."],
        environment={"cpu": "AMD EPYC 9555", "onnxruntime": "1.27.0", "threads": "2"},
    )  # fmt: skip


def comparison() -> Comparison:
    """Return a comparison of many runs with long names, in two groups."""

    def file(kind: str, correct: int, p50: float, size: int) -> ComparedFile:
        return ComparedFile.model_validate(
            {
                "kind": kind, "network": "mobilenetv2_100", "bytes": size,
                "score": reports.accuracy(correct, 372), "ece": 3.0, "p50": p50, "p50_low": p50 * 0.99,
                "p50_high": p50 * 1.01,
                "speedup": reports.speedup("teacher", 1, 8, 7.9, 8.1),
            },
        )  # fmt: skip

    runs = [
        ComparedRun(
            name=f"{'run' * 12}-{i}",
            source="runs/" + "long" * 30,
            method="quest+kd+mimic",
            teacher="5 × cifar_resnet56",
            student="mobilenetv2_100",
            image_size=96,
            parameters=2_236_682,
            int8=file("int8", 300 + 3 * i, 0.6 + 0.01 * i, 2_500_000),
            fp32=file("fp32", 301 + 3 * i, 1.2 + 0.01 * i, 8_900_000),
            teacher_file=file("teacher", 350, 12.4, 85_000_000),
            training_seconds=3000,
            seed=i,
            data="photos" if i < 9 else "other",
            fingerprint="f" if i < 9 else "g",
            machine="AMD EPYC 9555",
        )
        for i in range(11)
    ]
    return Comparison(
        title="11 runs on photos, other", command="compress compare " + "x" * 200, threads=1, runs=runs,
        groups=group_runs(runs, {}), warnings=["A warning."], notes=["A note."],
    )  # fmt: skip
