"""Reports of an invented run: complete, and after only some of its stages."""

import base64
import io
import random
from collections import Counter
from collections.abc import Sequence
from math import exp
from typing import Any

from PIL import Image, ImageDraw
from questpress.export.results import Latency, Parity, Percentile, Speedup
from questpress.pipeline.runs.results import DataSummary, Epoch, Example, Report, StageTime, Subject, Words
from questpress.pipeline.runs.scores import ClassScore, Measure, Proportion, Score

GARMENTS = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]


def png(seed: int, side: int = 64) -> str:
    image = Image.new("RGB", (side, side), f"hsl({seed * 37 % 360}, 25%, 88%)")
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(
        (side * 0.28, side * 0.2, side * 0.72, side * 0.85), side // 10, f"hsl({seed * 61 % 360}, 45%, 45%)"
    )
    draw.rectangle((side * 0.12, side * 0.22, side * 0.88, side * 0.4), f"hsl({seed * 61 % 360}, 45%, 40%)")
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def accuracy(correct: int, n: int, classes: Sequence[ClassScore] = ()) -> Score:
    proportion = Proportion.from_counts(correct, n)
    return Score(
        metric="accuracy",
        **proportion.model_dump(),
        details={"balanced accuracy": Measure(percent=proportion.percent - 1.2)},
        classes=list(classes),
    )


def subject(name: str, correct: int, n: int, size: int, latencies: dict[str, float], **more: Any) -> Subject:
    return Subject(
        name=name,
        weights=more.pop("weights", "scratch"),
        score=accuracy(correct, n, classes=more.pop("classes", [])),
        bytes=size,
        latency_ms={
            threads: Latency(
                subject=name,
                threads=int(threads),
                percentiles={
                    key: Percentile(value=p50 * ratio)
                    for key, ratio in {"p50": 1, "p90": 1.08, "p95": 1.15}.items()
                },
                mean=p50 * 1.02,
                n=412,
            )
            for threads, p50 in latencies.items()
        },
        **more,
    )


def speedup(over: str, threads: int, ratio: float, low: float, high: float) -> Speedup:
    return Speedup(subject="student_int8", over=over, threads=threads, ratio=ratio, low=low, high=high)


