"""The run folder: which stages are done, what they left, and what it came from."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import curves
from ..config_file import FILE, read_config
from ..errors import JobError, UsageError
from .files import digest, remove, sha256, unwritable, write_text
from ..lock import locked, refuse_locked
from ..option_changes import differences
from .record import RECORD, SCHEMA_VERSION, read_record, write_record
from ..config.stages import stages_of_config

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """What a stage leaves: files in the run folder, its part of the report, and one line to show."""

    summary: str
    outputs: Sequence[str] = ()
    """Paths inside the run folder; a folder stands for all files below it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """A part of the report; see ``stages.report``."""


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
        file = self.path / RECORD
        if not self.writes:
            if not file.exists():
                raise UsageError(
                    f"--out {self.path} is not the folder that rank 0 has made: name one on a file system "
                    "that all machines share."
                )
            self.record = read_record(self.path)
            return
        self.check()
        self._make()
        if file.exists():
            for left in self.path.rglob(".*.part"):  # by a process that was killed
                remove(left)
        if fresh:
            self.save()
            self.drop_checkpoints("")
            self.metrics.unlink(missing_ok=True)
        elif file.exists():
            self.record = read_record(self.path)
            self._mend_curves()

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
            raise self._unwritable(error.strerror) from error

    def _unwritable(self, why: str | None) -> UsageError:
        return UsageError(f"--out {self.path} cannot be written: {why}; name another folder.")

    def look(self, config: Mapping[str, Any], *, fresh: bool) -> None:
        """Refuse what a run with these options would refuse before its first stage, and write nothing.

        Raises:
            UsageError: the folder cannot be made or written, or holds something else or other options.
            JobError: another process is at work in it.
        """
        self.check()
        if (why := unwritable(self.path)) is not None:
            raise self._unwritable(why)
        refuse_locked(self.path)
        if not fresh and (self.path / RECORD).exists():
            self.record = read_record(self.path)
            self.refuse_other_options(config)
        self.record["config"] = dict(config)

    def check(self) -> None:
        """
        Raises:
            UsageError: the path is a file, or holds something other than a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file; name a folder, new or of an earlier run.")
        if not self.path.exists() or (self.path / RECORD).exists():
            return
        if any(p for p in self.path.iterdir() if p.name != FILE and not p.name.startswith(".")):
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

    def asked(self, until: str | None) -> tuple[str, ...]:
        """The stages up to that one, or all."""
        return self.stages[: self.stages.index(until) + 1 if until else None]

    def left(self, until: str | None) -> list[str]:
        """Those of them of which the record does not say that they are done."""
        return [stage for stage in self.asked(until) if stage not in self.record["stages"]]

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def options(self) -> dict[str, Any]:
        """All of the run's options, as far as they belong into a config.yaml.

        Raises:
            UsageError: it is an older run, and its config.yaml cannot be read.
        """
        known = self.record.get("options")
        return dict(known) if known is not None else read_config(self.path)

    def curves(self) -> list[str]:
        """The lines of metrics.jsonl in the order of the stages, of those that are done as they were then."""
        there = curves.by_stage(curves.read(self.metrics), self.stages)
        for stage, entry in self.record["stages"].items():
            there[stage] = entry.get("curve", there.get(stage, []))  # older ones have none
        return [line for stage in (*self.stages, None) for line in there[stage]]

    def _mend_curves(self) -> None:
        known = {line for stage in self.record["stages"].values() for line in stage.get("curve", ())}
        if known - set(curves.read(self.metrics)):
            _log.warning("%s was damaged: the curves of stages that are done are written anew.", self.metrics)
            write_text(self.metrics, "\n".join(self.curves()) + "\n")

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
        changes = differences(before, config)
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
        self.record["options"] = dict(options)
        if not self.writes:
            return
        write_text(self.path / FILE, yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
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
        if entry is None or entry["key"] != key or not self._as_left(entry):
            return None
        return Done(entry["summary"], list(entry["outputs"]), entry["facts"])

    def _as_left(self, entry: Mapping[str, Any]) -> bool:
        files = ((self.path / name, sum) for name, sum in entry["outputs"].items())
        return all(file.is_file() and sha256(file) == sum for file, sum in files)

    def check_left(self, name: str) -> None:
        """
        Raises:
            JobError: a file of the run is not as its stage has left it.
        """
        file = self.path / name
        outputs = (entry["outputs"] for entry in self.record["stages"].values())
        left = {one: sum for entry in outputs for one, sum in entry.items()}
        if name in left and file.is_file() and sha256(file) != left[name]:
            raise JobError(
                f"{file} is not as the run has left it: repeat the command that began the run, which makes "
                "it anew."
            )

    def finish(self, stage: str, key: str, done: Done, seconds: float, warnings: Sequence[str]) -> None:
        """Record a stage as done; what later stages left is forgotten, unless it is all there and the very
        same files are back that it was made from.
        """
        stages = self.record["stages"]
        files = [file for name in done.outputs for file in self._files(self.path / name)]
        outputs = {file.relative_to(self.path).as_posix(): sha256(file) for file in files}
        before = stages.get(stage)
        follows = before is not None and (before["key"], before["outputs"]) == (key, outputs)
        for later in self.stages[self.stages.index(stage) + 1 :]:
            follows = follows and later in stages and self._as_left(stages[later])
            if not follows:
                stages.pop(later, None)
        stages[stage] = {
            "key": key,
            "summary": done.summary,
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outputs": outputs,
            "warnings": list(warnings),
            "curve": curves.by_stage(curves.read(self.metrics), [stage])[stage],
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
            write_record(self.path, self.record)


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
