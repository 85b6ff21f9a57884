"""CQKD on photos: a student of half the teacher's image size, by temperature, with and without the teacher.

Teacher resnet34 at 128 pixels, student mobilenetv2 from scratch at 64, 40 epochs; KD with w = 0.5 as
in the paper. Accuracy and calibration are those of the files that ship, on the test images. The paper's claim
(Čuk et al., 2023, on ImageNet): a higher temperature lowers the student's ECE and raises its accuracy.

    python -m benchmarks.papers.cqkd --data clothing/ --teacher-weights teacher.safetensors --out runs/cqkd
"""

import argparse
from pathlib import Path

from benchmarks.cells import Cell, Table, markdown, run_and_write, spoken

PAIR = "resnet34@128:mobilenetv2@64"

TRAINING = [
    "--teacher", "resnet34", "--student", "mobilenetv2", "--student-weights", "none", "--image-size", "128",
    "--student-size", "64", "--epochs", "40", "--balance", "off",
]  # fmt: skip

KD = ["--method", "kd", "--set", "kd.weight=0.5", "--weight", "ce=0.5"]

METHODS = {
    "none": ["--method", "none"],
    **{f"kd, τ = {tau}": [*KD, "--set", f"kd.tau={tau}"] for tau in (4, 10, 20)},
}


def rows(table: Table) -> list[list[str]]:
    """Return accuracy of both files and calibration of fp32; intervals are those of the first seed."""
    made = []
    for name in METHODS:
        done = [table.done[c.name] for c in table.cells if c.method == name and c.name in table.done]
        if not done:
            made.append([name, *["–"] * 7, "0"])
            continue
        first, calibrated = done[0], [result["calibration"] for result in done]
        made.append(
            [
                name,
                spoken([result["top1"] for result in done]),
                f"{first['low']:.1f} to {first['high']:.1f}",
                spoken([result["int8"]["percent"] for result in done]),
                spoken([result["ece"] for result in calibrated]),
                f"{calibrated[0]['ece_low']:.1f} to {calibrated[0]['ece_high']:.1f}",
                spoken([result["entropy"] for result in calibrated]),
                spoken([result["nll"] for result in calibrated]),
                str(len(done)),
            ]
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the folder with train/, val/ and test/")
    parser.add_argument("--teacher-weights", required=True, help="resnet34's, trained on this data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--seeds", default="0", help="comma-separated [default: 0]")
    parser.add_argument("--budget", help="stop after this time (9m, 2h); the same command resumes")
    options = parser.parse_args()
    teacher = ["--teacher-weights", options.teacher_weights, "--data", options.data]
    table = Table(
        options.out,
        [
            Cell(PAIR, name, seed, [*TRAINING, *teacher, *method])
            for seed in map(int, options.seeds.split(","))
            for name, method in METHODS.items()
        ],
    )
    columns = ["method", "top-1, %", "95 % interval", "int8", "ECE, %", "95 % interval"]
    columns += ["entropy, nats", "NLL", "seeds"]
    about = {"protocol": __doc__, "training": TRAINING}
    run_and_write(table, options.budget, about, lambda: markdown(columns, rows(table)))


if __name__ == "__main__":
    main()
