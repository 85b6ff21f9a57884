"""The papers' recipes: every hyper-parameter in a YAML file, with its source.

A file holds ``about``, ``source``, ``options``, and, where a paper has other values for some networks,
``for_students`` and ``for_teachers``: shell patterns of timm's names with the options that differ.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import chain
from typing import Any

import yaml

from ....models.names import resolve
from ...errors import UsageError
from .. import bounded_yaml
from ..options import Options

_NEEDED = {"about", "source", "options"}
_KEYS = _NEEDED | {"for_students", "for_teachers"}


@dataclass(frozen=True)
class Recipe:
    """A paper's way of training."""

    name: str
    about: str
    source: str
    options: Mapping[str, Any]
    for_students: Mapping[str, Mapping[str, Any]]
    for_teachers: Mapping[str, Mapping[str, Any]]

    def for_pair(self, teachers: Sequence[str], student: str) -> dict[str, Any]:
        """The recipe's options for these networks.

        Raises:
            UnknownModel: a network's name is wrong.
        """
        options = dict(self.options)
        for patterns, names in ((self.for_students, [student]), (self.for_teachers, teachers)):
            for pattern, differing in patterns.items():
                if any(fnmatchcase(resolve(name), pattern) for name in names):
                    options = _with(options, differing)
        return options

    def changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a run's config has other than the recipe: option -> value."""
        mine = self.for_pair(config["teacher"], config["student"])
        changed: dict[str, Any] = {}
        for name, value in mine.items():
            if isinstance(value, Mapping):
                theirs = config.get(name) or {}
                changed |= {
                    key: theirs.get(key) for key, wanted in value.items() if theirs.get(key) != wanted
                }
            elif config.get(name) != value:
                changed[name] = config.get(name)
        return changed


def names() -> list[str]:
    """All recipes, in alphabetical order."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files(__package__).iterdir() if _is_recipe(file.name)
    )


def load(name: str) -> Recipe:
    """
    Raises:
        UsageError: there is no such recipe, or its file has a key that means nothing.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.3)
        did_you_mean = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"There is no recipe '{name}'.{did_you_mean} There are: {', '.join(known)}.")
    return parse(name, (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Recipe:
    """A recipe from its YAML text.

    Raises:
        UsageError: it has a key that means nothing, or lacks one.
    """
    try:
        content = bounded_yaml.load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe {name} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"The recipe {name} holds no options.")
    _check_keys(name, "key", content, _KEYS)
    missing = _NEEDED - set(content)
    if missing:
        raise UsageError(f"The recipe {name} has no '{sorted(missing)[0]}'.")
    differing = [content.get(key, {}).values() for key in ("for_students", "for_teachers")]
    for options in [content["options"], *chain.from_iterable(differing)]:
        _check_keys(name, "option", options, Options.model_fields)
    return Recipe(
        name=name,
        about=content["about"],
        source=content["source"],
        options=content["options"],
        for_students=content.get("for_students", {}),
        for_teachers=content.get("for_teachers", {}),
    )


def _check_keys(name: str, what: str, found: Collection[str], known: Collection[str]) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}."
            raise UsageError(f"The recipe {name} has an unknown {what} '{key}'; {advice}")


def _with(options: Mapping[str, Any], differing: Mapping[str, Any]) -> dict[str, Any]:
    """Options with others over them; of mappings (settings, weight) each entry for itself."""
    merged = dict(options)
    for key, value in differing.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged


def _is_recipe(name: str) -> bool:
    return name.endswith(".yaml")
