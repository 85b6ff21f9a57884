"""`compress bench`."""

import sys
from pathlib import Path

import click

from .errors import ended, told


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    type=click.Choice(("onnxruntime", "openvino")),
    help="in which runtime; may be given twice, for both",
)
@click.option("--seconds", type=float, help="of each file and thread count [default: 10]")
@click.option("--quick", is_flag=True, help="3 seconds, and p99 only where they gave 662 runs")
@click.option("--mlperf", is_flag=True, help="600 seconds, and MLPerf's estimates of p90 and p99")
@click.option(
    "--threads", metavar="N,N,…", help="thread counts [default: 1, and the cores allowed, at most 4]"
)
@click.option("--seed", default=0, show_default=True, help="of the rounds' order, the inputs, the bootstrap")
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="image files, or folders of them [default: the run's own data, or pictures made up]",
)
@click.option("--image-size", type=click.IntRange(1), help="side of the input where a file leaves it open")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="folder of the results [default: bench/ of the one run, else bench-results/]",
)
@click.option("--strict", is_flag=True, help="exit code 1 where anything disturbed the measurement")
@click.option("--json", "as_json", is_flag=True, help="print what bench.json holds")
@click.option("--quiet", is_flag=True, help="no progress")
def bench(
    paths: tuple[Path, ...],
    runtimes: tuple[str, ...],
    seconds: float | None,
    quick: bool,
    mlperf: bool,
    threads: str | None,
    seed: int,
    images: tuple[Path, ...],
    image_size: int | None,
    out: Path | None,
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure latency on this machine, so that it can be believed.

    PATHS are run folders, artifact folders and .onnx files; all are timed together, in the same rounds. Of
    one run folder the report is written anew with what was found.
    """
    from ..api.bench import bench as measured
    from ..api.bench import results_folder, thread_counts

    found = told(
        lambda: measured(
            paths,
            seconds=seconds,
            quick=quick,
            mlperf=mlperf,
            threads=None if threads is None else thread_counts(threads),
            seed=seed,
            runtimes=runtimes,
            images=images,
            image_size=image_size,
            out=out,
            quiet=quiet,
        )
    )
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        from ..report.bench_terminal import show

        show(found, results_folder(paths, out))
    if strict and found.flags:
        named = ", ".join(dict.fromkeys(flag.name for flag in found.flags))
        ended(f"--strict: the machine was not quiet ({named}).", 1)
    sys.exit(0)
