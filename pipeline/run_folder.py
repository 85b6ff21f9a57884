"""The run folder: which stages are done, what they left, and what it came from."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import bounded_yaml
from .errors import UsageError
from .files import digest, remove, sha256, write_json, write_text
from .lock import locked
from .options import Options, group
from .rounds import stages_of_config

SCHEMA_VERSION = 1
_NAMES = {"data_content": "the data's images"}


@dataclass(frozen=True)
class Done:
    """What a stage leaves: files in the run folder, its part of the report, and one line to show."""

    summary: str
    outputs: Sequence[str] = ()
    """Paths inside the run folder; a folder stands for all files below it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """A part of the report; see ``stages.report``."""


def read_config(run: Path) -> dict[str, Any]:
    """The options of a run, as its config.yaml has them.

    Raises:
        UsageError: the file is not there, or holds no options.
    """
    file = run / "config.yaml"
    try:
        content = bounded_yaml.read(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} cannot be read as a run's options ({' '.join(str(error).split())})."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds no options.")
    return content


class RunFolder:
    """One run's folder. ``run.json`` is written anew, whole, after every stage."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """``writes``: whether this process writes it; of several ranks one does."""
        self.path = path
        self.writes = writes
        self.record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "stages": {}}

    def open(self, *, fresh: bool) -> None:
        """Make the folder where there is none, and read what it holds.

        Raises:
            UsageError: the path is a file, cannot be written, or holds something other than a run.
        """
        file = self.path / "run.json"
        if not self.writes:
            if not file.exists():
                raise UsageError(
                    f"--out {self.path} is not the folder that rank 0 has made: name one on a file system "
                    "that all machines share."
                )
            self.record = self._read(file)
            return
        self.check()
        self._make()
        if file.exists():
            self.record = self._read(file)
            for kind in ("part", "old"):  # left by a process that was killed
                for left in self.path.rglob(f".*.{kind}"):
                    remove(left)
        if fresh:
            self.record["stages"] = {}
            for choices in ("engines", "micro_batches", "resident"):
                self.record.pop(choices, None)
            self.save()
            self.drop_checkpoints("")
            self.metrics.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that writes here, as long as the block runs; one that does not write may come.

        Raises:
            UsageError: the folder cannot be made or written.
            JobError: another process is at work in it.
        """
        if not self.writes:
            yield
            return
        self.check()
        self._make()
        with locked(self.path):
            yield

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"--out {self.path} cannot be written: {error.strerror}; name another folder."
            ) from error

    def check(self) -> None:
        """
        Raises:
            UsageError: the path is a file, or holds something other than a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file; name a folder, new or of an earlier run.")
        if not self.path.exists() or (self.path / "run.json").exists():
            return
        if any(p for p in self.path.iterdir() if p.name != "config.yaml" and not p.name.startswith(".")):
            raise UsageError(
                f"--out {self.path} holds other files and no run; name an empty or a new folder."
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The run's stages, in order."""
        return stages_of_config(self.record.get("config", {}))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def drop_checkpoints(self, stage: str) -> None:
        """Remove the checkpoints of a stage that is done."""
        for checkpoint in self.checkpoints.glob(f"{stage}*.pt"):
            checkpoint.unlink()

    def refuse_other_options(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UsageError: the folder was made with other options than those of export; the sentence names them.
        """
        before = self.record.get("config")
        if not self.record["stages"] or before is None:
            return
        # What is made of the student is cheap: with other options of that kind it is made anew.
        was, now = (
            _single({name: value for name, value in one.items() if not _of_export(name)})
            for one in (before, config)
        )
        changes = [
            f"{name} was {_short(was.get(name))}, now {_short(now.get(name))}"
            for name in sorted({*was, *now})
            if was.get(name) != now.get(name)
        ]
        if not changes:
            return
        raise UsageError(
            f"{self.path} holds a run with other options: {'; '.join(changes)}. "
            "Name another --out, repeat its options, or start it over with --fresh."
        )

    def begin(self, config: Mapping[str, Any], options: Mapping[str, Any], command: str) -> None:
        """Record what is about to run: ``config`` is what enters the stages' hashes, ``options`` is all."""
        self.record["config"] = dict(config)
        self.record["command"] = command
        if not self.writes:
            return
        write_text(
            self.path / "config.yaml", yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
        )
        self.save()

    def key(self, stage: str, config: Mapping[str, Any]) -> str:
        """The hash of all that a stage's result depends on: its options and what the stage before left."""
        index = self.stages.index(stage)
        before = self.record["stages"].get(self.stages[index - 1]) if index else None
        upstream = {"key": before["key"], "outputs": before["outputs"]} if before else None
        return digest(
            {"stage": stage, "schema": SCHEMA_VERSION, "options": dict(config), "upstream": upstream}
        )

    def finished(self, stage: str, key: str) -> Done | None:
        """What the stage left, if it ran for this key and its files are as it left them."""
        entry = self.record["stages"].get(stage)
        if entry is None or entry["key"] != key:
            return None
        for name, sum in entry["outputs"].items():
            file = self.path / name
            if not file.is_file() or sha256(file) != sum:
                return None
        return Done(entry["summary"], list(entry["outputs"]), entry["facts"])

    def finish(self, stage: str, key: str, done: Done, seconds: float, warnings: Sequence[str]) -> None:
        """Record a stage as done; what later stages left no longer follows from it and is forgotten."""
        stages = self.record["stages"]
        for later in self.stages[self.stages.index(stage) + 1 :]:
            stages.pop(later, None)
        files = [file for name in done.outputs for file in self._files(self.path / name)]
        stages[stage] = {
            "key": key,
            "summary": done.summary,
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outputs": {file.relative_to(self.path).as_posix(): sha256(file) for file in files},
            "warnings": list(warnings),
            "facts": done.facts,
        }
        self.save()

    def facts(self) -> dict[str, Any]:
        """What the stages that are done have found, put together: a part of the report."""
        merged: dict[str, Any] = {}
        for stage in self.stages:
            entry = self.record["stages"].get(stage)
            if entry is not None:
                merged = _merged(merged, entry["facts"])
        return merged

    def _files(self, path: Path) -> list[Path]:
        return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]

    def save(self) -> None:
        if self.writes:
            write_json(self.path / "run.json", self.record)

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{file} cannot be read as a run's record ({error}); name another --out."
            ) from error
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{file} was not written by this version of questpress; name another --out.")
        return record


def _of_export(name: str) -> bool:
    return name in Options.model_fields and group(name) == "Export"


def _merged(known: Any, more: Any) -> Any:
    """Mappings are united, lists of mappings element by element; anything else is replaced."""
    if isinstance(known, Mapping) and isinstance(more, Mapping):
        return {
            **known,
            **{key: _merged(known[key], value) if key in known else value for key, value in more.items()},
        }
    if isinstance(known, list) and isinstance(more, list) and len(known) == len(more):
        return [_merged(a, b) for a, b in zip(known, more, strict=True)]
    return more


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
