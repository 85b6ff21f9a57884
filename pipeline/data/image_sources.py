"""Where encoded images lie, read when they are wanted: small objects that travel to workers."""

import hashlib
import pickle
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """``size`` bytes of a file from ``offset`` on: a member of a tar file, say."""

    file: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        """
        Raises:
            OSError: the file cannot be read, or is shorter than it was.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.file.name} is shorter than it was")
        return content


class Table:
    """A reader of timm's that gives (file, label) by number, such as that of Hugging Face's data sets.

    It is pickled once and opened once in each process: its rows travel with every batch, it does not.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def read(self, row: int) -> bytes:
        content, _ = self.reader[row]
        with content:
            found: bytes = content.read()
            return found

    @cached_property
    def _pickled(self) -> tuple[str, "_Once"]:
        content = pickle.dumps(self.reader)
        return hashlib.sha256(content).hexdigest(), _Once(content)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, self._pickled


@dataclass(frozen=True)
class _Once:
    """Equal to any other, so that a table is known by its hash alone."""

    pickled: bytes = field(compare=False, hash=False, repr=False)


@lru_cache(maxsize=8)
def _opened(_: str, once: _Once) -> Table:
    return Table(pickle.loads(once.pickled))


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    table: Table
    row: int

    def __call__(self) -> bytes:
        return self.table.read(self.row)
