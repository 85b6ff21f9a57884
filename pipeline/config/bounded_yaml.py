"""YAML from a user's file: plain values alone, and no more of them than an options file could hold."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1_000_000
"""Characters."""

MOST_VALUES = 20_000
"""Values, those that aliases repeat counted each time: ten aliases of ten aliases are a hundred."""

DEEPEST = 20
"""Lists and mappings inside each other."""


def read(path: Path) -> Any:
    """The one document in a file, UTF-8.

    Raises:
        OSError: it cannot be read; UnicodeDecodeError: it is no text; yaml.YAMLError: as for ``load``.
    """
    with path.open("rb") as file:
        content = file.read(4 * LARGEST + 1)  # a character has four bytes at most
    return load(content.decode("utf-8"))


def load(text: str) -> Any:
    """The one document in ``text``.

    Raises:
        yaml.YAMLError: it is not YAML, has a tag that is no plain value's, or is too large or too deep.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {LARGEST:,}")
    depth = 0
    # Events come one by one, whatever the depth; to compose nodes is to recurse.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return None
    values = _values(root, {}, set())
    if values > MOST_VALUES:
        raise yaml.YAMLError(
            f"it has {values:,} values with those that aliases repeat, more than {MOST_VALUES:,}"
        )
    try:
        return yaml.SafeLoader("").construct_document(root)
    except (ValueError, OverflowError) as error:  # a day or a number that there is none of
        raise yaml.YAMLError(f"it has a value that is none ({error})") from error


def _refuse_twice(keys: Iterable[str]) -> None:
    """YAML forbids it, and its reader takes the last without a word."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise yaml.YAMLError(f"it says {key[:60]!r} twice")
        seen.add(key)


def _values(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """How many values a node holds, itself included; each node is counted once and remembered."""
    if id(node) in above:
        raise yaml.YAMLError("an alias in it contains itself")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
            _refuse_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        known[id(node)] = 1 + sum(_values(one, known, above | {id(node)}) for one in inner)
    return known[id(node)]
