"""Read COCO annotations, as boxes or as labels of whole images."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..boxes import NamedBox
from ..dataset import printable
from .label_rows import Row, clean_label, read_text

COCO_LISTS = ("images", "annotations", "categories")

# The keys that are kept while a file is parsed; half a gigabyte of COCO is mostly outlines.
_COCO_KEYS = frozenset((*COCO_LISTS, "id", "file_name", "name", "image_id", "category_id"))
_BOX_KEYS = frozenset(("height", "width", "bbox", "area", "iscrowd"))

Id = int | str


def read_coco(path: Path, *, with_boxes: bool = False) -> tuple[list[Row], list[str], list[str]]:
    """Return the images with the names of their categories, and the names with and without annotations by id.

    An image without annotations has no categories. ``with_boxes`` adds the boxes of the annotations.

    Raises:
        UsageError: the file is not a COCO annotations file, or refers to images or categories it lacks.
    """
    name = printable(path.name)
    kept = _COCO_KEYS | _BOX_KEYS if with_boxes else _COCO_KEYS
    try:
        content = json.loads(
            read_text(path), object_hook=lambda entry: {key: entry[key] for key in kept & entry.keys()}
        )
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}.") from error
    lists = {key: content.get(key) if isinstance(content, dict) else None for key in COCO_LISTS}
    if not all(isinstance(entries, list) for entries in lists.values()):
        raise UsageError(
            f"{name} is not a COCO annotations file, which contains the lists {', '.join(COCO_LISTS)}. Other "
            "labels files are .csv or .jsonl."
        )
    categories = _index(name, "categories", "name", lists["categories"])
    names = {number: clean_label(category) for number, category in categories.items()}
    files = _index(name, "images", "file_name", lists["images"])
    labels: dict[Id, set[Id]] = defaultdict(set)
    boxes: dict[Id, list[NamedBox]] = defaultdict(list)
    for annotation in content["annotations"]:
        given = [
            annotation.get(key) if isinstance(annotation, dict) else None
            for key in ("image_id", "category_id")
        ]
        image, category = map(_parse_id, given)
        if image not in files or category not in names:
            missing = f"category {given[1]}" if image in files else f"image {given[0]}"
            raise UsageError(
                f"{name} has an annotation of {printable(missing)[:80]}, which it does not list."
            )
        labels[image].add(category)
        if with_boxes:
            boxes[image].append(_parse_box(names[category], annotation))
    if not labels:
        raise UsageError(f"{name} has no annotations to learn from.")
    ordered = sorted(names, key=lambda number: (isinstance(number, str), number))
    annotated = set().union(*labels.values())
    used = [names[number] for number in ordered if number in annotated]
    if len(set(used)) < len(used):
        repeated = next(label for label in used if used.count(label) > 1)
        raise UsageError(f"{name} has two categories named '{repeated}'. Rename one of them.")
    rank = {number: position for position, number in enumerate(ordered)}.__getitem__
    sizes = [_parse_size(entry) if with_boxes else None for entry in content["images"]]
    rows = [
        Row(
            file,
            tuple(names[c] for c in sorted(labels.get(number, ()), key=rank)),
            None,
            f"image {number}",
            tuple(boxes.get(number, ())) if with_boxes else None,
            size,
        )
        for (number, file), size in zip(files.items(), sizes, strict=True)
    ]
    return rows, used, [names[number] for number in ordered if number not in annotated]


def _parse_box(name: str, annotation: Mapping[str, Any]) -> NamedBox:
    """Return an annotation's box; NaN for what is not a number."""
    values = annotation.get("bbox")
    numbers = [_parse_number(v) for v in values] if isinstance(values, list) and len(values) == 4 else []
    left, top, width, height = numbers or [math.nan] * 4
    area = _parse_number(annotation.get("area"))
    return NamedBox(name, left, top, left + width, top + height, area, bool(annotation.get("iscrowd")))


def _parse_size(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the height and width of an image, None if they are not positive numbers."""
    size = _parse_number(entry.get("height")), _parse_number(entry.get("width"))
    return size if all(0 < side < math.inf for side in size) else None


def _parse_number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.inf


def _parse_id(value: Any) -> Id | None:
    """Return the number of ``7``, ``7.0`` and ``"7"``, any other text as it is, and None for other values."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        number = re.fullmatch(r"(0|-?[1-9][0-9]{0,17})(?:[.]0+)?", value.strip())
        return int(number[1]) if number else value.strip() or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _index(name: str, part: str, key: str, entries: Any) -> dict[Id, str]:
    """Return the entries' ``key`` by id."""
    values: dict[Id, str] = {}
    for entry in entries:
        number = _parse_id(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UsageError(f"{name}: an entry of {part} lacks an 'id' or a string '{key}'.")
        if number in values:
            raise UsageError(f"{name}: two entries of {part} have the id {printable(str(number))[:80]}.")
        values[number] = entry[key].strip()
    return values
