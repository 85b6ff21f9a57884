"""Create the click options of a run from ``config.options.Options``."""

import sys
import types
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click

from .. import methods
from ..config import defaults
from ..config.options import GROUPS, Options, get_flag, get_group, parse_size
from .main import fail

PATH = click.Path(path_type=Path)

cache_option = click.option("--cache", type=PATH, help="cache folder [default: the user's cache folder]")
json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")


class SizeType(click.ParamType):
    """Pixels of a side, or of height and width."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(f"{value!r}: it {error}.", param, ctx)


def get_heading(name: str) -> str:
    """Return the heading of a command's option."""
    if name in Options.model_fields:
        return get_group(name)
    sweeps = "students", "student_sizes", "methods", "max_latency", "min_accuracy", "keep"
    is_first = name in ("modules", *sweeps)
    return GROUPS[0] if is_first else GROUPS[-1]


class GroupedCommand(click.Command):
    """A command whose options are listed under headings, followed by the table of defaults."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records[get_heading(str(parameter.name))].append(record)
        for heading, rows in records.items():
            _write_section(formatter, heading, rows)
        flags = {flag for parameter in self.get_params(ctx) for flag in parameter.opts}
        rows = [
            (row.option, f"{row.scratch} | {row.pretrained}" if row.pretrained else row.scratch)
            for row in defaults.TABLE
            if flags & set(row.option.split(", "))
        ]
        _write_section(formatter, "Defaults (from scratch | from pretrained weights)", rows)


def _write_section(formatter: click.HelpFormatter, heading: str, rows: list[tuple[str, str]]) -> None:
    if rows:  # click fails for an empty list
        with formatter.section(heading):
            formatter.write_dl(rows, col_max=28)


def run_options() -> list[click.Parameter]:
    """Return all options of ``run`` in the order of ``Options``."""
    return [
        make_option(name, field.annotation, field.default, field.description or "")
        for name, field in Options.model_fields.items()
    ]


def make_option(name: str, annotation: Any, default: Any, help: str) -> click.Option:
    """Return the click option of a field.

    Its value is None unless it is given, so that it does not override a config file.
    """
    kind = annotation
    if get_origin(annotation) in (Union, types.UnionType):
        kind = next(part for part in get_args(annotation) if part is not type(None))
    settings: dict[str, Any] = {"default": None, "help": help}
    if kind is bool:
        # A config file can set it, so the command line can unset it.
        can_unset = default is None or get_group(name) != "Execution"
        names = f"{get_flag(name)}/--no-{get_flag(name)[2:]}" if can_unset else get_flag(name)
        return click.Option([names, name], is_flag=True, **settings)
    if isinstance(default, str | int | float):
        settings["help"] = f"{help} [default: {default}]"
    if name in METAVARS:
        return click.Option([get_flag(name), name], metavar=METAVARS[name], **settings)
    container, parts = get_origin(kind), get_args(kind)
    if container is Literal:
        settings["type"] = click.Choice(parts)
    elif container is dict:
        settings |= {"type": str, "multiple": True, "metavar": "KEY=VALUE"}
    elif container is list:
        choices = get_args(parts[0])
        settings |= {"type": click.Choice(choices) if choices else str, "multiple": True}
    else:
        click_types = {int: click.INT, float: click.FLOAT, Path: click.Path(readable=False)}
        settings |= {"type": click_types.get(kind, click.STRING), "shell_complete": COMPLETIONS.get(name)}
    return click.Option([get_flag(name), name], **settings)


def _complete_method(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    *complete, last = incomplete.split("+")
    names = sorted({*methods.list_methods(), "none"} - {*complete})
    return ["+".join([*complete, name]) for name in names if name.startswith(last)]


def _complete_recipe(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    from ..config import recipes

    return [name for name in recipes.list_recipes() if name.startswith(incomplete)]


METAVARS = {
    "milestones": "E,E,…",
    "image_size": "SIZE",
    "student_size": "SIZE",
    "randaugment": "N,M",
    "mixup": "A",
    "cutmix": "A",
}
"""Placeholders of values with another form than their type."""

COMPLETIONS = {"method": _complete_method, "recipe": _complete_recipe}
"""Functions that complete an option's value in a shell."""


def _import_modules(_context: click.Context, _option: click.Parameter, modules: tuple[str, ...]) -> None:
    """Import modules of the current folder or the environment."""
    if modules:
        sys.path.insert(0, str(Path.cwd()))
    for name in modules:
        try:
            import_module(name)
        except Exception as error:  # whatever the user's module raises
            fail(f"Error: --import {name}: {type(error).__name__}: {error}.", 2)


import_option = click.Option(
    ["--import", "modules"],
    multiple=True,
    metavar="MODULE",
    is_eager=True,
    expose_value=False,
    callback=_import_modules,
    help="run a Python module of yours that registers networks with timm; can be repeated",
)


def select_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }
