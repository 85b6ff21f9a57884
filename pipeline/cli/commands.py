"""The commands, each a thin layer over a function of ``api``."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ...export.text import encodable_json
from ..config.limits import MAX_THREADS
from ..errors import UsageError
from ..runs import process
from .cache import cache as cache
from .main import exit_on_error, fail
from .options import (
    PATH,
    GroupedCommand,
    SizeType,
    cache_option,
    get_heading,
    import_option,
    json_option,
    run_options,
    select_given,
)

threads_option = click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="number of threads [default: the available cores, at most 4]",
)
quiet_option = click.option("--quiet", is_flag=True, help="do not print progress")


def _print_json(text: str) -> None:
    click.echo(encodable_json(text, getattr(sys.stdout, "encoding", None)))


def _print(result: Any, show: Callable[[Any], None], *, as_json: bool) -> None:
    if as_json:
        _print_json(result.model_dump_json(indent=2, by_alias=True))
    else:
        show(result)


@click.command(cls=GroupedCommand)
def run(**options: Any) -> None:
    """Run the whole job: distill, export, quantize, validate and benchmark.

    Running the same command again does only what is missing, and resumes an interrupted job.
    """
    from ..api.run import compress
    from ..report.terminal import show_report

    report = exit_on_error(lambda: compress(**select_given(options)), resumable=True)
    if process.is_main() and (report.stages or options["json_"]):  # a dry run has no stages
        _print(report, show_report, as_json=options["json_"])


run.params += [*run_options(), import_option]


@click.command(cls=GroupedCommand)
@click.option(
    "--students",
    metavar="NAME,NAME,…",
    help="timm names of the students, or auto for a short list of good ones [default: --student]",
)
@click.option(
    "--student-sizes",
    metavar="S,S,…",
    help="sizes of the students' input in pixels, such as 64,96,128 or 64x24,96x36 [default: --image-size]",
)
@click.option(
    "--methods",
    metavar="METHOD,METHOD,…",
    help="distillation methods, such as none,kd,quest+kd [default: --method]",
)
@click.option(
    "--max-latency",
    metavar="MS",
    help="train only students with this median latency here, such as 5ms: int8 or fp32, one thread",
)
@click.option(
    "--min-accuracy",
    metavar="PERCENT",
    type=float,
    help="ship the fastest student with this val accuracy, mAP or AP [default: the most accurate one]",
)
@click.option(
    "--keep",
    metavar="N",
    type=int,
    help="train fully only the best N, chosen on val images by ever longer trainings [default: all]",
)
def sweep(
    students: str | None,
    student_sizes: str | None,
    methods: str | None,
    max_latency: str | None,
    min_accuracy: float | None,
    keep: int | None,
    **options: Any,
) -> None:
    """Search for the right student: distill several, at several sizes or by several methods.

    Every student has a run folder below --out, and comparison/ there compares them. The other options are
    those of `run`; --set and --weight apply to the runs with their method. Running the same command again
    does only what is missing.
    """
    from ..api.sweep import sweep
    from ..report.terminal import show_comparison

    comparison = exit_on_error(
        lambda: sweep(
            students=[name.strip() for name in students.split(",")] if students else [],
            methods=[name.strip() for name in methods.split(",")] if methods else [],
            student_sizes=student_sizes.split(",") if student_sizes else [],
            max_latency=max_latency,
            min_accuracy=min_accuracy,
            keep=keep,
            **select_given(options),
        ),
        resumable=True,
    )
    _print(comparison, show_comparison, as_json=options["json_"])
    sys.exit(1 if comparison.search and comparison.search.failed else 0)


sweep.params += [option for option in run.params if option.name not in ("student_size", "until", "dry_run")]


def _parse_integers(option: str, text: str | None, example: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"{option} must be integers, such as {example}, got {text}.") from error


@click.command(cls=GroupedCommand)
@click.argument("folder", metavar="RUN", type=PATH)
def export(folder: Path, **options: Any) -> None:
    """Export a finished run again, for other processors or with other options.

    RUN is a run folder. Options that are not given keep the run's values. Nothing is trained again.
    """
    from ..api.run import export
    from ..report.terminal import show_report

    report = exit_on_error(lambda: export(folder, **select_given(options)), resumable=True)
    _print(report, show_report, as_json=options["json_"])


export.params += [
    option
    for option in run.params
    if option.name in ("quiet", "verbose", "json_", "modules") or get_heading(str(option.name)) == "Export"
]


@click.command()
@click.argument("artifact", type=PATH)
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.option("--top", type=click.IntRange(1), help="number of classes per image [default: 3]")
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    help="smallest score of a detected object [default: 0.5]",
)
@click.option("--draw", type=PATH, metavar="FILE", help="write the image with its objects' boxes")
@click.option("--file", help="the .onnx file of the artifact to use [default: the faster one]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="print one JSON object per line")
def predict(artifact: Path, images: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Classify images, or find objects in them, with a compressed model.

    ARTIFACT is a run folder, an artifact folder or an .onnx file. IMAGES are files or folders.
    """
    from ..api.predict import predict

    unreadable = exit_on_error(lambda: predict(artifact, images, as_json=as_json, **options))
    sys.exit(1 if unreadable else 0)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=PATH, metavar="ARTIFACT…")
