"""The methods by name. A method is one file and one class here, or a class of another package that declares
it as an entry point; nothing else names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import UsageError

if TYPE_CHECKING:
    from .base import Method, Parameters

METHODS: Mapping[str, str] = {
    "quest": "quest.quest:Quest",
    "kd": "kd:Kd",
    "dkd": "dkd:Dkd",
    "dist": "dist:Dist",
    "feed": "feed:Feed",
    "mimic": "mimic:Mimic",
}
"""Name -> module:class of our own. Imported when used, since torch comes with them."""

ENTRY_POINTS = "questpress.methods"
"""Under this group other packages declare methods of theirs: docs/adding-a-method.md."""


def known() -> list[str]:
    """The names of all methods: ours, then those of other packages by name."""
    return [*METHODS, *sorted(_of_others())]


def _of_others() -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=ENTRY_POINTS) if one.name not in METHODS}


def names(method: str) -> list[str]:
    """The methods in a sum such as ``quest+dkd``; none for ``none``.

    Raises:
        UsageError: one of them does not exist, or is named twice.
    """
    if method == "none":
        return []
    parts = [part.strip() for part in method.split("+")]
    there = known()
    for part in parts:
        if part == "none":
            raise UsageError(f"--method {method}: none is no teacher at all, and stands alone.")
        if part not in there:
            near = difflib.get_close_matches(part, there, n=2, cutoff=0.4)
            did_you_mean = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(
                f"There is no method '{part}' in --method {method}.{did_you_mean} "
                f"There are: {', '.join([*there, 'none'])}; several are added with a plus sign."
            )
        if parts.count(part) > 1:
            raise UsageError(f"--method {method} names {part} twice; name each method once.")
    return parts


def load(name: str) -> type[Method]:
    """The class of a method that is :func:`known`.

    Raises:
        UsageError: another package's entry point cannot be imported, or is no method of that name.
    """
    if name in METHODS:
        module, cls = METHODS[name].split(":")
        return getattr(import_module(f".{module}", __package__), cls)
    from .base import Method

    entry = _of_others()[name]
    try:
        found = entry.load()
    except Exception as error:  # whatever another package does when it is imported
        raise UsageError(f"--method {name} ({entry.value}) cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Method) and getattr(found, "name", None) == name):
        raise UsageError(
            f"--method {name} ({entry.value}) is no method of that name: it must be a class made from "
            "questpress.pipeline.methods.base.Method whose name is the entry point's."
        )
    return found


def parameters(chosen: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Parameters]:
    """The parameters of the chosen methods, with ``settings`` such as ``{"quest.tau": "0.2"}`` applied.

    Raises:
        UsageError: a setting names no chosen method or no parameter of it, or its value has the wrong type.
    """
    by_method: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for key, value in settings.items():
        method, _, parameter = key.partition(".")
        if method not in by_method or not parameter:
            told = (
                f"the methods of this run are {', '.join(chosen)}"
                if chosen
                else "--method none has no parameters"
            )
            raise UsageError(f"--set {key}={value}: {told}; write --set METHOD.KEY=VALUE.")
        fields = load(method).takes.model_fields
        if parameter not in fields:
            near = difflib.get_close_matches(parameter, fields, n=1)
            did_you_mean = f" Did you mean {method}.{near[0]}?" if near else ""
            raise UsageError(
                f"--set {key}={value}: {method} has no parameter '{parameter}'.{did_you_mean} "
                f"It has: {', '.join(fields)}."
            )
        by_method[method][parameter] = None if value == "none" else value
    return {name: _validated(name, values) for name, values in by_method.items()}


def check_multi_label(chosen: Mapping[str, Parameters]) -> None:
    """
    Raises:
        UsageError: a method cannot learn images of several labels.
    """
    for name, of_method in chosen.items():
        reason = load(name).not_multi_label(of_method)
        if reason is not None:
            able = [other for other in known() if load(other).not_multi_label(load(other).takes()) is None]
            raise UsageError(
                f"--method {name} cannot learn images of several labels: {reason}; take {' or '.join(able)}."
            )


def _validated(name: str, values: Mapping[str, Any]) -> Parameters:
    try:
        return load(name).takes.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # it is about how several go together
            raise UsageError(f"--set {name}.…: {first['ctx']['error']}.") from error
        reason = first["msg"].lower().removeprefix("value error, ")
        key = ".".join(str(part) for part in (name, *first["loc"]) if not isinstance(part, int))
        raise UsageError(f"--set {key}={first['input']}: {reason}.") from error
