"""Which files are asked: those of run folders and artifact folders, single .onnx files, and their "
"teachers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...export.conversion.untrusted import parsed, read_foreign
from ...export.errors import ExportError
from ...export.int8.targets import TARGETS, right_here
from ...export.runtime import ArtifactError, Classifier, Preprocessing, read_manifest, read_verified, session
from ...models.checkpoint import tensors_digest
from ..errors import UsageError
from ..evaluation.multi_label import thresholds_of
from ..runs.artifacts import timed_teachers
from ..runs.files import sha256
from ..runs.folder import RunFolder
from ..runs.results import Subject
from ..unfinished import refuse_unfinished

NONE = "none"
"""`--teacher none`: no teacher is asked."""


@dataclass(frozen=True)
class Asked:
    """A network as it is asked: one file, or several teachers whose probabilities are averaged."""

    name: str
    classifiers: tuple[Classifier, ...]
    source: Path
    files: tuple[Path, ...]
    precision: str | None = None
    target: str | None = None
    fused: bool = True
    is_teacher: bool = False
    run: Path | None = None
    """The run folder that it is of."""
    of_teacher: np.ndarray | None = None
    """A teacher's thresholds, which its file does not know."""

    @property
    def labels(self) -> tuple[str, ...]:
        return self.classifiers[0].labels

    @property
    def several(self) -> bool:
        """Whether its images may have several labels."""
        return self.thresholds is not None

    @property
    def thresholds(self) -> np.ndarray | None:
        own = self.classifiers[0].thresholds
        return self.of_teacher if own is None else own

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def sha256(self) -> str:
        return "+".join(sha256(file) for file in self.files)


def open_students(
    artifacts: Sequence[Path], file: str | None, threads: int | None
) -> tuple[list[Asked], list[str]]:
    """The files of each artifact, int8 first, and what is to be said of those that are left out.

    Raises:
        UsageError: one is no artifact, or damaged.
    """
    found: list[Asked] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for path in artifacts:
        try:
            opened = (
                _of_file(path, file, threads) if path.is_file() else _of_folder(path, file, threads, notes)
            )
        except ArtifactError as error:
            raise UsageError(f"{error}.") from error
        found += [one for one in opened if one.files[0].resolve() not in seen]
        seen |= {one.files[0].resolve() for one in opened}
    return _named_apart(found, many=len(artifacts) > 1), notes


def _of_file(path: Path, file: str | None, threads: int | None) -> list[Asked]:
    if file is not None:
        raise UsageError(f"--file {file} chooses among an artifact's files, and {path} is a file itself.")
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"{path} is no .onnx file: name a run folder, an artifact folder or an .onnx file.")
    try:
        content, _ = read_foreign(path)
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    classifier = Classifier(content, path.name, threads=threads)
    return [Asked(path.stem, (classifier,), path, (path,), run=_run_of(path.parent))]


def _of_folder(path: Path, file: str | None, threads: int | None, notes: list[str]) -> list[Asked]:
    refuse_unfinished(path)
    folder, manifest = read_manifest(path)
    entries = [entry for entry in manifest["files"] if file in (None, entry["name"])]
    if not entries:
        held = ", ".join(str(entry["name"]) for entry in manifest["files"])
        raise UsageError(f"{folder} has no file {file}; it has {held}.")
    found = []
    for entry in entries:
        target = entry.get("target")
        fused = target not in TARGETS or right_here(target)
        if not fused and file is None:
            notes.append(
                f"{entry['name']} is made for {target} and was not asked on this machine; --file "
                f"{entry['name']} asks it without integer kernels, as it is meant."
            )
            continue
        content = read_verified(folder, entry)
        try:
            parsed(content, str(folder / entry["name"]))
        except ExportError as error:
            raise UsageError(f"{error}.") from error
        classifier = Classifier(content, entry["name"], threads=threads, **_said(manifest))
        if not fused:
            classifier.session = session(content, classifier.threads, fuse=False, name=entry["name"])
        kind = str(entry["precision"])
        alone = sum(other["precision"] == kind for other in manifest["files"]) == 1
        name = kind if alone or target is None else f"{kind} {target}"
        file_path = folder / entry["name"]
        found.append(Asked(name, (classifier,), path, (file_path,), kind, target, fused, run=_run_of(folder)))
    return found


def _said(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "preprocessing": Preprocessing.from_dict(manifest["preprocessing"]),
        "labels": manifest["labels"],
        "thresholds": manifest.get("thresholds"),
    }


def _run_of(artifact: Path) -> Path | None:
    """The run folder that an artifact folder lies in."""
    above = artifact.resolve().parent
    return above if (above / "run.json").is_file() else None


def _named_apart(found: Sequence[Asked], *, many: bool) -> list[Asked]:
    """Names by which each can be told: with several artifacts, after them."""
    if many:
        found = [replace(one, name=f"{_short(one)} {one.name}".strip()) for one in found]
    names = [one.name for one in found]
    return [
        one if names.count(one.name) == 1 else replace(one, name=f"{one.name} ({one.files[0]})")
        for one in found
    ]


