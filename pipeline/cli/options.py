"""The options of a run on the command line: made from their one list, shown under headings."""

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import click

from .. import methods
from ..config import defaults
from ..config.options import Options, group

GROUPS = ("What", "Weights", "Method", "Training", "Images", "Export", "Running")


class Grouped(click.Command):
    """A command whose options are listed under headings, with the table of defaults at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                name = str(parameter.name)
                heading = group(name) if name in Options.model_fields else "Running"
                records[heading].append(record)
        for name in GROUPS:
            _section(formatter, name, records[name])
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        _section(
            formatter,
            "What is chosen where you say nothing (from scratch | from weights)",
            [
                (option, scratch if weights in (scratch, "the same") else f"{scratch} | {weights}")
                for option, scratch, weights in defaults.lines()
                if own & set(option.split(", "))
            ],
        )


def _section(formatter: click.HelpFormatter, heading: str, rows: list[tuple[str, str]]) -> None:
    if rows:  # click has no list of nothing
        with formatter.section(heading):
            formatter.write_dl(rows, col_max=28)


def made_option(name: str, annotation: Any, default: Any, help: str) -> click.Option:
    """One option of `run`; its value is None unless it was given, so that a config file is not overridden."""
    kind = _without_none(annotation)
    shown = {"settings": "set", "json_": "json"}.get(name, name).replace("_", "-")
    # What a config may hold can be taken back.
    if kind is bool and (default is None or group(name) != "Running"):
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
        [f"--{shown}", name],
        type=kind if kind in (int, float) else str,
        default=None,
        help=help,
        shell_complete=COMPLETED.get(name),
    )


def _methods(_context: click.Context, _option: click.Parameter, begun: str) -> list[str]:
    *before, last = begun.split("+")
    names = [*methods.known(), "none"]
    return ["+".join([*before, name]) for name in names if name.startswith(last) and name not in before]


def _recipes(_context: click.Context, _option: click.Parameter, begun: str) -> list[str]:
    from ..config import recipes

    return [name for name in recipes.names() if name.startswith(begun)]


COMPLETED = {"method": _methods, "recipe": _recipes}
"""What a shell offers for the value of an option."""


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }


def all_options() -> list[click.Parameter]:
    """Every option of `run`, in the order of the list."""
    return [
        made_option(name, field.annotation, field.default, field.description or "")
        for name, field in Options.model_fields.items()
    ]
