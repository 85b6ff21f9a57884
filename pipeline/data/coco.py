"""COCO's annotations: which categories an image shows. Boxes and masks are passed over."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .dataset import printable
from .label_rows import Row, read_text

# Of a file of half a gigabyte that is mostly outlines, what we keep while it is read.
_KEPT = frozenset(
    ("images", "annotations", "categories", "id", "file_name", "name", "image_id", "category_id")
)


def read_coco(path: Path) -> tuple[list[Row], list[str]]:
    """The images with the names of their categories (an image without annotations has none), and the names of
    all categories in the order of their numbers.

    Raises:
        UsageError: the file is no COCO annotations file, or names what it does not hold.
    """
    name = printable(path.name)
    try:
        content = json.loads(read_text(path), object_hook=_kept)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {error}.") from error
    parts = {part: content.get(part) if isinstance(content, dict) else None for part in _PARTS}
    if not all(isinstance(part, list) for part in parts.values()):
        raise UsageError(
            f"{name} is no COCO annotations file, which has lists of {', '.join(_PARTS)}; a labels file of "
            "another kind is a .csv or .jsonl."
        )
    categories = _by_number(name, "categories", "name", parts["categories"])
    names = {number: printable(one) for number, one in categories.items()}
    if len(set(names.values())) < len(names):
        twice = next(one for one in names.values() if list(names.values()).count(one) > 1)
        raise UsageError(f"{name} has two categories named '{twice}'; give each a name of its own.")
    files = _by_number(name, "images", "file_name", parts["images"])
    shown: dict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        image, category = (
            annotation.get(key) if isinstance(annotation, dict) else None
            for key in ("image_id", "category_id")
        )
        known = isinstance(image, int) and image in files
        if not known or not isinstance(category, int) or category not in names:
            missing = printable(f"category {category}" if known else f"image {image}")[:80]
            raise UsageError(f"{name} has an annotation of {missing}, which it does not list.")
        shown[image].add(category)
    if not shown:
        raise UsageError(f"{name} has no annotations; there is nothing to learn from it.")
    rows = [
        Row(file, tuple(names[c] for c in sorted(shown.get(number, ()))), None, f"image {number}")
        for number, file in files.items()
    ]
    return rows, [names[number] for number in sorted(names)]


_PARTS = ("images", "annotations", "categories")


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in _KEPT & entry.keys()}


def _by_number(name: str, part: str, key: str, entries: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UsageError(f"{name}: one of its {part} has no number 'id' or no '{key}'.")
        if number in found:
            raise UsageError(f"{name}: two of its {part} have the id {number}.")
        found[number] = entry[key].strip()
    return found
