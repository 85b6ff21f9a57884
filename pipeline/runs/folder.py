"""The run folder: finished stages, their outputs, and what they were made from."""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Self

import yaml

from ...export.files import remove
from ..config.limits import read_yaml
from ..config.options import Options, get_flag, get_group, get_stage
from ..config.stages import BASELINE, list_stages
from ..errors import JobError, UsageError
from .files import check_unlocked, check_writable, lock, write_text
from .hashes import digest, sha256
from .record import RECORD, SCHEMA_VERSION, RunRecord, StageEntry, read_record, write_record
from .results import Epoch

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
REGENERATE = "Run the original command again to regenerate it."
ARTIFACT = Path("artifact")
"""Folder of the files to deploy."""

MOVABLE = ("data", "data_dir", "unlabeled")
"""Options of config.yaml that a user may edit, since images can be moved."""


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    summary: str
    """One line for the terminal."""
    outputs: Sequence[str] = ()
    """Files in the run folder; a folder stands for all files in it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """A part of the report; see ``report/assemble.py``."""


class RunFolder:
    """One run's folder. ``run.json`` is written after every stage; of several ranks, only rank 0 writes."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.record = RunRecord()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open an existing run for reading, or raise UsageError if it is not a run or damaged."""
        if not (path / RECORD).is_file():
            raise UsageError(f"{path} is not a run folder. Set it to a folder that compress has written.")
        run = cls(path, writes=False)
        run.record = read_record(path)
        return run

    def open(self, *, fresh: bool) -> None:
        """Create the folder if needed, and read its record."""
        exists = (self.path / RECORD).exists()
        if not self.writes:
            if not exists:
                raise UsageError(
                    f"--out {self.path}: rank 0 has not written it. Use a file system shared by all machines."
                )
            self.record = read_record(self.path)
            return
        self._create()
        if exists:
            for part in self.path.rglob(".*.part"):  # left by a killed process
                remove(part)
        if fresh:
            self.save()
            self.remove_checkpoints("")
            self.metrics.unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        elif exists:
            self.record = read_record(self.path)
            self._report_damaged_curves()

    def _create(self) -> None:
        self._check_folder()
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that writes the folder during the block; see ``files.lock``."""
        if not self.writes:
            yield
            return
        self._create()
        with lock(self.path):
            yield

    def check(self, config: Mapping[str, Any], *, fresh: bool) -> None:
        """Raise the errors of a run with these options before its first stage; write nothing."""
        self._check_folder()
        check_unlocked(self.path)
        if not fresh and (self.path / RECORD).exists():
            self.record = read_record(self.path)
            self.check_options(config)
        self.record.config = dict(config)

    def _check_folder(self) -> None:
        """Raise UsageError unless the folder is new, empty or a run, and can be written."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file. Set it to a new folder or a run folder.")
        has_record = (self.path / RECORD).exists()
        names = [path.name for path in self.path.iterdir()] if self.path.exists() and not has_record else []
        if any(name != CONFIG_FILE and not name.startswith(".") for name in names):
            raise UsageError(
                f"--out {self.path} contains other files and is not a run. Set it to a new or empty folder."
            )
        check_writable(self.path)

    def check_options(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError if finished stages were run with other options, apart from those of export."""
        if self.record.stages and (changes := describe_changes(self.record.config, config)):
            raise UsageError(
                f"{self.path} contains a run with other options: {'; '.join(changes)}. "
                "Set another --out, use the same options, or start the run over with --fresh."
            )

    @property
    def stages(self) -> tuple[str, ...]:
        config = self.record.config
        return list_stages(config.get("rounds", 1), config.get("qat", False), config.get("baseline", False))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints of unfinished trainings."""
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        """The file of the training curves."""
        return self.path / "metrics.jsonl"

    def stages_until(self, until: str | None) -> tuple[str, ...]:
        """Return the stages up to ``until``, or all."""
        return self.stages[: self.stages.index(until) + 1 if until else None]

    def unfinished(self, until: str | None) -> list[str]:
        """Return the stages up to ``until`` that are not recorded as finished."""
        return [stage for stage in self.stages_until(until) if stage not in self.record.stages]

    def curves(self) -> list[str]:
        """Return the lines of metrics.jsonl in the order of the stages."""
        groups = group_by_stage(read_curves(self.metrics), self.stages)
        return [line for lines in groups.values() for line in lines]

    def _report_damaged_curves(self) -> None:
        curves, stages = group_by_stage(read_curves(self.metrics), self.stages), self.record.stages
        damaged = [stage for stage in stages if stages[stage].curves != digest(curves.get(stage, []))]
        if damaged:
            names = ", ".join(damaged)
            _log.warning("%s is damaged: the curves of %s in the report may be wrong.", self.metrics, names)

    def log_epoch(self, epoch: Epoch) -> None:
        """Append an epoch to ``metrics.jsonl``, replacing it and later ones of the same training."""
        kept = [
            line
            for line in self.curves()
            if get_training(line) != epoch.stage or json.loads(line)["epoch"] < epoch.epoch
        ]
        write_text(self.metrics, "\n".join([*kept, epoch.model_dump_json()]) + "\n")

    def remove_checkpoints(self, stage: str) -> None:
        """Remove the checkpoints of a finished stage."""
        for checkpoint in self.checkpoints.glob(f"{stage}*.pt"):
            checkpoint.unlink()

    def begin(self, config: Mapping[str, Any], options: Mapping[str, Any], command: str) -> None:
        """Record the start of a run; ``config`` enters the stages' keys, ``options`` are for config.yaml."""
        self.record.config = dict(config)
        self.record.command = command
        self.record.options = dict(options)
        if self.writes:
            text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
            write_text(self.path / CONFIG_FILE, text)
            self.save()

    def key(self, stage: str, config: Mapping[str, Any]) -> str:
        """Return the hash of a stage's options and of the outputs of the stage whose results it reads."""
        earlier = ["", *self.stages][self.stages.index(stage)]
        previous = self.record.stages.get("student" if stage == BASELINE else earlier)
        upstream = {"key": previous.key, "outputs": previous.outputs} if previous else None
        content = {"stage": stage, "schema": SCHEMA_VERSION, "options": dict(config), "upstream": upstream}
        return digest(content)

    def finished(self, stage: str, key: str) -> StageResult | None:
        """Return a stage's result if it was run with this key and its outputs are unchanged."""
        entry = self.record.stages.get(stage)
        if entry is None or entry.key != key or not self._is_unchanged(entry):
            return None
        return StageResult(entry.summary, list(entry.outputs), entry.facts)

    def _is_unchanged(self, entry: StageEntry) -> bool:
        files = ((self.path / name, checksum) for name, checksum in entry.outputs.items())
        return all(file.is_file() and sha256(file) == checksum for file, checksum in files)

    def check_output(self, name: str) -> None:
        """Raise JobError if a stage's output file was modified."""
        file = self.path / name
        checksums = {k: v for entry in self.record.stages.values() for k, v in entry.outputs.items()}
        if name in checksums and file.is_file() and sha256(file) != checksums[name]:
            raise JobError(f"{file} was modified after the run wrote it. {REGENERATE}")

    def finish(
        self, stage: str, key: str, result: StageResult, seconds: float, warnings: Sequence[str]
    ) -> None:
        """Record a stage as finished.

        Later stages are dropped from the record, unless this stage's outputs are the same files as before and
        theirs are unchanged.
        """
        stages = self.record.stages
        files = [file for name in result.outputs for file in _list_files(self.path / name)]
        outputs = {file.relative_to(self.path).as_posix(): sha256(file) for file in files}
        before = stages.get(stage)
        valid = before is not None and (before.key, before.outputs) == (key, outputs)
        index = self.stages.index(stage)
        for later in self.stages[index + 1 :]:
            if later == BASELINE and "student" in self.stages[:index]:
                continue  # an export does not change it
            valid = valid and later in stages and self._is_unchanged(stages[later])
            if not valid:
                stages.pop(later, None)
        stages[stage] = StageEntry(
            key=key,
            summary=result.summary,
            seconds=round(seconds, 2),
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            outputs=outputs,
            warnings=list(warnings),
            curves=digest(group_by_stage(read_curves(self.metrics), [stage])[stage]),
            facts=dict(result.facts),
        )
        self.save()

    def facts(self) -> dict[str, Any]:
        """Return the merged facts of the finished stages: a part of the report."""
        stages = self.record.stages
        return reduce(_merge, (stages[stage].facts for stage in self.stages if stage in stages), {})

    def save(self) -> None:
        if self.writes:
            write_record(self.path, self.record)


def _list_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _merge(old: Any, new: Any) -> Any:
    """Merge mappings by key and lists of equal length by element; replace anything else."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _merge(old[key], new[key]) if key in old else new[key] for key in new}}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_merge(a, b) for a, b in zip(old, new, strict=True)]
    return new


def check_finished(path: Path) -> None:
    """Raise UsageError if ``path`` is a run that has not written its artifact."""
    if (path / RECORD).is_file() and not (path / "artifact" / "manifest.json").is_file():
        raise UsageError(f"{path} is an unfinished run without an artifact. Run the original command again.")


def read_config(run: Path) -> dict[str, Any]:
    """Return the options in a run's config.yaml, or raise UsageError if they are not those of the run."""
    file = run / CONFIG_FILE
    try:
        content = read_yaml(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} does not contain options.")
    recorded = read_record(run).options
    changed = [
        str(name)
        for name in {**recorded, **content}
        if (name in recorded) != (name in content)
        or (content.get(name) != recorded.get(name) and name not in MOVABLE)
    ]
    if changed:
        raise UsageError(
            f"{file} was modified after the run wrote it ({', '.join(changed[:3])}). {REGENERATE}"
        )
    return content


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the changed options, such as ``--epochs was 12, now 13``.

    Options of export and the baseline are ignored: they change no earlier training.
    """
    old, new = _flatten(before), _flatten(after)
    return [
        f"{name} was {_shorten(old.get(name))}, now {_shorten(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


_CONTENTS = {"data_content": "the data's images", "unlabeled_content": "the images of --unlabeled"}


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by flag; those of ``--set`` and ``--weight`` by key."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in Options.model_fields and (get_group(name) == "Export" or get_stage(name) == BASELINE):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{get_flag(name)} {key}": part for key, part in value.items()}
        else:
            flat[_CONTENTS.get(name) or get_flag(name)] = value
    return flat


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_curves(file: Path) -> list[str]:
    """Return the lines of metrics.jsonl that are valid, or none if there is no file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if get_training(line) is not None]


def get_training(line: str) -> str | None:
    """Return the training that a line of metrics.jsonl belongs to; None if the line is damaged."""
    try:
        content = json.loads(line)
        return str(content["stage"]) if isinstance(content["epoch"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def group_by_stage(lines: Iterable[str], stages: Sequence[str]) -> dict[str | None, list[str]]:
    """Return lines by stage, and those of other stages under None.

    The trainings of several teachers, ``teacher 0``, ``teacher 1`` …, belong to the stage ``teacher``.
    """
    groups: dict[str | None, list[str]] = {stage: [] for stage in (*stages, None)}
    for line in lines:
        training = str(get_training(line))
        stage = next((name for name in stages if training == name or training.startswith(f"{name} ")), None)
        groups[stage].append(line)
    return groups
