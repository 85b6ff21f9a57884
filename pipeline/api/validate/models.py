"""Open the models to validate, and their teachers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ....export.conversion.untrusted import read_untrusted
from ....export.errors import ExportError
from ....export.int8.targets import TARGETS, is_exact_here
from ....export.runtime import ArtifactError, Preprocessing, open_content, open_session
from ....export.runtime import Model as Network
from ....models.checkpoint import tensors_digest
from ...errors import UsageError
from ...runs.artifacts import ModelFile, find_teacher_files, name_files, open_files
from ...runs.folder import RunFolder
from ...runs.hashes import sha256
from ...runs.record import RECORD
from ...runs.results import Subject
from ...tasks import task_of_file
from ...tasks.base import Task


@dataclass(frozen=True)
class Model:
    """One file, or an ensemble of teachers."""

    name: str
    networks: tuple[Network, ...]
    source: Path
    files: tuple[Path, ...]
    precision: str | None = None
    target: str | None = None
    fused: bool = True
    """False if int8 is simulated in float, without integer kernels."""
    run: Path | None = None
    is_teacher: bool = False
    recorded_thresholds: np.ndarray | None = None
    """Thresholds of a teacher, whose file does not contain them."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the network's classes."""
        return self.networks[0].labels

    @property
    def thresholds(self) -> np.ndarray | None:
        """Thresholds by class of a multi-label model."""
        own = self.networks[0].thresholds
        return self.recorded_thresholds if own is None else own

    @property
    def task(self) -> Task:
        return task_of_file(self.networks[0], self.thresholds)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.networks[0].preprocessing

    @cached_property
    def sha256(self) -> str:
        """Checksums of the files."""
        return "+".join(sha256(file) for file in self.files)

    def columns_of(self, labels: Sequence[str]) -> list[int] | None:
        """Return the model's class numbers in the order of ``labels``, or None if it has other classes."""
        if sorted(labels) != sorted(self.labels):
            return None
        return [self.labels.index(label) for label in labels]


def open_models(
    paths: Sequence[Path], file: str | None, threads: int | None
) -> tuple[list[Model], list[str]]:
    """Open the files of each path, and return notes on those that are not validated."""
    files: dict[Path, ModelFile] = {}
    notes = []
    for path in paths:
        for model in open_files(path, file):
            if file is None and not _is_exact(model):
                notes.append(
                    f"{model.path.name} is made for {model.target} and is not validated on this machine. "
                    f"--file {model.path.name} validates it in simulated quantization."
                )
            else:
                files.setdefault(model.path.resolve(), model)
    names = name_files((model.source, model.name) for model in files.values())
    try:
        return [_open(m, name, threads) for m, name in zip(files.values(), names, strict=True)], notes
    except ArtifactError as error:
        raise UsageError(f"{error}.") from error


def _is_exact(file: ModelFile) -> bool:
    return file.target not in TARGETS or is_exact_here(file.target)


def _open(file: ModelFile, name: str, threads: int | None) -> Model:
    network = open_content(file.content, file.path.name, threads=threads, manifest=file.manifest)
    fused = _is_exact(file)
    if not fused:
        network.session = open_session(file.content, network.threads, fuse=False, name=file.path.name)
    return Model(name, (network,), file.source, (file.path,), file.precision, file.target, fused, file.run)


def open_teachers(
    students: Sequence[Model], teacher: str | Path | None, threads: int | None
) -> tuple[list[Model], dict[str, str], list[str]]:
    """Open ``teacher``: a run folder, an .onnx file, ``none``, or None for those of the students' runs.

    Returns:
        The teachers, the name of each student's teacher, and notes.
    """
    if str(teacher) == "none":
        return [], {}, []
    if teacher is not None:
        model = _open_given_teacher(Path(teacher), threads)
        return [model], {student.name: model.name for student in students}, []
    keys: dict[Path, str] = {}
    distinct: dict[str, Model] = {}
    notes = []
    for run in dict.fromkeys(student.run for student in students if student.run is not None):
        try:
            opened = _open_teacher_of(run, threads)
        except (ArtifactError, UsageError) as error:
            notes.append(f"{str(error).rstrip('.')}. The models of {run.name} are not compared with it.")
            continue
        # A teacher that is validated itself is not compared with itself.
        validated = {file.resolve() for student in students if student.run == run for file in student.files}
        if opened is not None and {file.resolve() for file in opened.files} != validated:
            keys[run] = _key(run, opened)
            distinct.setdefault(keys[run], opened)
    add_run = len(distinct) > 1 or any(student.name == "teacher" for student in students)
    teachers = {
        key: replace(model, name=f"{model.source.name} teacher" if add_run else "teacher")
        for key, model in distinct.items()
    }
    teacher_of = {s.name: teachers[keys[s.run]].name for s in students if s.run is not None and s.run in keys}
    if not teachers and not notes:
        notes.append(
            "The models are not compared with a teacher. Set --teacher to a run folder (whose "
            "bench/teacher.onnx is used) or to an .onnx file exported by compress."
        )
    return list(teachers.values()), teacher_of, notes


def _key(run: Path, teacher: Model) -> str:
    """Return an identifier of weights and image size, since the files also contain other metadata."""
    weights = [run / file.with_suffix(".safetensors").name for file in teacher.files]
    if not all(file.is_file() for file in weights):
        return teacher.sha256
    sizes = [str(network.preprocessing.size) for network in teacher.networks]
    return "+".join([*map(tensors_digest, weights), *sizes])


def _open_given_teacher(path: Path, threads: int | None) -> Model:
    try:
        if path.is_file():
            return replace(_open(open_files(path)[0], "teacher", threads), is_teacher=True, run=None)
        model = _open_teacher_of(path, threads) if (path / RECORD).is_file() else None
    except ArtifactError as error:
        raise UsageError(f"--teacher {path}: {error}.") from error
    if model is None:
        raise UsageError(
            f"--teacher {path} must be an .onnx file or a run folder with bench/teacher.onnx, which the "
            "bench stage writes. Set it to none to validate without a teacher."
        )
    return model


def _open_teacher_of(run: Path, threads: int | None) -> Model | None:
    """Open a run's teacher or ensemble of teachers, or return None if it has no file."""
    files = find_teacher_files(run)
    if not files:
        return None
    folder = RunFolder.read(run)
    facts = folder.facts()
    try:
        subject = None if facts.get("teacher") is None else Subject.model_validate(facts["teacher"])
        heads = [teacher.get("head") for teacher in facts.get("teachers", ())]
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{run / RECORD}: the entry of the teacher is invalid.") from error
    if len(heads) == len(files):
        files = [file for file, head in zip(files, heads, strict=True) if head != "none"]
    if not files:
        raise UsageError(f"The teacher of {run} has no head and predicts no classes.")
    for file in files:
        if file.with_name(f"{file.name}.data").exists():
            raise UsageError(f"{file} has external weights of more than 2 GB.")
        for output in (file, run / file.with_suffix(".safetensors").name):
            folder.check_output(output.relative_to(run).as_posix())
    try:
        contents = [read_untrusted(file)[0] for file in files]
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    networks = tuple(
        open_content(content, file.name, threads=threads)
        for content, file in zip(contents, files, strict=True)
    )
    recorded = None if subject is None else subject.thresholds
    return Model(
        "teacher", networks, run, tuple(files), run=run, is_teacher=True, recorded_thresholds=recorded
    )
