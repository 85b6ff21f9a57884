"""The command line: made from the list of options, and nothing heavy is imported before it is needed."""

import errno
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import click

from . import defaults, voice
from .options import Options, group
from .stopping import STOP, TIME_LIMIT_EXIT, TimeLimit

if TYPE_CHECKING:
    from .results import Report

T = TypeVar("T")
GROUPS = ("What", "Weights", "Method", "Training", "Images", "Export", "Running")


class Shorthand(click.Group):
    """``compress OPTIONS`` is ``compress run OPTIONS``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Of several processes one says what is wrong with the command line."""
        if voice.leads():
            return super().main(*args, **extra)
        try:
            return super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            sys.exit(error.exit_code)


class Grouped(click.Command):
    """A command whose options are listed under headings, with the table of defaults at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                name = str(parameter.name)
                heading = group(name) if name in Options.model_fields else "Running"
                records[heading].append(record)
        for name in GROUPS:
            with formatter.section(name):
                formatter.write_dl(records[name], col_max=28)
        with formatter.section("What is chosen where you say nothing (from scratch | from weights)"):
            formatter.write_dl(
                [
                    (option, scratch if weights in (scratch, "the same") else f"{scratch} | {weights}")
                    for option, scratch, weights in defaults.lines()
                ],
                col_max=28,
            )


def _option(name: str, annotation: Any, default: Any, help: str) -> click.Option:
    """One option of `run`; its value is None unless it was given, so that a config file is not overridden."""
    kind = _without_none(annotation)
    shown = {"settings": "set", "json_": "json"}.get(name, name).replace("_", "-")
    if kind is bool and default is None:
        return click.Option([f"--{shown}/--no-{shown}", name], default=None, help=help)
    if kind is bool:
        return click.Option([f"--{shown}", name], is_flag=True, default=None, help=help)
    if isinstance(default, str | int | float):
        help = f"{help} [default: {default}]"
    if name == "milestones":
        return click.Option([f"--{shown}", name], metavar="E,E,…", default=None, help=help)
    if get_origin(kind) in (list, dict):
        choices = get_args(get_args(kind)[0]) if get_origin(kind) is list else ()
        metavar = "KEY=VALUE" if get_origin(kind) is dict else None
        return click.Option(
            [f"--{shown}", name],
            type=click.Choice(choices) if choices else str,
            multiple=True,
            default=None,
            metavar=metavar,
            help=help,
        )
    if get_origin(kind) is Literal:
        return click.Option([f"--{shown}", name], type=click.Choice(get_args(kind)), default=None, help=help)
    return click.Option(
        [f"--{shown}", name], type=kind if kind in (int, float) else str, default=None, help=help
    )


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


@click.group(
    cls=Shorthand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="questpress", prog_name="compress")
def cli() -> None:
    """Turn a big pretrained vision network into a small one that ships.

    \b
    compress --teacher resnet50 --student mobilenetv2                 the built-in digits, in minutes
    compress --teacher resnet50 --student mobilenetv2 --data photos/ --out runs/shop
    compress predict runs/shop photo.jpg                              ask the network that came out
    compress models 'mobilenet*'                                      names, sizes, licences

    Options without a command go to `run`: `compress run --help` lists them.
    """


@cli.command(cls=Grouped)
def run(**options: Any) -> None:
    """Distill, export, quantize, validate and measure: the whole job.

    The same command again does only what is missing; an interrupted one goes on where it stopped.
    """

    from .run import compress

    given = _given(options)
    report = _told(lambda: compress(**given))
    if voice.leads():
        _show(report, as_json=bool(options["json_"]))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }


run.params += [
    _option(name, field.annotation, field.default, field.description or "")
    for name, field in Options.model_fields.items()
]


@cli.command(cls=Grouped)
@click.option(
    "--sizes", required=True, metavar="S,S,…", help="sides of the students' input in pixels, as in 64,96,128"
)
def resolutions(sizes: str, **options: Any) -> None:
    """One student for each image size, all from one teacher, and accuracy over latency in one report.

    Takes the options of `run`; each student has a run folder of its own below --out. The same command again
    does only what is missing.
    """
    from .resolutions import resolutions as of_sizes
    from .resolutions import whole_numbers

    given = _given(options)
    found = _told(lambda: of_sizes(whole_numbers(sizes), **given))
    if options["json_"]:
        click.echo(found.model_dump_json(indent=2))
    else:
        from .report.terminal import show_sizes

        show_sizes(found)


@cli.command(cls=Grouped)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def export(folder: Path, **options: Any) -> None:
    """Make what ships of a finished run's student anew, for other processors or with other options.

    RUN is a run folder; what is not said stays as it was. Nothing that was trained is trained again.
    """
    from .export_again import export_again

    given = _given(options)
    report = _told(lambda: export_again(folder, **given))
    _show(report, as_json=bool(options["json_"]))


export.params += [
    one for one in run.params if one.name in ("quiet", "json_") or group(str(one.name)) == "Export"
]


# The student's size is the one thing that differs, and none of its stages can be left out.
resolutions.params += [one for one in run.params if one.name not in ("student_size", "until", "dry_run")]


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="answers for each image")
@click.option("--file", "file", help="which .onnx of the artifact answers [default: the int8 one]")
@click.option("--threads", type=click.IntRange(1), help="threads [default: the cores allowed, at most 4]")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def predict(
    artifact: Path, images: tuple[Path, ...], top: int, file: str | None, threads: int | None, as_json: bool
) -> None:
    """Ask a compressed network what it sees.

    ARTIFACT is a run folder, an artifact folder or one of its .onnx files; IMAGES are files.
    """
    from .predict import predict as answer

    unread = _told(lambda: answer(artifact, images, top=top, file=file, threads=threads, as_json=as_json))
    sys.exit(1 if unread else 0)


@cli.command("recipes")
def list_recipes() -> None:
    """List the papers' recipes, for --recipe."""
    from . import recipes

    for name in recipes.names():
        recipe = recipes.load(name)
        click.echo(f"{name:<22}{recipe.about}\n{'':<22}{recipe.source}")


