"""The methods by name. A method is one file and one class here; nothing else names it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import UsageError

if TYPE_CHECKING:
    from .base import Method, Parameters

METHODS: Mapping[str, str] = {
    "quest": "quest:Quest",
    "kd": "kd:Kd",
    "dkd": "dkd:Dkd",
    "dist": "dist:Dist",
    "feed": "feed:Feed",
    "mimic": "mimic:Mimic",
}
"""Name -> module:class. Imported when used, since torch comes with them."""


def names(method: str) -> list[str]:
    """The methods in a sum such as ``quest+dkd``; none for ``none``.

    Raises:
        UsageError: one of them does not exist, or is named twice.
    """
    if method == "none":
        return []
    parts = [part.strip() for part in method.split("+")]
    for part in parts:
        if part not in METHODS:
            near = difflib.get_close_matches(part, METHODS, n=2, cutoff=0.4)
            did_you_mean = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(
                f"There is no method '{part}' in --method {method}.{did_you_mean} "
                f"There are: {', '.join([*METHODS, 'none'])}; several are added with a plus sign."
            )
        if parts.count(part) > 1:
            raise UsageError(f"--method {method} names {part} twice; name each method once.")
    return parts


def load(name: str) -> type[Method]:
    """The class of a method in :data:`METHODS`."""
    module, cls = METHODS[name].split(":")
    return getattr(import_module(f".{module}", __package__), cls)


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
        known = load(method).takes.model_fields
        if parameter not in known:
            near = difflib.get_close_matches(parameter, known, n=1)
            did_you_mean = f" Did you mean {method}.{near[0]}?" if near else ""
            raise UsageError(
                f"--set {key}={value}: {method} has no parameter '{parameter}'.{did_you_mean} "
                f"It has: {', '.join(known)}."
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
            able = [other for other in METHODS if load(other).not_multi_label(load(other).takes()) is None]
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
        key = ".".join(str(part) for part in (name, *first["loc"]) if not isinstance(part, int))
        raise UsageError(f"--set {key}={first['input']}: {first['msg'].lower()}.") from error
