"""Limits on user input: option values, and the size and depth of YAML files."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30
"""Absolute values of nonzero floats: the range of float32, with room for a product."""

MAX_THREADS = 1024
"""Threads of ONNX Runtime, as in ``export.runtime``, which imports numpy."""

MAX_INTEGER = 2**32 - 1
"""The largest seed of the random number generators."""


MAX_CHARACTERS = 1_000_000
"""Characters of a YAML file."""

MAX_VALUES = 20_000
"""Values with aliases expanded: ten aliases of ten aliases are a hundred values."""

MAX_DEPTH = 20


def check_limits(value: Any) -> Any:
    """Return an option's value; ValueError if it contains too large a number or a text without encoding."""
    parts = value.values() if isinstance(value, Mapping) else value
    for part in parts if isinstance(value, Mapping | list | tuple) else [value]:
        if isinstance(part, float) and part and not MIN_FLOAT <= abs(part) <= MAX_FLOAT:
            raise ValueError(f"must be 0 or from {MIN_FLOAT:g} to {MAX_FLOAT:g}")
        if isinstance(part, int) and abs(part) > MAX_INTEGER:
            raise ValueError(f"must be at most {MAX_INTEGER}")
        if isinstance(part, str | Path):
            try:
                os.fsencode(str(part))  # accepts the surrogates of file names that are not UTF-8
            except UnicodeEncodeError as error:
                raise ValueError("must not contain half a character (a lone surrogate)") from error
    return value


def check_not_boolean(value: Any, annotation: Any) -> Any:
    """Return an option's value, with YAML's booleans ``on`` and ``off`` as text if these are choices.

    Raises:
        ValueError: the value is a boolean, which Python accepts as 0 or 1, and the option is not.
    """
    if not isinstance(value, bool) or annotation is bool or bool in get_args(annotation):
        return value
    choices = {choice for part in (annotation, *get_args(annotation)) for choice in get_args(part)}
    if (choice := "on" if value else "off") in choices:
        return choice
    raise ValueError("must not be yes or no")


def read_yaml(path: Path) -> Any:
    """Return the document in a UTF-8 file, or raise OSError, UnicodeDecodeError or yaml.YAMLError."""
    with path.open("rb") as file:
        content = file.read(4 * MAX_CHARACTERS + 1)  # a character has at most four bytes
    return parse_yaml(content.decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """Return the document in a text.

    Raises:
        yaml.YAMLError: it is not YAML, contains other than plain values, or is too large or too deep.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    depth = 0
    # Parsing yields events one by one at any depth; composing nodes is recursive.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return None
    values = _count_values(root, {}, set())
    if values > MAX_VALUES:
        raise yaml.YAMLError(f"it has {values:,} values with aliases expanded, more than {MAX_VALUES:,}")
    try:
        return yaml.SafeLoader("").construct_document(root)
    except (ValueError, OverflowError) as error:  # an impossible date or number
        raise yaml.YAMLError(f"it has an invalid value ({error})") from error


def _count_values(node: yaml.Node, counts: dict[int, int], parents: set[int]) -> int:
    """Return the number of values in a node, itself included; ``counts`` are the results by node."""
    if id(node) in parents:
        raise yaml.YAMLError("an alias in it contains itself")
    if id(node) not in counts:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if repeated := [key for key, count in keys.items() if count > 1]:  # PyYAML accepts them
                raise yaml.YAMLError(f"it contains {repeated[0][:60]!r} twice")
        counts[id(node)] = 1 + sum(_count_values(child, counts, parents | {id(node)}) for child in children)
    return counts[id(node)]
