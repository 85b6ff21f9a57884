"""What fuzz.py feeds to the readers of options and records: YAML, JSON, runs, the store."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path


def yaml_text(_work: Path) -> Callable[[bytes], None]:
    import yaml
    from questpress.pipeline.config import bounded_yaml

    def read(content: bytes) -> None:
        try:
            bounded_yaml.load(content.decode("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return

    return read


def json_text(_work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.runs import record

    def read(content: bytes) -> None:
        with contextlib.suppress(ValueError):
            record.parse_json(content.decode("utf-8"))

    return read


def run_seeds() -> list[bytes]:
    stage = {"key": "k", "summary": "s", "seconds": 1.0, "outputs": {}, "warnings": [], "facts": {}}
    record = {"schema_version": 1, "stages": {"teacher": stage}, "config": {"rounds": 2}, "command": "c"}
    return [json.dumps(record).encode()]


def run(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.errors import UsageError
    from questpress.pipeline.runs.folder import RunFolder

    def read(content: bytes) -> None:
        (work / "run.json").write_bytes(content)
        try:
            RunFolder(work, writes=False).open(fresh=False)
        except UsageError:
            return

    return read


def store_seeds() -> list[bytes]:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.arange(6, dtype=np.float16).reshape(2, 3))
    return [buffer.getvalue()]


def store(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.runs.cache import CHECKSUMS, Cache

    cache = Cache(work / "cache")

    def write(folder: Path) -> None:
        (folder / "logits.npy").write_bytes(store_seeds()[0])

    def read(content: bytes) -> None:
        entry = cache.put("answers", "key", write)
        # The checksums are what a damaged or edited entry is found by.
        (entry / CHECKSUMS).write_bytes(content)
        place = cache.get("answers", "key")
        assert place is None or (place / "logits.npy").read_bytes() == store_seeds()[0]

    return read
