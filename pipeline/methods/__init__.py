"""Distillation methods by name: one class each, here or in a package that declares an entry point."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..config import TaskName
from ..errors import UsageError

if TYPE_CHECKING:
    from .base import Method, Parameters

METHODS: Mapping[str, str] = {
    "quest": "quest.quest:Quest",
    "kd": "kd:Kd",
    "dkd": "dkd:Dkd",
    "dist": "dist:Dist",
    "wttm": "wttm:Wttm",
    "sdd": "sdd:Sdd",
    "feed": "feed:Feed",
    "mimic": "mimic.mimic:Mimic",
    "itrd": "itrd:Itrd",
    "pkd": "pkd:Pkd",
}
"""Name -> module:class. Imported when used, since they import torch."""

ENTRY_POINTS = "questpress.methods"
"""The entry-point group for methods of other packages; see docs/adding-a-method.md."""


def list_methods() -> list[str]:
    """Return the names of all methods: the built-in ones, then those of other packages in sorted order."""
    return [*METHODS, *sorted(_entry_points())]


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS) if entry.name not in METHODS}


def parse_methods(method: str) -> list[str]:
    """Split a sum such as ``quest+dkd`` into names; ``none`` gives an empty list.

    Raises:
        UsageError: a name does not exist or is repeated.
    """
    if method == "none":
        return []
    names = [name.strip() for name in method.split("+")]
    available = list_methods()
    for name in names:
        if name == "none":
            raise UsageError(f"--method {method}: 'none' cannot be combined with other methods.")
        if name not in available:
            near = difflib.get_close_matches(name, available, n=2, cutoff=0.4)
            did_you_mean = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(
                f"--method {method}: there is no method '{name}'.{did_you_mean} "
                f"Available: {', '.join([*available, 'none'])}. Combine methods with '+'."
            )
        if names.count(name) > 1:
            raise UsageError(f"--method {method}: '{name}' is repeated. Name each method once.")
    return names


def load(name: str) -> type[Method]:
    """Import the class of an available method.

    Raises:
        UsageError: another package's entry point cannot be imported, or is not a method of that name.
    """
    if name in METHODS:
        module, cls = METHODS[name].split(":")
        return getattr(import_module(f".{module}", __package__), cls)
    from .base import Method

    entry = _entry_points()[name]
    try:
        method = entry.load()
    except Exception as error:  # importing another package may raise anything
        raise UsageError(f"--method {name} ({entry.value}) cannot be imported: {error}.") from error
    is_method = isinstance(method, type) and issubclass(method, Method)
    if not is_method or getattr(method, "name", None) != name:
        raise UsageError(
            f"--method {name} ({entry.value}) is not a method: it must be a subclass of "
            f"questpress.pipeline.methods.base.Method with name = '{name}'."
        )
    return method


def parse_parameters(methods: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Parameters]:
    """Return the parameters of the methods, with ``settings`` such as ``{"quest.tau": "0.2"}`` applied.

    Raises:
        UsageError: a setting is not a parameter of one of the methods, or its value is invalid.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for key, value in settings.items():
        method, _, parameter = key.partition(".")
        if method not in values or not parameter:
            raise UsageError(
                f"--set {key}={value}: expected METHOD.KEY=VALUE for a method of this run "
                f"({', '.join(methods) or 'none'})."
            )
        fields = load(method).parameters_class.model_fields
        if parameter not in fields:
            near = difflib.get_close_matches(parameter, fields, n=1)
            did_you_mean = f" Did you mean {method}.{near[0]}?" if near else ""
            raise UsageError(
                f"--set {key}={value}: {method} has no parameter '{parameter}'.{did_you_mean} "
                f"Available: {', '.join(fields)}."
            )
        values[method][parameter] = None if value == "none" else value
    return {name: _validate(name, fields) for name, fields in values.items()}


def check_task(parameters: Mapping[str, Parameters], task: TaskName) -> None:
    """Raise UsageError if one of the methods does not support a task."""
    for name, chosen in parameters.items():
        if reason := load(name).unsupported(chosen, task):
            classes = {other: load(other) for other in list_methods()}.items()
            able = [other for other, cls in classes if not cls.unsupported(cls.parameters_class(), task)]
            raise UsageError(
                f"--method {name} does not support {task} data: {reason}. Use {' or '.join(able)}."
            )


def check_unlabeled(parameters: Mapping[str, Parameters], task: TaskName) -> None:
    """Raise UsageError unless the methods can learn from images without labels."""
    for name, chosen in parameters.items():
        if reason := load(name).needs_labels(chosen, task):
            raise UsageError(
                f"--unlabeled does not support --method {name} for {task}: {reason}. Use another method."
            )


def _validate(name: str, values: Mapping[str, Any]) -> Parameters:
    try:
        return load(name).parameters_class.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # raised by a validator of several parameters
            raise UsageError(f"--set {name}.…: {first['ctx']['error']}.") from error
        reason = first["msg"].lower().removeprefix("value error, ")
        key = ".".join(str(part) for part in (name, *first["loc"]) if not isinstance(part, int))
        raise UsageError(f"--set {key}={first['input']}: {reason}.") from error
