"""Recognize names of splits, such as ``train``, ``training_set``, ``train_images`` and ``train2017``."""

import re
from collections import defaultdict
from collections.abc import Iterable

from ..dataset import SPLITS, Split

SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_FILLERS = (
    "set",
    "split",
    "data",
    "dataset",
    "image",
    "images",
    "img",
    "imgs",
    "photos",
    "pictures",
    "files",
)
_COMPOUNDS = {word + more: split for word, split in SPLIT_WORDS.items() for more in ("", *_FILLERS)}


def parse_split(name: str) -> Split | None:
    """Return the split that a name means by itself, None for any other name."""
    split, rest = _parse(name)
    return None if rest else split


def find_splits(names: Iterable[str]) -> dict[str, Split]:
    """Return the names of splits among ``names``, in the order of ``SPLITS``.

    Names may share further words, such as ``seg_train`` and ``seg_test``; one of them must then be of train.
    """
    groups: dict[tuple[str, ...], dict[str, Split]] = defaultdict(dict)
    for name in names:
        split, rest = _parse(name)
        if split is not None:
            groups[rest][name] = split
    for rest, group in sorted(groups.items()):
        if not rest or {"train"} < set(group.values()):
            return dict(sorted(group.items(), key=lambda item: SPLITS.index(item[1])))
    return {}


def _parse(name: str) -> tuple[Split | None, tuple[str, ...]]:
    """Return the split that is one of the words of a name, and the words besides it and fillers."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    splits = [_COMPOUNDS[word] for word in words if word in _COMPOUNDS]
    rest = tuple(word for word in words if word not in _COMPOUNDS and word not in _FILLERS)
    return (splits[0] if len(splits) == 1 else None), rest
