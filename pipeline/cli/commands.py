"""`compress bench`."""

import sys
from pathlib import Path
from typing import Any

import click

from ..config.limits import MOST_THREADS
from ..config.options import group
from ..runs import main_process
from .errors import ended, show_report, told
from .options import Grouped, all_options, given


@click.command(cls=Grouped)
def run(**options: Any) -> None:
    """Distill, export, quantize, validate and measure: the whole job.

    The same command again does only what is missing; an interrupted one goes on where it stopped.
    """

    from ..api.run import compress

    asked = given(options)
    report = told(lambda: compress(**asked), resumes=True)
    if main_process.leads():
        show_report(report, as_json=bool(options["json_"]))


run.params += all_options()


@click.command(cls=Grouped)
@click.option(
    "--sizes", required=True, metavar="S,S,…", help="sides of the students' input in pixels, as in 64,96,128"
)
def resolutions(sizes: str, **options: Any) -> None:
    """One student for each image size, all from one teacher, and accuracy over latency in one report.

    Takes the options of `run`; each student has a run folder of its own below --out. The same command again
    does only what is missing.
    """
    from ..api.sweep import resolutions as of_sizes
    from ..api.sweep import whole_numbers

    asked = given(options)
    found = told(lambda: of_sizes(whole_numbers(sizes), **asked), resumes=True)
    if options["json_"]:
        click.echo(found.model_dump_json(indent=2))
    else:
        from ..report.terminal import show_sizes

        show_sizes(found)


@click.command(cls=Grouped)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def export(folder: Path, **options: Any) -> None:
    """Make what ships of a finished run's student anew, for other processors or with other options.

    RUN is a run folder; what is not said stays as it was. Nothing that was trained is trained again.
    """
    from ..api.export import export_again

    asked = given(options)
    report = told(lambda: export_again(folder, **asked), resumes=True)
    show_report(report, as_json=bool(options["json_"]))


export.params += [
    one for one in run.params if one.name in ("quiet", "verbose", "json_") or group(str(one.name)) == "Export"
]


