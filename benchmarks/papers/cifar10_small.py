"""The CPU protocol: accuracy of a small student by each method, in an hour or two on two cores.

Teacher cifar_resnet56_a with its published CIFAR-10 weights (93.39 %), student cifar_resnet20 from scratch,
10,000 training images, 30 epochs, batch 128, accuracy of the last epoch on the 10,000 test images through
ONNX Runtime. QuEST uses 1,024 words here instead of the paper's 4,096: a dense step with 4,096 words at 64
positions costs a CPU over four times the student's own.

    python -m benchmarks.papers.cifar10_small --data cifar10/ --weights resnet56-4bfd9763.th \\
        --out runs/cifar10_small

With the weights of resnet44 and resnet32 after a comma, methods can have two or three teachers.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.cells import Cell, Table, interval, markdown, run_and_write, spoken

QUEST = ["--method", "quest", "--set", "quest.words=1024"]

MIMIC = ("l2", "lsh", "lshl2", "lshl2_s")

FEED = ["--method", "feed", "--cache-views", "10"]

PAIR = "resnet56_a:resnet20"

WEIGHTS = {"resnet56": "cifar_resnet56_a", "resnet44": "cifar_resnet44_a", "resnet32": "cifar_resnet32_a"}
"""Network by the first part of the name of its published weights file."""

SDD = ["--set", "sdd.beta=2", "--set", "sdd.finest=2"]

BALANCED = ["--balance", "auto"]

METHODS = {
    "none": ["--method", "none"],
    "kd": ["--method", "kd"],
    "dkd": ["--method", "dkd", "--set", "dkd.beta=2"],  # the authors' β for resnet56
    "dist": ["--method", "dist"],
    "wttm": ["--method", "wttm"],
    "itrd": ["--method", "itrd"],
    "sdd": ["--method", "sdd", *SDD],
    "quest (τ = 0.2)": [*QUEST, "--set", "quest.tau=0.2"],
    "quest (δ = 10)": QUEST,
    "quest+kd": ["--method", "quest+kd", *QUEST[2:]],
    # The second form with other weights, and as it is by default, balanced.
    "quest balanced": [*QUEST, *BALANCED],
    "quest ×30": [*QUEST, "--weight", "quest=30"],
    "quest ÷30": [*QUEST, "--weight", "quest=0.0333"],
    "quest ÷30 balanced": [*QUEST, "--weight", "quest=0.0333", *BALANCED],
    # Sums with other methods.
    **{
        f"quest+{other} balanced": ["--method", f"quest+{other}", *QUEST[2:], *more, *BALANCED]
        for other, more in {"kd": [], "wttm": [], "itrd": [], "sdd": SDD}.items()
    },
    "quest ×30 + sdd": ["--method", "quest+sdd", *QUEST[2:], *SDD, "--weight", "quest=30"],
    # What the number of words changes.
    **{f"quest {k} words": [*QUEST[:2], "--set", f"quest.words={k}"] for k in (256, 1024, 4096)},
    **{f"mimic {v}": ["--method", "mimic", "--set", f"mimic.variant={v}"] for v in MIMIC},
    # Ten views of each image: the maps of several teachers are large, and computing them again is slow.
    "feed": [*FEED],
    "feed ×10": [*FEED, "--weight", "feed=10"],
    "feed linear": [*FEED, "--set", "feed.transform=linear"],
    "feed from 2": [*FEED],
    "feed from 3": [*FEED],
    "feed in 2 rounds": [*FEED, "--rounds", "2"],
    "kd from 3": ["--method", "kd", "--cache-views", "10"],
}

METHODS |= {
    f"{name} with strong views": [*METHODS[name], "--randaugment", "2,9"]
    for name in ("none", "kd", "sdd", "quest balanced")
}

TEACHERS = {"feed from 2": 2, "feed from 3": 3, "kd from 3": 3}
"""Number of teachers of a method; the others have only the first."""

TRAINING = [
    "--student", "cifar_resnet20", "--student-weights", "none", "--image-size", "32",
    "--batch-size", "128", "--optimizer", "sgd", "--lr", "0.1", "--schedule", "cosine",
    "--warmup-epochs", "1", "--weight-decay", "0.0005", "--decay-all", "--val-fraction", "0",
    "--crop", "pad", "--pad", "4", "--flip", "--balance", "off",
]  # fmt: skip


def rows(table: Table, methods: list[str]) -> list[list[str]]:
    """Return a row for each method: mean and std of the seeds, with the interval for n test images."""
    base = table.accuracies(PAIR, "none")
    made = []
    for name in methods:
        values = table.accuracies(PAIR, name)
        if not values:
            made.append([name, *["–"] * 4, "0"])
            continue
        done = table.results(PAIR, name)
        gain = f"{statistics.mean(values) - statistics.mean(base):+.2f}" if base else "–"
        rate = statistics.median([result["images_per_second"] for result in done])
        around = interval(values, done[0]["n"])
        made.append([name, spoken(values), around, gain, f"{rate:.0f}", str(len(values))])
    return made


def protocol(about: str | None, seeds: str) -> argparse.ArgumentParser:
    """Return the parser of an experiment by this protocol."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with train/ and test/")
    parser.add_argument(
        "--weights",
        required=True,
        help="the teacher's weights, resnet56-4bfd9763.th; for several teachers theirs too, after a comma",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--seeds", default=seeds, help=f"comma-separated [default: {seeds}]")
    parser.add_argument("--epochs", default="30", help="of each training [default: 30]")
    parser.add_argument("--budget", help="stop after this time (9m, 2h); the same command resumes")
    return parser


def teachers(options: argparse.Namespace, count: int) -> list[str]:
    """Return the first ``count`` teachers and the data as options of the command.

    Raises:
        SystemExit: there are too few weights, or they are of other networks.
    """
    files = options.weights.split(",")
    if len(files) < count:
        raise SystemExit(f"{count} teachers need as many files as --weights, after commas")
    named: list[str] = []
    for number, file in enumerate(files[:count]):
        network = WEIGHTS.get(Path(file).name.partition("-")[0])
        if network is None or (number == 0 and network != "cifar_resnet56_a"):
            raise SystemExit(
                f"{file}: the weights are resnet56-….th and, after it, resnet44-….th, resnet32-….th"
            )
        named += ["--teacher", network, "--teacher-weights", file]
    return [*named, "--data", options.data]


def main() -> None:
    parser = protocol(__doc__, seeds="0,1")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated [default: all]")
    options = parser.parse_args()
    training = [*TRAINING, "--epochs", options.epochs]
    chosen = [name.strip() for name in options.methods.split(",")]
    for name in chosen:
        if name not in METHODS:
            raise SystemExit(f"there is no '{name}'; there are {', '.join(METHODS)}")
    table = Table(
        options.out,
        [
            Cell(PAIR, name, seed, [*teachers(options, TEACHERS.get(name, 1)), *training, *METHODS[name]])
            for seed in map(int, options.seeds.split(","))
            for name in chosen
        ],
    )
    columns = ["method", "top-1, %", "95 % interval", "against none", "images/s", "seeds"]
    about = {"protocol": __doc__, "training": training}
    run_and_write(table, options.budget, about, lambda: markdown(columns, rows(table, chosen)))


if __name__ == "__main__":
    main()
