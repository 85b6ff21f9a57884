"""A run's ``config.yaml``: its options, to be read by people and given to other runs."""

from pathlib import Path
from typing import Any

import yaml

from .config import bounded_yaml
from .errors import UsageError
from .runs.record import read_record

FILE = "config.yaml"

MOVED = ("data", "data_dir")
"""Options that may be changed by hand: images can come to lie elsewhere."""


def read_config(run: Path) -> dict[str, Any]:
    """The options of a run, as its config.yaml has them.

    Raises:
        UsageError: the file is not there, holds no options, or others than the run was made with.
    """
    file = run / FILE
    try:
        content = bounded_yaml.read(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} cannot be read as a run's options ({' '.join(str(error).split())})."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds no options.")
    known = read_record(run).get("options", content)  # older ones have none
    changed = [
        str(name)
        for name in {**known, **content}
        if name not in known or name not in content or (content[name] != known[name] and name not in MOVED)
    ]
    if changed:
        raise UsageError(
            f"{file} is not as the run has left it ({', '.join(changed[:3])}): repeat the command that began "
            "the run, which writes it anew."
        )
    return content
