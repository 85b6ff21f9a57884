"""The CRD benchmark: pairs × methods × seeds on CIFAR-100 by the papers' recipes, with published values.

    python -m benchmarks.papers.crd --data cifar100/ --out runs/crd --pairs wrn40-2:16-2,r56:r20 \\
        --methods none,kd,quest

``--data`` is a folder with train/ and test/ of class folders. Each teacher is trained once. Each cell is a
job that resumes where it was stopped, so the work can be done in slices (``--budget 9m``) and on several
machines, one after the other, from the same ``--out``.
"""

import argparse
from pathlib import Path

from benchmarks.cells import Cell, Table, markdown, run_and_write, spoken

# name: (teacher, student, published: teacher, none, kd, quest, dkd, dist, wttm, itrd). Top-1 in percent,
# means of several seeds. RepDistiller's README (none, kd), letKD's supplement (quest), mdistiller (dkd),
# DIST_KD (dist), TTM (wttm), ITRD (itrd). None for sdd.
PAIRS: dict[str, tuple[str, str, dict[str, float]]] = {
    "r56:r20": (
        "cifar_resnet56",
        "cifar_resnet20",
        {
            "teacher": 72.34,
            "none": 69.06,
            "kd": 70.66,
            "quest": 71.84,
            "dkd": 71.97,
            "dist": 71.75,
            "wttm": 71.92,
            "itrd": 71.47,
        },
    ),
    "r110:r32": (
        "cifar_resnet110",
        "cifar_resnet32",
        {
            "teacher": 74.31,
            "none": 71.14,
            "kd": 73.08,
            "quest": 74.08,
            "dkd": 74.11,
            "wttm": 74.13,
            "itrd": 74.26,
        },
    ),
    "r32x4:r8x4": (
        "cifar_resnet32x4",
        "cifar_resnet8x4",
        {
            "teacher": 79.42,
            "none": 72.50,
            "kd": 73.33,
            "quest": 75.88,
            "dkd": 76.32,
            "dist": 76.31,
            "wttm": 76.06,
            "itrd": 76.69,
        },
    ),
    "wrn40-2:16-2": (
        "cifar_wrn_40_2",
        "cifar_wrn_16_2",
        {
            "teacher": 75.61,
            "none": 73.26,
            "kd": 74.92,
            "quest": 76.10,
            "dkd": 76.23,
            "wttm": 76.37,
            "itrd": 76.12,
        },
    ),
    "wrn40-2:40-1": (
        "cifar_wrn_40_2",
        "cifar_wrn_40_1",
        {
            "teacher": 75.61,
            "none": 71.98,
            "kd": 73.54,
            "quest": 74.58,
            "dkd": 74.81,
            "dist": 74.43,
            "wttm": 74.58,
            "itrd": 75.18,
        },
    ),
    "vgg13:vgg8": (
        "cifar_vgg13",
        "cifar_vgg8",
        {"teacher": 74.64, "none": 70.36, "kd": 72.98, "dkd": 74.68, "wttm": 74.44, "itrd": 74.93},
    ),
    "r50:mv2": (
        "cifar_resnet50",
        "cifar_mobilenetv2_half",
        {
            "teacher": 79.34,
            "none": 64.60,
            "kd": 67.35,
            "quest": 69.81,
            "dkd": 70.35,
            "dist": 68.66,
            "wttm": 69.59,
            "itrd": 71.34,
        },
    ),
    "r32x4:shv1": (
        "cifar_resnet32x4",
        "cifar_shufflenetv1",
        {
            "teacher": 79.42,
            "none": 70.50,
            "kd": 74.07,
            "quest": 76.28,
            "dkd": 76.45,
            "dist": 76.34,
            "wttm": 74.37,
            "itrd": 76.69,
        },
    ),
    "r32x4:shv2": (
        "cifar_resnet32x4",
        "cifar_shufflenetv2",
        {
            "teacher": 79.42,
            "none": 71.82,
            "kd": 74.45,
            "quest": 77.09,
            "dkd": 77.07,
            "dist": 77.35,
            "wttm": 76.55,
            "itrd": 77.40,
        },
    ),
    "wrn40-2:shv1": (
        "cifar_wrn_40_2",
        "cifar_shufflenetv1",
        {
            "teacher": 75.61,
            "none": 70.50,
            "kd": 74.83,
            "quest": 76.75,
            "dkd": 76.70,
            "wttm": 75.42,
            "itrd": 77.09,
        },
    ),
}

