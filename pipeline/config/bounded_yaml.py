"""Read YAML from users: plain values only, with limits on size, depth and aliases."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 1_000_000

MAX_VALUES = 20_000
"""Values with aliases expanded: ten aliases of ten aliases are a hundred values."""

MAX_DEPTH = 20


def read_yaml(path: Path) -> Any:
    """Return the document in a UTF-8 file.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        yaml.YAMLError: see ``parse_yaml``.
    """
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


def _check_unique(keys: Iterable[str]) -> None:
    """Reject repeated keys, which YAML forbids and PyYAML accepts."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise yaml.YAMLError(f"it contains {key[:60]!r} twice")
        seen.add(key)


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
            _check_unique(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        counts[id(node)] = 1 + sum(_count_values(child, counts, parents | {id(node)}) for child in children)
    return counts[id(node)]
