"""Accuracy by the number of fixed views, of cached words of each position, and of positions.

The CPU protocol of ``cifar10_small.py`` with QuEST as it is by default (1,024 words, ``--balance auto``): the
teacher computed at every step (online), then with a cache of V views of each image and m words of each
position, and with N of the 64 positions drawn for each image and epoch. Cells with the same m share a cache.

    python -m benchmarks.papers.cache_views --data cifar10/ --weights resnet56-4bfd9763.th \\
        --out runs/cache_views
"""

from benchmarks.cells import Cell, Table, markdown, run_and_write
from benchmarks.papers.cifar10_small import PAIR, QUEST, TRAINING, protocol, rows

CELLS = {
    "V = 30, m = 128": ["--cache-views", "30", "--cache-top", "128"],
    "V = 10, m = 32": ["--cache-views", "10", "--cache-top", "32"],
    "V = 3, m = 32": ["--cache-views", "3", "--cache-top", "32"],
    "V = 10, m = 32, 16 positions": [
        "--cache-views", "10", "--cache-top", "32", "--set", "quest.positions=16",
    ],
    "V = 10, m = 8": ["--cache-views", "10", "--cache-top", "8"],
    "online": ["--cache-views", "0"],
    "V = 1, m = 32": ["--cache-views", "1", "--cache-top", "32"],
    "V = 10, m = 32, 8 positions": ["--cache-views", "10", "--cache-top", "32", "--set", "quest.positions=8"],
}  # fmt: skip


def main() -> None:
    parser = protocol(__doc__, seeds="0")
    parser.add_argument("--cells", default=";".join(CELLS), help="separated by semicolons [default: all]")
    options = parser.parse_args()
    common = ["--teacher", "cifar_resnet56_a", "--teacher-weights", options.weights, "--data", options.data]
    common += [*TRAINING, "--epochs", options.epochs]
    common += [*QUEST, "--balance", "auto", "--cache", str(options.out / "cache")]
    chosen = [name for name in CELLS if name in options.cells.split(";")]
    table = Table(
        options.out,
        [
            Cell(PAIR, name, seed, [*common, *CELLS[name]])
            for seed in map(int, options.seeds.split(","))
            for name in chosen
        ],
    )
    columns = ["QuEST with", "top-1, %", "95 % interval", "", "images/s", "seeds"]
    run_and_write(
        table, options.budget, {"protocol": __doc__}, lambda: markdown(columns, rows(table, chosen))
    )


if __name__ == "__main__":
    main()
