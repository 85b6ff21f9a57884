"""Fine-tuning protocol: what distillation brings to students on photos, with pretrained and with new weights.

Each set is a folder with train/ and test/ of class folders; each network NAME=FILE has ImageNet weights.
Rows are pairs of a set and a student; columns are the methods with their defaults, and the student alone at
three learning rates, as it would be fine-tuned with timm. The teacher's own rows compare its default with
three learning rates.

    python -m benchmarks.papers.finetune --set garments=sets/garments --set trashnet=sets/trashnet \\
        --teacher tf_efficientnet_lite2=lite2.safetensors --student tf_efficientnet_lite0=lite0.safetensors \\
        --student mobilenetv2_100=none --size 96 --out runs/finetune
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import Cell, Table, interval, markdown, run_and_write, spoken

RATES = (0.0003, 0.001, 0.003)
"""Learning rates of timm-style fine-tuning at the default batch size."""

METHODS = {
    **{f"none, lr {rate:g}": ["--method", "none", "--lr", f"{rate:g}"] for rate in RATES},
    **{
        name: ["--method", name]
        for name in ("none", "kd", "dkd", "quest", "mimic", "quest+kd", "quest+mimic")
    },
    "default": [],
}

TEACHERS = {"default": [], **{f"lr {rate:g}": ["--teacher-lr", f"{rate:g}"] for rate in RATES}}


def pair(text: str) -> tuple[str, str]:
    """Split NAME=PATH.

    Raises:
        argparse.ArgumentTypeError: there is no equals sign.
    """
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must be NAME=PATH")
    return name, path


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return the teacher's cells and those of all students, seed by seed."""
    teacher, teacher_weights = options.teacher
    made = []
    for seed in range(options.seeds):
        for set_name, folder in options.set:
            common = ["--teacher", teacher, "--teacher-weights", teacher_weights, "--data", folder]
            common += ["--image-size", str(options.size)]
            any_student = ["--student", options.student[0][0], "--student-weights", "none"]
            for name in options.teachers.split(";"):
                arguments = [*common, *any_student, *TEACHERS[name]]
                made.append(Cell(f"{set_name}:teacher", name, seed, arguments, until="teacher"))
            for student, weights in options.student:
                arguments = [*common, "--student", student, "--student-weights", weights]
                for name in options.methods.split(";"):
                    made.append(
                        Cell(f"{set_name}:{student}", name, seed, [*arguments, *METHODS[name]], "validate")
                    )
    return made


def rows(table: Table) -> list[list[str]]:
    """Return a row for each set, network and method: top-1 of the seeds, its 95 % interval, int8, seconds."""
    made: list[list[str]] = []
    for row, name in dict.fromkeys((cell.row, cell.method) for cell in table.cells):
        done = table.results(row, name)
        if not done:
            continue
        values = [result["top1"] for result in done]
        int8: Sequence[float] = [result["int8"]["percent"] for result in done if result["int8"]]
        seconds = statistics.mean(sum(result["stage_seconds"].values()) for result in done)
        set_name, _, network = row.partition(":")
        made.append(
            [
                set_name,
                network,
                name,
                spoken(values),
                interval(values, done[0]["n"]),
                spoken(int8),
                f"{seconds:.0f}",
                str(len(done)),
            ]
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", type=pair, action="append", required=True, help="NAME=FOLDER; repeat")
    parser.add_argument("--teacher", type=pair, required=True, help="NAME=FILE")
    parser.add_argument("--student", type=pair, action="append", required=True, help="NAME=FILE, or =none")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels [default: 96]")
    parser.add_argument("--methods", default=";".join(METHODS), help="semicolon-separated [default: all]")
    parser.add_argument("--teachers", default=";".join(TEACHERS), help="their rates [default: all]")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds [default: 2]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--budget", help="stop after this time (9m, 2h); the same command resumes")
    options = parser.parse_args()
    for option, names in (("methods", METHODS), ("teachers", TEACHERS)):
        for name in getattr(options, option).split(";"):
            if name not in names:
                raise SystemExit(f"--{option} {name}: choose from {'; '.join(names)}.")
    table = Table(options.out, cells(options))
    columns = ["set", "network", "method", "top-1, %", "95 % interval", "int8, %", "seconds", "seeds"]
    run_and_write(
        table,
        options.budget,
        {"protocol": __doc__, "size": options.size},
        lambda: markdown(columns, rows(table)),
    )


if __name__ == "__main__":
    main()