@cli.command()
@click.argument("pattern", default="*")
@click.option(
    "--image-size", type=click.IntRange(8), help="side in pixels that GMACs are counted for [default: own]"
)
def models(pattern: str, image_size: int | None) -> None:
    """List networks by name, with parameters, GMACs and the licence of their weights.

    PATTERN is a name or one with wildcards, such as 'mobilenet*'.
    """
    from .list_models import list_models

    _told(lambda: list_models(pattern, image_size))


@cli.group()
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
    from .cache import Cache
    from .store.manage import list_store as show_list

    _told(lambda: show_list(Cache(cache), as_json=as_json))


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
    from .store.verify import verify as verified

    _told(lambda: verified(run, cache, share))


@store.command()
@click.option("--keep", required=True, metavar="SIZE", help="how much to keep, as in 10GB, 500MB or 0")
@_cache
def prune(keep: str, cache: Path | None) -> None:
    """Remove the answers that were used longest ago, until no more than SIZE is left."""
    from .cache import Cache
    from .store.manage import prune as make_room
    from .store.manage import size

    _told(lambda: make_room(Cache(cache), size(keep)))


def _told(job: Callable[[], T]) -> T:
    """Run a job; what goes wrong for the user is one sentence and an exit code, not a traceback."""
    try:
        # A scheduler or a container that wants its machine back says SIGTERM; that is Ctrl-C from afar.
        with STOP.listens():
            return job()
    except TimeLimit:
        _ended(
            "\nStopped: the --time-limit is reached. The same command goes on where this one was.",
            TIME_LIMIT_EXIT,
        )
    except KeyboardInterrupt:
        _ended("\nStopped. The same command goes on where this one was.", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _ended(f"Error: {error.filename or 'a file'}: {error.strerror}; what was there is unchanged.", 1)
    except Exception as error:
        # The rooms have error classes of their own; each tells its exit code.
        code = getattr(error, "exit_code", None)
        if code is not None:
            _ended(f"Error: {error}", code)
        if voice.first_to_end():
            raise
        sys.exit(1)  # this process has lost the one that has told why


def _ended(sentence: str, code: int) -> NoReturn:
    if voice.first_to_end():
        click.echo(sentence, err=True)
    sys.exit(code)


def _show(report: "Report", *, as_json: bool) -> None:
    from .report.terminal import show

    if as_json:
        click.echo(report.model_dump_json(indent=2, by_alias=True))
    elif report.stages:
        show(report)
