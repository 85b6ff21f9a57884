"""Recipes from papers: hyperparameters in YAML files, with their source.

A file contains ``about``, ``source`` and ``options``. If a paper has other values for some networks, it also
contains ``for_students`` and ``for_teachers``: shell patterns of timm names with the options that differ.
``extends`` names a file whose options it adds to or replaces; names of such files start with an underscore.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

import yaml

from ....models.build import resolve
from ....models.errors import UnknownModel
from ...errors import UsageError
from ..limits import parse_yaml
from ..options import Options

REQUIRED_KEYS = {"about", "source", "options"}
KEYS = REQUIRED_KEYS | {"extends", "for_students", "for_teachers"}


@dataclass(frozen=True)
class Recipe:
    """A paper's hyperparameters."""

    name: str
    about: str
    source: str
    options: Mapping[str, Any]
    for_students: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    for_teachers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_pair(self, teachers: Sequence[str], student: str) -> dict[str, Any]:
        """Return the options for these networks."""
        options = dict(self.options)
        for patterns, names in ((self.for_students, [student]), (self.for_teachers, teachers)):
            for pattern, overrides in patterns.items():
                if any(fnmatchcase(_full_name(name), pattern) for name in names):
                    for key, value in overrides.items():  # settings and weights are merged key by key
                        merges = isinstance(value, Mapping)
                        options[key] = {**options.get(key, {}), **value} if merges else value
        return options

    def changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a run's config that differ from the recipe."""
        changed: dict[str, Any] = {}
        for name, value in self.for_pair(config["teacher"], config["student"]).items():
            if isinstance(value, Mapping):
                settings = config.get(name) or {}
                changed |= {key: settings.get(key) for key in value if settings.get(key) != value[key]}
            elif config.get(name) != value:
                changed[name] = config.get(name)
        return changed


def _full_name(name: str) -> str:
    """Return timm's name of a network, or the name itself if its module is not imported here."""
    try:
        return resolve(name)
    except UnknownModel:
        return name


def list_recipes() -> list[str]:
    """Return the names of all recipes in alphabetical order."""
    names = [file.name for file in files(__package__).iterdir() if not file.name.startswith("_")]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Return a recipe by name, or raise UsageError."""
    names = list_recipes()
    if name not in names:
        near = get_close_matches(name, names, n=2, cutoff=0.3)
        advice = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"Unknown recipe '{name}'.{advice} Available recipes: {', '.join(names)}.")
    return parse_recipe(name, _read(name))


def _read(name: str) -> str:
    return (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def parse_recipe(name: str, text: str) -> Recipe:
    """Return a recipe from its YAML text.

    Raises:
        UsageError: it is not YAML, has an unknown key or option, or lacks a key.
    """
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe {name} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"The recipe {name} does not contain options.")
    _check_known(name, "key", content, KEYS)
    if missing := REQUIRED_KEYS - set(content):
        raise UsageError(f"The recipe {name} has no '{min(missing)}'.")
    if "extends" in content:
        for key, options in parse_yaml(_read(content.pop("extends"))).items():
            content[key] = {**options, **content.get(key, {})}
    recipe = Recipe(name, **content)
    for options in [recipe.options, *recipe.for_students.values(), *recipe.for_teachers.values()]:
        _check_known(name, "option", options, Options.model_fields)
    return recipe


def _check_known(name: str, what: str, keys: Collection[str], available: Collection[str]) -> None:
    for key in keys:
        if key not in available:
            near = get_close_matches(key, available, n=1)
            advice = f"Did you mean {near[0]}?" if near else f"Available: {', '.join(sorted(available))}."
            raise UsageError(f"The recipe {name} has an unknown {what} '{key}'. {advice}")