@click.option("--data", help="labeled images, as --data of run [default: the run's test images]")
@click.option("--data-dir", type=PATH, help="folder of a named data set or of a labels file's images")
@click.option("--download", is_flag=True, help="download a named data set if it is missing")
@click.option("--follow-links", is_flag=True, help="follow links that lead out of the data folder")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    help="split to use [default: test if the data has splits, otherwise all]",
)
@click.option(
    "--teacher", help="run folder or .onnx file to compare with, or none [default: the run's teacher]"
)
@click.option("--file", help="the .onnx file of an artifact to validate [default: all]")
@click.option("--ignore-unknown", is_flag=True, help="leave out images of classes that a model does not have")
@click.option(
    "--out", type=PATH, help="output folder [default: validation/ in a single run folder, otherwise here]"
)
@threads_option
@json_option
@quiet_option
def validate(artifacts: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Measure accuracy and calibration of exported models on labeled images.

    ARTIFACT is a run folder, an artifact folder or an .onnx file. Several are compared on the same images.
    """
    from ..api.validate.validate import to_json, validate
    from ..report.terminal import show_validation

    validation = exit_on_error(lambda: validate(artifacts, **options))
    if as_json:
        _print_json(to_json(validation))
    else:
        show_validation(validation)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    type=click.Choice(("onnxruntime", "openvino")),
    help="inference runtime; can be repeated",
)
@click.option("--seconds", type=float, help="seconds per file and number of threads [default: 10]")
@click.option("--quick", is_flag=True, help="3 seconds; p99 is reported only if 662 runs fit")
@click.option(
    "--threads", metavar="N,N,…", help="numbers of threads [default: 1 and the available cores, at most 4]"
)
@click.option("--seed", default=0, show_default=True, help="seed of the order, the inputs and the bootstrap")
@click.option(
    "--images",
    multiple=True,
    type=PATH,
    help="image files or folders; can be repeated [default: the run's data, or synthetic images]",
)
@click.option("--image-size", type=SizeType(), help="size of the input of files with a dynamic one")
@click.option(
    "--out", type=PATH, help="output folder [default: bench/ in a single run folder, or bench-results/]"
)
@click.option("--strict", is_flag=True, help="exit with code 1 if the measurement was disturbed")
@click.option(
    "--add",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="measure nothing, and add a bench.DEVICE.json of predict.py --bench to the run; can be repeated",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="ssh:USER@HOST",
    help="run predict.py --bench of the run's artifact there, and add the result to the run; can be repeated",
)
@click.option("--setup", is_flag=True, help="install the packages on --device, in a temporary environment")
@json_option
@quiet_option
@click.pass_context
def bench(
    context: click.Context,
    paths: tuple[Path, ...],
    threads: str | None,
    out: Path | None,
    strict: bool,
    add: tuple[Path, ...],
    devices: tuple[str, ...],
    setup: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure inference latency on this machine, or on devices.

    PATHS are run folders, artifact folders and .onnx files, which are measured together in interleaved
    rounds. The report of a single run folder is updated.
    """
    from ..api.bench import bench, results_folder
    from ..api.devices import add_devices, bench_devices
    from ..report.terminal import show_bench, show_devices

    if add or devices:
        used, allowed = ("--device", {"devices", "setup", "seconds"}) if devices else ("--add", {"add"})
        if len(paths) != 1:
            fail(f"{used} requires one run folder, got {len(paths)} paths.", 2)
        for name in set(context.params) - allowed - {"paths", "as_json", "quiet"}:
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                option = "--runtime" if name == "runtimes" else f"--{name.replace('_', '-')}"
                fail(f"{used} and {option} cannot be used together.", 2)
        seconds, quiet = options["seconds"], options["quiet"]
        if seconds is not None and not 0 < seconds < math.inf:
            fail(f"--seconds must be greater than 0 and finite, got {seconds:g}.", 2)
        report = exit_on_error(
            lambda: (
                bench_devices(paths[0], devices, setup=setup, seconds=seconds, quiet=quiet)
                if devices
                else add_devices(paths[0], add)
            )
        )
        _print(report, lambda added: show_devices(added, paths[0]), as_json=as_json)
        return
    if setup:
        fail("--setup requires --device.", 2)
    result = exit_on_error(
        lambda: bench(
            paths,
            threads=None if threads is None else _parse_integers("--threads", threads, "1,2"),
            out=out,
            **options,
        )
    )
    _print(result, lambda timed: show_bench(timed, results_folder(paths, out)), as_json=as_json)
    if strict and result.flags:
        names = ", ".join(dict.fromkeys(flag.name for flag in result.flags))
        fail(f"--strict: the measurement was disturbed ({names}).", 1)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN…")
@click.option("--out", type=PATH, help="output folder [default: comparison/]")
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="number of threads of the compared latencies [default: that of most runs]",
)
@json_option
@click.option("--quiet", is_flag=True, help="print nothing")
def compare(runs: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare runs in one table and chart, with significance tests.

    RUN is a run folder, a folder of run folders, or a report.json.
    """
    from ..api.compare import compare
    from ..report.terminal import show_comparison

    comparison = exit_on_error(lambda: compare(runs, **options))
    if as_json or not quiet:
        _print(comparison, show_comparison, as_json=as_json)


@click.command()
@click.argument("folder", metavar="[RUN]", required=False, type=PATH)
@click.option("--out", type=PATH, help="output folder [default: RUN]")
@click.option("--schema", is_flag=True, help="print the JSON schema of report.json and exit")
@json_option
@click.option("--quiet", is_flag=True, help="print nothing")
def report(folder: Path | None, out: Path | None, schema: bool, as_json: bool, quiet: bool) -> None:
    """Write report.html, report.md and report.json of a run again.

    RUN is a run folder, finished or not. Nothing is computed. Without --out, the artifact's README.md is
    written too.
    """
    from ..api.report import json_schema, report

    if schema:
        if folder is not None or out is not None or as_json or quiet:
            raise click.UsageError("--schema cannot be combined with other arguments.")
        _print_json(json_schema().rstrip())
        return
    if folder is None:
        raise click.UsageError("A run folder is required, such as: compress report runs/shop")
    result, files = exit_on_error(lambda: report(folder, out))
    if as_json:
        _print_json(result.model_dump_json(indent=2))
    elif not quiet:
        for file in files:
            click.echo(file)


@click.command()
@click.argument("folder", metavar="RUN", type=PATH)
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="make a new repository private, and refuse a public one")
@click.option(
    "--transformers-js", is_flag=True, help="add the files that transformers.js reads in browsers and Node.js"
)
@click.option("--dry-run", is_flag=True, help="list the files with their sizes, and send nothing")
def push(folder: Path, repository: str, **options: Any) -> None:
    """Upload the artifact of a finished run to the Hugging Face Hub.

    RUN is a run folder. REPO is USER/NAME of a model repository, which is created if it does not exist.
    """
    from ..api.push import push
    from .tables import print_push

    print_push(exit_on_error(lambda: push(folder, repository, **options)))


@click.command()
@click.argument("pattern", default="*")
@click.option("--image-size", type=SizeType(), help="size of the input for GMACs [default: the model's]")
def models(pattern: str, image_size: Any) -> None:
    """List networks with parameters, GMACs and the license of their weights.

    PATTERN is a name, with or without wildcards, such as 'mobilenet*'.
    """
    from ...models.catalog import list_models
    from .tables import print_models

    print_models(exit_on_error(lambda: list_models(pattern, image_size)))


@click.command()
def recipes() -> None:
    """List the recipes from papers for --recipe."""
    from ..config import recipes

    for name in recipes.list_recipes():
        recipe = recipes.load_recipe(name)
        click.echo(f"{name:<22}{recipe.about}\n{'':<22}{recipe.source}")


@click.command()
@cache_option
@click.option("--offline", is_flag=True, help="do not check whether weights can be downloaded")
@json_option
def doctor(cache: Path | None, offline: bool, as_json: bool) -> None:
    """Check this machine for packages, devices, memory and disk space.

    The exit code is 1 if compress cannot run.
    """
    from ..api.doctor import doctor
    from .tables import print_diagnosis

    diagnosis = exit_on_error(lambda: doctor(cache=cache, offline=offline))
    _print(diagnosis, print_diagnosis, as_json=as_json)
    sys.exit(0 if diagnosis.can_run else 1)
