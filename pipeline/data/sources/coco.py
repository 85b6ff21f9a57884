"""Labels in COCO annotation files."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..dataset import printable
from .label_tables import Row, read_text

LISTS = ("images", "annotations", "categories")

# The keys that are kept while a file is parsed; half a gigabyte of COCO is mostly outlines.
_KEYS = frozenset((*LISTS, "id", "file_name", "name", "image_id", "category_id"))


def read_coco(path: Path) -> tuple[list[Row], list[str]]:
    """Return the images with the names of their categories, and all categories in the order of their ids.

    An image without annotations has no categories.

    Raises:
        UsageError: the file is not a COCO annotations file, or refers to images or categories it lacks.
    """
    name = printable(path.name)
    try:
        content = json.loads(read_text(path), object_hook=_keep)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}.") from error
    lists = {key: content.get(key) if isinstance(content, dict) else None for key in LISTS}
    if not all(isinstance(entries, list) for entries in lists.values()):
        raise UsageError(
            f"{name} is not a COCO annotations file, which contains the lists {', '.join(LISTS)}. Other "
            "labels files are .csv or .jsonl."
        )
    categories = _index(name, "categories", "name", lists["categories"])
    names = {number: printable(category) for number, category in categories.items()}
    if len(set(names.values())) < len(names):
        repeated = next(label for label in names.values() if list(names.values()).count(label) > 1)
        raise UsageError(f"{name} has two categories named '{repeated}'. Rename one of them.")
    files = _index(name, "images", "file_name", lists["images"])
    labels: dict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        image, category = (
            annotation.get(key) if isinstance(annotation, dict) else None
            for key in ("image_id", "category_id")
        )
        has_image = isinstance(image, int) and image in files
        if not has_image or not isinstance(category, int) or category not in names:
            missing = printable(f"category {category}" if has_image else f"image {image}")[:80]
            raise UsageError(f"{name} has an annotation of {missing}, which it does not list.")
        labels[image].add(category)
    if not labels:
        raise UsageError(f"{name} has no annotations to learn from.")
    rows = [
        Row(file, tuple(names[c] for c in sorted(labels.get(number, ()))), None, f"image {number}")
        for number, file in files.items()
    ]
    return rows, [names[number] for number in sorted(names)]


def _keep(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in _KEYS & entry.keys()}


def _index(name: str, part: str, key: str, entries: Any) -> dict[int, str]:
    """Return the entries' ``key`` by id."""
    values: dict[int, str] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UsageError(f"{name}: an entry of {part} lacks a number 'id' or a string '{key}'.")
        if number in values:
            raise UsageError(f"{name}: two entries of {part} have the id {number}.")
        values[number] = entry[key].strip()
    return values