# The student's size is the one thing that differs, and none of its stages can be left out.
resolutions.params += [one for one in run.params if one.name not in ("student_size", "until", "dry_run")]


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


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT…")
@click.option(
    "--data",
    help="labelled images: whatever --data of run may be [default: the test images of the run itself]",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="as of run: where a named set or images lie"
)
@click.option("--download", is_flag=True, help="download a named data set when it is not there")
@click.option(
    "--role",
    type=click.Choice(["train", "val", "test", "all"]),
    help="which of the images [default: test where they have roles, else all]",
)
@click.option(
    "--teacher", help="a run folder or an .onnx file to agree with, or none [default: the run's own]"
)
@click.option("--file", help="which .onnx of an artifact folder to ask [default: each]")
@click.option(
    "--ignore-unknown", is_flag=True, help="pass over images of classes that a network does not know"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="where the pages and lists go [default: validation/ in the one run folder, else here]",
)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="threads [default: the cores allowed, at most 4]"
)
@click.option("--json", "as_json", is_flag=True, help="print what validation.json holds")
@click.option("--quiet", is_flag=True, help="no progress on standard error")
def validate(artifacts: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Ask shipped files about labelled images: accuracy, classes, calibration, mistakes.

    ARTIFACT is a run folder, an artifact folder or one of its .onnx files; several are compared on the same
    images.
    """
    from ..api.validate import as_json as dumped
    from ..api.validate import validate as asked

    found = told(lambda: asked(artifacts, **options))
    if as_json:
        click.echo(dumped(found))
    else:
        from ..report.terminal import show_validation

        show_validation(found)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option(
    "--out", type=click.Path(path_type=Path), help="where the pages and tables go [default: comparison/]"
)
@click.option(
    "--threads", type=click.IntRange(1), help="at which latencies compare [default: where most were timed]"
)
@click.option("--json", "as_json", is_flag=True, help="print what comparison.json holds")
@click.option("--quiet", is_flag=True, help="print nothing")
def compare(
    runs: tuple[Path, ...], out: Path | None, threads: int | None, as_json: bool, quiet: bool
) -> None:
    """Put runs into one table and one picture, and say which differences are noise.

    RUN is a run folder, a folder of run folders (also of `resolutions`), or a report.json.
    """
    from ..api.compare import compare as compared

    found = told(lambda: compared(runs, out=out, threads=threads))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        from ..report.terminal import show_comparison

        show_comparison(found)


@click.command()
@click.argument("folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="folder to write to [default: RUN]")
@click.option("--schema", is_flag=True, help="print the JSON schema of report.json, and nothing else")
@click.option("--json", "as_json", is_flag=True, help="print what report.json holds")
@click.option("--quiet", is_flag=True, help="print nothing")
def report(folder: Path | None, out: Path | None, schema: bool, as_json: bool, quiet: bool) -> None:
    """Write report.html, report.md and report.json of a run anew, finished or not.

    RUN is a run folder. Nothing is computed: what its stages have found is shown as this version shows it.
    Without --out the artifact's README.md is written anew too.
    """
    from ..api.report import report_again
    from ..api.report import schema as schema_of

    if schema:
        if folder is not None or out is not None or as_json or quiet:
            raise click.UsageError("--schema stands alone: it is the same for every run.")
        click.echo(schema_of(), nl=False)
        return
    if folder is None:
        raise click.UsageError("Name a run folder, as in: compress report runs/shop")
    found, files = told(lambda: report_again(folder, out))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        for file in files:
            click.echo(file)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="answers for each image")
@click.option("--file", "file", help="which .onnx of the artifact answers [default: the int8 one]")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="threads [default: the cores allowed, at most 4]"
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def predict(
    artifact: Path, images: tuple[Path, ...], top: int, file: str | None, threads: int | None, as_json: bool
) -> None:
    """Ask a compressed network what it sees.

    ARTIFACT is a run folder, an artifact folder or one of its .onnx files; IMAGES are files, or folders of
    them.
    """
    from ..api.predict import predict as answer

    unread = told(lambda: answer(artifact, images, top=top, file=file, threads=threads, as_json=as_json))
    sys.exit(1 if unread else 0)


@click.group()
def store() -> None:
    """What teachers have said to fixed views of images, kept for later runs."""


_cache = click.option(
    "--cache", type=click.Path(path_type=Path), help="folder that runs share [default: the user's]"
)


@store.command("list")
@_cache
@click.option("--json", "as_json", is_flag=True, help="one JSON list")
def list_store(cache: Path | None, as_json: bool) -> None:
    """List the answers by teacher, data and readout: how many views, how large, when last used."""
    from ..api.teacher_cache import list_store as show_list
    from ..runs.cache import Cache

    told(lambda: show_list(Cache(cache), as_json=as_json))


@store.command()
@click.argument("run", type=click.Path(path_type=Path))
@_cache
@click.option(
    "--share",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="of each view's batches, one at least",
)
def verify(run: Path, cache: Path | None, share: float) -> None:
    """Compute some of the answers that RUN has learned from again, and compare.

    RUN is a run folder. Where its answers are wrong or damaged, the exit code is 1.
    """
    from ..api.verify_cache import verify as verified

    told(lambda: verified(run, cache, share))


@store.command()
@click.option("--keep", required=True, metavar="SIZE", help="how much to keep, as in 10GB, 500MB or 0")
@_cache
def prune(keep: str, cache: Path | None) -> None:
    """Remove the answers that were used longest ago, until no more than SIZE is left."""
    from ..api.teacher_cache import prune as make_room
    from ..api.teacher_cache import size
    from ..runs.cache import Cache

    told(lambda: make_room(Cache(cache), size(keep)))


@click.command("recipes")
def list_recipes() -> None:
    """List the papers' recipes, for --recipe."""
    from ..config import recipes

    for name in recipes.names():
        recipe = recipes.load(name)
        click.echo(f"{name:<22}{recipe.about}\n{'':<22}{recipe.source}")


@click.command()
@click.argument("pattern", default="*")
@click.option(
    "--image-size", type=click.IntRange(8), help="side in pixels that GMACs are counted for [default: own]"
)
def models(pattern: str, image_size: int | None) -> None:
    """List networks by name, with parameters, GMACs and the licence of their weights.

    PATTERN is a name or one with wildcards, such as 'mobilenet*'.
    """
    from ..api.models import list_models

    told(lambda: list_models(pattern, image_size))


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), help="folder that runs share [default: the user's]")
@click.option("--offline", is_flag=True, help="don't ask the internet whether weights can be downloaded")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def doctor(cache: Path | None, offline: bool, as_json: bool) -> None:
    """Say what this machine has for the job, what is missing, and how to get it.

    The exit code is 1 where the job cannot run here.
    """
    from ..api.doctor import doctor as examine
    from ..report.terminal import show_diagnosis

    found = told(lambda: examine(cache=cache, offline=offline))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        show_diagnosis(found)
    sys.exit(0 if found.fit else 1)