def full(classes: list[str] | None = None) -> Report:
    """Return a realistic report: ten garments, ResNet-34 to MobileNetV2."""
    names = classes or GARMENTS
    chance = random.Random(7)
    test = [chance.randint(18, 60) for _ in names]
    confusion: Counter[tuple[int, int]] = Counter()
    for truth, n in enumerate(test):
        for _ in range(n):
            confusion[truth, truth if chance.random() < 0.86 else chance.randrange(len(names))] += 1
    n, correct = sum(test), sum(confusion[i, i] for i in range(len(names)))

    def class_scores(better: int) -> list[ClassScore]:
        return [
            ClassScore(
                label=name,
                n=test[i],
                percent=100 * min(test[i], confusion[i, i] + (better if i % 2 else 0)) / test[i],
            )
            for i, name in enumerate(names)
        ]

    teacher = subject(
        "resnet34", correct + 11, n, 85_146_000, {"1": 12.43, "2": 6.71}, classes=class_scores(2),
        parameters=21_289_802, gmacs=0.674, license="Apache-2.0", head="replaced",
        val_score=accuracy(312, 341), file="bench/teacher.onnx", sha256="9c2f" * 16, opset=20, ir_version=10,
        weights="pretrained",
    )  # fmt: skip
    student = subject(
        "mobilenetv2_100", correct + 2, n, 8_942_113, {"1": 1.31, "2": 0.823}, classes=class_scores(1),
        parameters=2_236_682, gmacs=0.0602, parity=Parity(max_abs=3.1e-6, max_rel=4.2e-7, n=64),
        agreement=Proportion.from_counts(n - 21, n),
        speedups=[speedup("teacher", 1, 9.49, 9.31, 9.66)],
        file="artifact/student.onnx", sha256="b07d" * 16, opset=20, ir_version=10,
    )  # fmt: skip
    int8 = subject(
        "mobilenetv2_100", correct, n, 2_548_907, {"1": 0.684, "2": 0.489}, classes=class_scores(0),
        agreement=Proportion.from_counts(n - 26, n), parameters=2_236_682,
        speedups=[
            speedup("teacher", 1, 18.17, 17.9, 18.46),
            speedup("teacher", 2, 13.72, 13.1, 14.4),
            speedup("student", 1, 1.92, 1.88, 1.95),
            speedup("student", 2, 1.68, 1.6, 1.77),
        ],
        file="artifact/student.int8.onnx", sha256="41ae" * 16, opset=20, ir_version=10,
        quantization={
            "format": "QDQ",
            "activations": "u8",
            "weights": "s8 per channel",
            "calibration": {"images": 512, "method": "minmax"},
        },
    )  # fmt: skip
    counts = {"train": [9 * t for t in test], "val": list(test), "test": test}
    return Report(
        title="mobilenetv2 from resnet34 on clothing",
        command="compress --teacher resnet34 --student mobilenetv2 --data photos/clothing --image-size 96",
        method="quest", method_parameters={"words": 4096, "delta": 10.0, "tau": None, "weight": 1.0},
        recipe="scratch", image_size=96,
        data=DataSummary(
            name="clothing", classes=names, train=sum(counts["train"]), val=sum(counts["val"]), test=n,
            per_class={role: dict(zip(names, numbers, strict=True)) for role, numbers in counts.items()},
            skipped=[("train/hat/0213.jpg", "truncated: the file ends within the image")],
            duplicates=[["train/shoes/1.jpg", "val/shoes/88.jpg"]], fingerprint="5fd1c0a9",
        ),
        teachers=[teacher], teacher=teacher, student=student, student_int8=int8,
        words=[
            Words(
                teacher="resnet34", words=704, requested=4096, features=27612, features_used=27612,
                perplexity=431.7, mu=0.01432,
                note="4,096 words were lowered to 704, so that every word has 39 features or more.",
            ),
        ],
        epochs=epochs("teacher", 30) + epochs("student", 60),
        examples=[
            Example(
                name=f"test/{label}/{i:04d}.jpg", label=label,
                teacher=label if i % 3 else names[(i + 2) % len(names)], teacher_probability=0.98 - 0.03 * i,
                teacher_correct=i % 3 > 0, student_correct=i % 2 > 0,
                student=label if i % 2 else names[(i + 1) % len(names)], student_probability=0.99 - 0.04 * i,
                png=png(i),
            )
            for i, label in enumerate(names[:12])
        ],
        confusion=[(i, k, n) for (i, k), n in sorted(confusion.items())],
        warnings=["The teacher's weights are under a license that is not a free one: CC BY-NC 4.0."],
        stages=[
            StageTime(stage="teacher", seconds=412.2, summary="resnet34, 91.5 % on 341 val images"),
            StageTime(stage="prepare", seconds=8.4, summary="704 words, perplexity 432"),
            StageTime(stage="student", seconds=1260.9, summary="mobilenetv2_100, 60 epochs"),
            StageTime(stage="bench", seconds=21.3, summary="0.684 ms at 1 thread"),
        ],
        environment={
            "cpu": "AMD EPYC 9555 64-Core Processor", "cores allowed": "2", "machine": "Linux 6.8",
            "python": "3.11.9", "torch": "2.11.0", "onnxruntime": "1.27.0",
        },
        config={
            "teacher": "resnet34", "student": "mobilenetv2_100", "out": "runs/clothing", "epochs": 60,
            "set": {"quest": {"words": 4096}}, "download": False, "val_fraction": 0.1,
        },
        artifact="artifact",
    )  # fmt: skip


def epochs(stage: str, n: int) -> list[Epoch]:
    chance = random.Random(stage)
    result = []
    for i in range(1, n + 1):
        decay, noise = exp(-4 * i / n), chance.uniform(-0.015, 0.015)
        losses = {"ce": 1.9 * decay + 0.15 + noise}
        metrics = {}
        if stage == "student":
            losses["quest"] = 2.6 * decay + 0.9 + noise
            metrics = {
                "perplexity": 432 - 40 * decay,
                "max_p_t": 0.62 + noise / 4,
                "word_accuracy": 0.55 * (1 - decay) + noise,
                "gamma": 10 + 12 * (1 - decay),
            }
        result.append(
            Epoch(
                stage=stage, epoch=i, epochs=n, images_per_second=310 + 900 * noise,
                learning_rate=2e-3 * min(1, i / 4) * (1 - i / (n + 1)),
                losses={**losses, "loss": sum(losses.values())}, metrics=metrics,
                train_accuracy=97 - 62 * decay + 60 * noise, val_accuracy=91 - 56 * decay + 90 * noise,
                seconds=20.5,
                time_fractions={"data": 0.08, "teacher": 0.32, "student": 0.6} if stage == "student" else {},
                peak_memory_bytes=1_840_000_000 if stage == "student" else 1_210_000_000,
            ),
        )  # fmt: skip
    return result


def without(*parts: str) -> Report:
    """Return the full report without these parts."""
    report = full()
    empty = Report(title="", command="", method="", image_size=1)
    return report.model_copy(update={part: getattr(empty, part) for part in parts})


def bare() -> Report:
    return Report(title="mobilenetv2 from resnet34", command="compress …", method="quest", image_size=96)


def teacher_only() -> Report:
    """Return the report after the first stage."""
    report = without("student", "student_int8", "words", "examples", "confusion", "artifact", "teacher")
    teacher = report.teachers[0].model_copy(
        update={"score": None, "latency_ms": {}, "bytes": None, "file": None, "sha256": None}
    )
    return report.model_copy(
        update={"teachers": [teacher], "epochs": epochs("teacher", 5), "stages": report.stages[:1]}
    )
