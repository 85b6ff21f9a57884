"""Detection protocol: what each method adds to a small detector on the 205 training images of BCCD.

The teacher has a pretrained EfficientNet-Lite2 as backbone, the student by default MobileNetV2-0.5 without
pretrained weights. AP is that of the fp32 and the int8 file on the 72 test images.

    python -m benchmarks.papers.detection_bccd --data bccd/train.json --teacher-weights lite2.safetensors \\
        --out runs/detection_bccd

A pretrained student, which ends at its teacher's AP:

    python -m benchmarks.papers.detection_bccd --data bccd/train.json --teacher-weights lite2.safetensors \\
        --student tf_efficientnet_lite0 --student-weights lite0.safetensors --epochs 20 --lr 0.0004 \\
        --out runs/detection_bccd_pretrained
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.cells import Cell, Table, markdown, run_and_write, spoken

TRAINING = ["--image-size", "144,192", "--batch-size", "4"]
TEACHER = ["--teacher-epochs", "20", "--teacher-lr", "0.0004"]

METHODS = {
    "none": ["--method", "none"],
    "mimic l2": ["--method", "mimic", "--set", "mimic.variant=l2"],
    "mimic lshl2": ["--method", "mimic", "--set", "mimic.variant=lshl2"],
    "pkd": ["--method", "pkd"],
    "quest": ["--method", "quest"],
    "mimic+pkd": ["--method", "mimic+pkd"],
}


def rows(table: Table) -> list[list[str]]:
    """Return a row for each method; the interval is that of the first seed."""
    made = []
    for name in METHODS:
        done = [table.done[c.name] for c in table.cells if c.method == name and c.name in table.done]
        if not done:
            continue
        made.append(
            [
                name,
                spoken([result["top1"] for result in done]),
                f"{done[0]['low']:.1f} to {done[0]['high']:.1f}",
                spoken([result["details"]["AP50"] for result in done]),
                spoken([result["int8"]["percent"] for result in done]),
                spoken([result["teacher"] for result in done]),
                f"{statistics.mean(sum(result['stage_seconds'].values()) for result in done):.0f}",
                str(len(done)),
            ]
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="train.json next to val.json and test.json")
    parser.add_argument("--head", default="retinanet", help="kind of detector [default: retinanet]")
    parser.add_argument("--teacher-weights", required=True, help="of tf_efficientnet_lite2")
    parser.add_argument("--student", default="mobilenetv2_050", help="backbone [default: mobilenetv2_050]")
    parser.add_argument("--student-weights", default="none", help="a file, or none [default: none]")
    parser.add_argument("--epochs", default="30", help="of the student [default: 30]")
    parser.add_argument("--lr", default="0.0008", help="of the student [default: 0.0008]")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds [default: 3]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--budget", help="stop after this time (9m, 2h); the same command resumes")
    options = parser.parse_args()
    training = [
        "--teacher", f"{options.head}:tf_efficientnet_lite2", "--teacher-weights", options.teacher_weights,
        "--student", f"{options.head}:{options.student}", "--student-weights", options.student_weights,
        "--data", options.data, *TRAINING, *TEACHER, "--epochs", options.epochs, "--lr", options.lr,
    ]  # fmt: skip
    table = Table(
        options.out,
        [
            Cell(options.head, name, seed, [*training, *method], "validate")
            for seed in range(options.seeds)
            for name, method in METHODS.items()
        ],
    )
    columns = ["method", "AP", "95 % interval", "AP50", "AP of int8", "AP of the teacher", "seconds", "seeds"]
    about = {"protocol": __doc__, "training": training}
    run_and_write(table, options.budget, about, lambda: markdown(columns, rows(table)))


if __name__ == "__main__":
    main()
