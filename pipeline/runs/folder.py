"""The run folder: which stages are done, what they left, and what it came from."""

from pathlib import Path
from typing import Any
import yaml
from ...export.files import remove
from ..config import bounded_yaml
from ..errors import UsageError
from .record import read_record
import json
from collections.abc import Mapping
from ..config.options import Options, group
from collections.abc import Iterable, Sequence
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ..errors import JobError, UsageError
from .files import check_writable, digest, sha256, write_text
from .files import locked, refuse_locked
from .record import RECORD, SCHEMA_VERSION, RunRecord, StageEntry, read_record, write_record
from ..config.stages import stages_of_config



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
    known = read_record(run).options
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


def read(file: Path) -> list[str]:
    """The lines that can be read as epochs; none where there is no file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if training_of(line) is not None]


def training_of(line: str) -> str | None:
    """Which training an epoch belongs to; None where the line is no epoch."""
    try:
        content = json.loads(line)
        return str(content["stage"]) if isinstance(content["epoch"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def epoch_of(line: str) -> int:
    return int(json.loads(line)["epoch"])


def by_stage(lines: Iterable[str], stages: Sequence[str]) -> dict[str | None, list[str]]:
    """Lines by the stage whose trainings they tell of, None for those of no such stage: of several teachers,
    ``teacher 0``, ``teacher 1`` … belong to ``teacher``.
    """
    found: dict[str | None, list[str]] = {stage: [] for stage in (*stages, None)}
    for line in lines:
        name = str(training_of(line))
        found[next((one for one in stages if name == one or name.startswith(f"{one} ")), None)].append(line)
    return found


def of_training(lines: Iterable[str], training: str) -> list[str]:
    return [line for line in lines if training_of(line) == training]


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
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
        self.record = RunRecord()

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
        check_writable(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            yield

    def look(self, config: Mapping[str, Any], *, fresh: bool) -> None:
        """Refuse what a run with these options would refuse before its first stage, and write nothing.

        Raises:
            UsageError: the folder cannot be made or written, or holds something else or other options.
            JobError: another process is at work in it.
        """
        self.check()
        check_writable(self.path)
        refuse_locked(self.path)
        if not fresh and (self.path / RECORD).exists():
            self.record = read_record(self.path)
            self.refuse_other_options(config)
        self.record.config = dict(config)

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
        return stages_of_config(self.record.config)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    def asked(self, until: str | None) -> tuple[str, ...]:
        """The stages up to that one, or all."""
        return self.stages[: self.stages.index(until) + 1 if until else None]

    def left(self, until: str | None) -> list[str]:
        """Those of them of which the record does not say that they are done."""
        return [stage for stage in self.asked(until) if stage not in self.record.stages]

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def options(self) -> dict[str, Any]:
        """All of the run's options, as far as they belong into a config.yaml."""
        return dict(self.record.options)

    def curves(self) -> list[str]:
        """The lines of metrics.jsonl in the order of the stages, of those that are done as they were then."""
        there = by_stage(read(self.metrics), self.stages)
        for stage, entry in self.record.stages.items():
            there[stage] = entry.curve
        return [line for stage in (*self.stages, None) for line in there[stage]]

    def _mend_curves(self) -> None:
        known = {line for stage in self.record.stages.values() for line in stage.curve}
        if known - set(read(self.metrics)):
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
        before = self.record.config
        if not self.record.stages:
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
        self.record.config = dict(config)
        self.record.command = command
        self.record.options = dict(options)
        if not self.writes:
            return
        write_text(self.path / FILE, yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
        self.save()

    def key(self, stage: str, config: Mapping[str, Any]) -> str:
        """The hash of all that a stage's result depends on: its options and what the stage before left."""
        index = self.stages.index(stage)
        before = self.record.stages.get(self.stages[index - 1]) if index else None
        upstream = {"key": before.key, "outputs": before.outputs} if before else None
        return digest(
            {"stage": stage, "schema": SCHEMA_VERSION, "options": dict(config), "upstream": upstream}
        )

    def finished(self, stage: str, key: str) -> StageResult | None:
        """What the stage left, if it ran for this key and its files are as it left them."""
        entry = self.record.stages.get(stage)
        if entry is None or entry.key != key or not self._as_left(entry):
            return None
        return StageResult(entry.summary, list(entry.outputs), entry.facts)

    def _as_left(self, entry: StageEntry) -> bool:
        files = ((self.path / name, sum) for name, sum in entry.outputs.items())
        return all(file.is_file() and sha256(file) == sum for file, sum in files)

    def check_left(self, name: str) -> None:
        """
        Raises:
            JobError: a file of the run is not as its stage has left it.
        """
        file = self.path / name
        outputs = (entry.outputs for entry in self.record.stages.values())
        left = {one: sum for entry in outputs for one, sum in entry.items()}
        if name in left and file.is_file() and sha256(file) != left[name]:
            raise JobError(
                f"{file} is not as the run has left it: repeat the command that began the run, which makes "
                "it anew."
            )

    def finish(self, stage: str, key: str, done: StageResult, seconds: float, warnings: Sequence[str]) -> None:
        """Record a stage as done; what later stages left is forgotten, unless it is all there and the very
        same files are back that it was made from.
        """
        stages = self.record.stages
        files = [file for name in done.outputs for file in self._files(self.path / name)]
        outputs = {file.relative_to(self.path).as_posix(): sha256(file) for file in files}
        before = stages.get(stage)
        follows = before is not None and (before.key, before.outputs) == (key, outputs)
        for later in self.stages[self.stages.index(stage) + 1 :]:
            follows = follows and later in stages and self._as_left(stages[later])
            if not follows:
                stages.pop(later, None)
        stages[stage] = StageEntry(
            key=key,
            summary=done.summary,
            seconds=round(seconds, 2),
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            outputs=outputs,
            warnings=list(warnings),
            curve=by_stage(read(self.metrics), [stage])[stage],
            facts=dict(done.facts),
        )
        self.save()

    def facts(self) -> dict[str, Any]:
        """What the stages that are done have found, put together: a part of the report."""
        merged: dict[str, Any] = {}
        for stage in self.stages:
            entry = self.record.stages.get(stage)
            if entry is not None:
                merged = _merged(merged, entry.facts)
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


def refuse_unfinished(path: Path) -> None:
    """
    Raises:
        UsageError: ``path`` is the folder of a run that has not come to its artifact.
    """
    if (path / "run.json").is_file() and not (path / "artifact" / "manifest.json").is_file():
        raise UsageError(
            f"{path} holds a run that has nothing to ship yet: repeat the command that began it."
        )
