"""Images without labels: a tenth of the labels, with and without the other images as ``--unlabeled``.

A tenth of each class's training images, drawn for each seed, keeps its labels. The teacher is fine-tuned on
these alone. The test images are those of test/ and val/, since nothing is chosen by val images. A
student has 60 epochs, since the default of 20 is 180 steps, which are too few for any method.

    python -m benchmarks.papers.unlabeled --data garments/ --student mobilenetv2_050=none \\
        --teacher tf_efficientnet_lite0=lite0.safetensors --out runs/unlabeled
"""

import argparse
import random
import shutil
import statistics
from pathlib import Path

from benchmarks.cells import Cell, Table, interval, markdown, run_and_write, spoken
from benchmarks.papers.finetune import pair

LABELED = 0.1
TRAINING = ["--val-fraction", "0", "--epochs", "60"]
UNLABELED = "with unlabeled"


def split(data: Path, folder: Path, seed: int) -> None:
    """Copy images to ``folder``/labeled/{train,test}/CLASS and ``folder``/unlabeled, once."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    draw = random.Random(seed)
    for source in sorted((data / "train").iterdir()):
        files = sorted(source.iterdir())
        draw.shuffle(files)
        count = max(1, round(LABELED * len(files)))
        _copy(files[:count], partial / "labeled" / "train" / source.name)
        _copy(files[count:], partial / "unlabeled")
        for part in ("val", "test"):
            _copy(sorted((data / part / source.name).iterdir()), partial / "labeled" / "test" / source.name)
    partial.rename(folder)


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder)


def build_cells(options: argparse.Namespace) -> list[Cell]:
    """Return the cells, seed by seed, those of a seed's teacher first."""
    network, weights = options.teacher
    cells = []
    for seed in range(options.seeds):
        data = options.out / f"data.{seed}"
        common = ["--teacher", network, "--data", str(data / "labeled"), "--image-size", str(options.size)]
        common += TRAINING
        any_student = ["--student", options.student[0][0], "--student-weights", "none", "--method", "none"]
        teacher = Cell(
            network, "teacher", seed, [*common, "--teacher-weights", weights, *any_student], "teacher"
        )
        cells.append(teacher)
        tuned = str(options.out / teacher.name / "teacher.safetensors")
        common += ["--teacher-weights", tuned, "--teacher-head", "keep"]
        more = ["--unlabeled", str(data / "unlabeled")]
        for student, file in options.student:
            arguments = [*common, "--student", student, "--student-weights", file]
            cells.append(Cell(student, "none", seed, [*arguments, "--method", "none"]))
            for method in options.methods.split(","):
                by = [*arguments, "--method", method, "--cache-views", "0"]
                cells.append(Cell(student, method, seed, by))
                cells.append(Cell(student, f"{method} {UNLABELED}", seed, [*by, *more]))
    return cells


def rows(table: Table) -> list[list[str]]:
    """Return a row for each network and method; the gain is that by the images without labels."""
    made = []
    for network, method in dict.fromkeys((cell.row, cell.method) for cell in table.cells):
        values = table.accuracies(network, method)
        if not values:
            continue
        alone = table.accuracies(network, method.removesuffix(f" {UNLABELED}"))
        has_gain = method.endswith(UNLABELED) and alone
        gain = f"{statistics.mean(values) - statistics.mean(alone):+.2f}" if has_gain else ""
        around = interval(values, table.results(network, method)[0]["n"])
        made.append([network, method, spoken(values), around, gain, str(len(values))])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/, val/ and test/")
    parser.add_argument("--teacher", type=pair, required=True, help="NAME=FILE")
    parser.add_argument("--student", type=pair, action="append", required=True, help="NAME=FILE, or =none")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels [default: 64]")
    parser.add_argument("--methods", default="kd,quest", help="comma-separated [default: kd,quest]")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds [default: 2]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data, runs and results")
    parser.add_argument("--budget", help="stop after this time (9m, 2h); the same command resumes")
    options = parser.parse_args()
    for seed in range(options.seeds):
        split(options.data, options.out / f"data.{seed}", seed)
    table = Table(options.out, build_cells(options))
    columns = ["network", "method", "top-1, %", "95 % interval", "gain", "seeds"]
    about = {"protocol": __doc__, "training": TRAINING}
    run_and_write(table, options.budget, about, lambda: markdown(columns, rows(table)))


if __name__ == "__main__":
    main()