def _short(one: Asked) -> str:
    """An artifact's name: that of its run folder, rather than ``artifact``."""
    if one.source.is_file():
        return "" if one.run is None else one.run.name
    source = one.source.resolve()
    return source.parent.name if source.name == "artifact" else source.name


def open_teachers(
    students: Sequence[Asked], teacher: str | None, threads: int | None
) -> tuple[list[Asked], dict[str, str], list[str]]:
    """The teachers to compare with, which student has which (by name), and what is to be said.

    Raises:
        UsageError: ``--teacher`` names none.
    """
    if teacher == NONE:
        return [], {}, []
    if teacher is not None:
        given = _given_teacher(Path(teacher), threads)
        return [given], {one.name: given.name for one in students}, []
    of_run: dict[Path, Asked] = {}
    notes: list[str] = []
    for run in dict.fromkeys(one.run for one in students if one.run is not None):
        try:
            opened = _teacher_of(run, threads)
        except (ArtifactError, UsageError) as error:
            notes.append(f"{str(error).rstrip('.')}; the teacher of {run.name} was not asked.")
            continue
        # A teacher that is asked by itself has none.
        own = {file for one in students if one.run == run for file in one.files}
        if opened is not None and not _same_files(own, opened.files):
            of_run[run] = opened
    key = {run: _weights(run, one) for run, one in of_run.items()}
    different = {key[run]: (run, one) for run, one in reversed(of_run.items())}
    by_run = len(different) > 1 or any(one.name == "teacher" for one in students)
    named = {
        weights: replace(one, name=f"{run.name} teacher" if by_run else "teacher")
        for weights, (run, one) in reversed(different.items())
    }
    whose = {one.name: named[key[one.run]].name for one in students if one.run is not None and one.run in key}
    if not named and not notes:
        notes.append(NO_TEACHER)
    return list(named.values()), whose, notes


NO_TEACHER = (
    "No teacher was asked: name one with --teacher, a run folder (whose bench/teacher.onnx it is) or an "
    ".onnx "
    "file that compress has exported."
)


def _weights(run: Path, teacher: Asked) -> str:
    """What tells a run's teacher from another run's: its weights and its image size, since the files also say
    what they were made for.
    """
    saved = [run / file.with_suffix(".safetensors").name for file in teacher.files]
    if not all(file.is_file() for file in saved):
        return teacher.sha256
    sizes = [str(one.preprocessing.size) for one in teacher.classifiers]
    return "+".join([*map(tensors_digest, saved), *sizes])


def _same_files(some: Iterable[Path], others: Iterable[Path]) -> bool:
    return {one.resolve() for one in some} == {one.resolve() for one in others}


def _given_teacher(path: Path, threads: int | None) -> Asked:
    try:
        if path.is_file():
            [one] = _of_file(path, None, threads)
            return replace(one, name="teacher", is_teacher=True, run=None)
        found = _teacher_of(path, threads) if (path / "run.json").is_file() else None
    except ArtifactError as error:
        raise UsageError(f"--teacher {path}: {error}.") from error
    if found is None:
        raise UsageError(
            f"--teacher {path} is neither an .onnx file nor a run folder with a bench/teacher.onnx, which "
            f"the bench stage writes; {NONE} leaves the teacher out."
        )
    return replace(found, name="teacher")


def _teacher_of(run: Path, threads: int | None) -> Asked | None:
    """A run's teacher, or its teachers together; None where the run has no file of one.

    Raises:
        UsageError: it has no head, or its weights lie outside of its file.
        JobError: it is not as the run has left it.
    """
    files = timed_teachers(run)
    if not files:
        return None
    record = RunFolder(run, writes=False)
    record.open(fresh=False)
    facts = record.facts()
    known, heads = _of_teachers(run, facts)
    if len(heads) == len(files):
        files = [file for file, head in zip(files, heads, strict=True) if head != "none"]
    if not files:
        raise UsageError(f"The teacher of {run} has no head, and so no answers.")
    beyond = [file for file in files if file.with_name(f"{file.name}.data").exists()]
    if beyond:
        raise UsageError(f"{beyond[0]} keeps its weights, of more than 2 GB, in a file beside it.")
    for file in files:
        for name in (file, run / file.with_suffix(".safetensors").name):
            record.check_left(name.relative_to(run).as_posix())
    return Asked(
        "teacher",
        tuple(Classifier(file.read_bytes(), file.name, threads=threads) for file in files),
        run,
        tuple(files),
        is_teacher=True,
        run=run,
        of_teacher=None if known is None else thresholds_of(known),
    )


def _of_teachers(run: Path, facts: dict[str, Any]) -> tuple[Subject | None, list[str | None]]:
    """What a run has found of its teachers together, and of which kind the head of each is."""
    try:
        known = facts.get("teacher")
        heads = [one.get("head") for one in facts.get("teachers", ())]
        return None if known is None else Subject.model_validate(known), heads
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"The record of {run} does not say of its teachers what a run says.") from error
