"""What a run folder was made with and what is asked for now, told by the names that people know."""

import json
from collections.abc import Mapping
from typing import Any

from .config.options import Options, group

_NAMES = {"data_content": "the data's images"}


def differences(before: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What has changed, such as ``epochs was 12, now 13``; options of export don't count, since what is made
    of the student is cheap: with others of that kind it is made anew.
    """
    was, now = (
        _single({name: value for name, value in one.items() if not _of_export(name)})
        for one in (before, config)
    )
    return [
        f"{name} was {_short(was.get(name))}, now {_short(now.get(name))}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]


def _of_export(name: str) -> bool:
    return name in Options.model_fields and group(name) == "Export"


def _single(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names the user knows, each setting of a method for itself."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"weight {name}" if key == "weight" else name: one for name, one in value.items()}
        else:
            found[_NAMES.get(key, key.replace("_", "-"))] = value
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