RECIPES = {
    "none": "supervised-cifar100",
    "kd": "kd-cifar100",
    "quest": "quest-cifar100",
    "dkd": "dkd-cifar100",
    "dist": "dist-cifar100",
    "wttm": "wttm-cifar100",
    "itrd": "itrd-cifar100",
    "sdd": "sdd-cifar100",
}

COLUMNS = ("pair", "method", "top-1, %", "published", "difference", "student's minutes", "seeds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="CIFAR-100 as train/ and test/ of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="comma-separated [default: all]")
    parser.add_argument("--methods", default="none,kd,quest", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--seeds", default="0", help="comma-separated [default: 0]")
    parser.add_argument("--budget", help="stop after this time (9m, 2h); the same command resumes")
    parser.add_argument("--cache-views", help="fixed views whose teacher outputs are cached [default: 0]")
    parser.add_argument("--cache-top", help="words of QuEST's targets that are stored")
    parser.add_argument("--epochs", help="other than the recipes' 240, for a trial")
    parser.add_argument("--device", help="as of compress")
    parser.add_argument("--precision", help="as of compress")
    options = parser.parse_args()
    pairs, chosen = options.pairs.split(","), options.methods.split(",")
    for valid, requested in ((PAIRS, pairs), (RECIPES, chosen)):
        for name in requested:
            if name not in valid:
                raise SystemExit(f"there is no '{name}'; there are {', '.join(valid)}")
    common = ["--data", options.data]
    if options.epochs:
        common += ["--epochs", options.epochs, "--teacher-epochs", options.epochs]
    for name in ("device", "precision"):
        if value := getattr(options, name):
            common += [f"--{name}", value]
    stored = ["--cache-views", options.cache_views] if options.cache_views else []
    top = ["--cache-top", options.cache_top] if options.cache_top else []
    methods = {
        name: [*(stored if name != "none" else []), *(top if name == "quest" else [])] for name in chosen
    }
    table = Table(options.out, build_cells(options.out, pairs, methods, options.seeds, common))
    about = {"benchmark": "CRD, CIFAR-100", "recipes": RECIPES}
    run_and_write(table, options.budget, about, lambda: markdown(COLUMNS, build_rows(table, pairs, chosen)))


def build_cells(
    out: Path, pairs: list[str], methods: dict[str, list[str]], seeds: str, common: list[str]
) -> list[Cell]:
    """Return each pair's teacher and students; ``methods`` has further options of each."""
    teachers = {PAIRS[pair][0]: PAIRS[pair][1] for pair in pairs}
    alone = ["--recipe", RECIPES["none"], "--teacher-weights", "none", *common]
    cells = [
        Cell(teacher, "teacher", 0, ["--teacher", teacher, "--student", student, *alone], until="teacher")
        for teacher, student in teachers.items()
    ]
    for seed in map(int, seeds.split(",")):
        for pair in pairs:
            teacher, student, _ = PAIRS[pair]
            weights = out / Cell(teacher, "teacher", 0, []).name / "teacher.safetensors"
            networks = [
                "--teacher",
                teacher,
                "--student",
                student,
                *common,
                "--teacher-weights",
                str(weights),
            ]
            cells += [
                Cell(pair, name, seed, ["--recipe", RECIPES[name], *networks, *more])
                for name, more in methods.items()
            ]
    return cells


def build_rows(table: Table, pairs: list[str], chosen: list[str]) -> list[list[str]]:
    """Return a row for each teacher and student, with the published accuracy."""
    rows = []
    for pair in pairs:
        teacher, _, published = PAIRS[pair]
        for name in ("teacher", *chosen):
            values = table.accuracies(teacher if name == "teacher" else pair, name)
            reference = published.get(name)
            mean = sum(values) / len(values) if values else None
            difference = f"{mean - reference:+.2f}" if mean is not None and reference is not None else "–"
            minutes = [
                table.done[cell.name]["stage_seconds"]["student"] / 60
                for cell in table.cells
                if (cell.row, cell.method) == (pair, name) and cell.name in table.done
            ]
            rows.append(
                [
                    pair,
                    name,
                    spoken(values),
                    "–" if reference is None else f"{reference:.2f}",
                    difference,
                    f"{sum(minutes) / len(minutes):.1f}" if minutes else "–",
                    str(len(values)),
                ]
            )
    return rows


if __name__ == "__main__":
    main()
