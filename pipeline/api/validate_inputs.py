"""Which files are asked: those of run folders and artifact folders, single .onnx files, and their "
"teachers."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...export.conversion.untrusted import parsed, read_foreign
from ...export.errors import ExportError
from ...export.int8.targets import TARGETS, is_exact_here
from ...export.runtime import (
    ArtifactError,
    Classifier,
    Preprocessing,
    open_session,
    read_manifest,
    read_verified,
)
from ...models.checkpoint import tensors_digest
from ..data.dataset import SPLITS, Image, Progress, Skipped, Split, printable, sort_images
from ..data.sources import open_data, read_data
from ..data.splits import UnsplitDataset, quote_names
from ..errors import UsageError
from ..report.format import plural
from ..runs import predictions
from ..runs.artifacts import find_teacher_files
from ..runs.files import digest, sha256
from ..runs.folder import RunFolder, check_finished, read_config
from ..runs.results import Subject
from ..runs.scores import TaskName
from ..tasks import Task, task_of_file, thresholds_of

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
    def task(self) -> Task:
        return task_of_file(self.thresholds)

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
    check_finished(path)
    folder, manifest = read_manifest(path)
    entries = [entry for entry in manifest["files"] if file in (None, entry["name"])]
    if not entries:
        held = ", ".join(str(entry["name"]) for entry in manifest["files"])
        raise UsageError(f"{folder} has no file {file}; it has {held}.")
    found = []
    for entry in entries:
        target = entry.get("target")
        fused = target not in TARGETS or is_exact_here(target)
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
            classifier.session = open_session(content, classifier.threads, fuse=False, name=entry["name"])
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
    files = find_teacher_files(run)
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
            record.check_output(name.relative_to(run).as_posix())
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


Part = Literal["train", "val", "test", "all"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Chosen:
    """Labelled images. ``classes`` are the names that ``images``' labels are numbers of."""

    name: str
    source: str
    part: Part
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    task: TaskName
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def shown(self) -> list[str]:
        """The classes that an image shows, in their order."""
        seen = {label for image in self.images for label in image.labels}
        return [name for label, name in enumerate(self.classes) if label in seen]

    def digest(self, images: Sequence[Image]) -> str:
        """Of some of the images: of their content and of what they show."""
        return digest(
            sorted([image.key, *(self.classes[label] for label in image.labels)] for image in images)
        )

    def targets(self, images: Sequence[Image], labels: Sequence[str], task: Task) -> np.ndarray:
        """Return the images' labels as an array for a network with these class names."""
        place = {name: number for number, name in enumerate(labels)}
        numbers = [place.get(name, -1) for name in self.classes]
        known = [[numbers[label] for label in image.labels if numbers[label] >= 0] for image in images]
        return task.encode(known, len(labels))


def choose(
    data: str,
    part: Part | None,
    runs: Collection[Path],
    data_dir: Path | None,
    download: bool,
    progress: Progress,
) -> Chosen:
    """The images of ``data``: of the role that is asked for; else those given for testing; where none has a
    role, all of them.

    Raises:
        UsageError: the data are not there or have no image of that role.
    """
    given = read_data(data, data_dir=data_dir, download=download, for_training=False, progress=progress)
    if part is None:
        part = "test" if given.has_splits else "all"
    if part != "all" and not given.images.get(part):
        raise UsageError(_without_role(given, part))
    roles: Sequence[Split] = SPLITS if part == "all" else (part,)
    images = [image for role in roles for image in given.images.get(role, ())]
    if not images:
        raise UsageError(f"{given.source} holds no image that can be read.")
    warnings = [*_copies(images), *_learned(given, images, part, runs)]
    return Chosen(
        given.name,
        given.source,
        part,
        given.classes,
        sort_images(images),
        given.task,
        given.skipped,
        tuple(warnings),
    )


def _without_role(given: UnsplitDataset, part: Part) -> str:
    if not given.has_splits:
        return (
            f"{given.source} has no roles, so that --role {part} names none of its images; leave it out, "
            "or say "
            "--role all."
        )
    there = [role for role in SPLITS if given.images.get(role)]
    return f"{given.source} has no {part} images but {' and '.join(there)} images: say --role {there[-1]}."


def _copies(images: Sequence[Image]) -> list[str]:
    """Content that is there more than once, which counts as often."""
    labels: dict[str, set[tuple[int, ...]]] = {}
    for image in images:
        labels.setdefault(image.key, set()).add(image.labels)
    again = len(images) - len(labels)
    torn = sum(len(found) > 1 for found in labels.values())
    told = []
    if again:
        told.append(f"{again} of the {len(images)} images are copies of others; each counts for itself.")
    if torn:
        told.append(f"{torn} images stand under more than one class; one of their answers is always wrong.")
    return told


def _learned(given: UnsplitDataset, images: Sequence[Image], part: Part, runs: Collection[Path]) -> list[str]:
    """Whether a network has learned from these images, or from some of them."""
    whole = [] if part == "test" else _of_the_run(given, runs)
    return whole or [told for run in runs if (told := _trained_on(images, run)) is not None]


def _trained_on(images: Sequence[Image], run: Path) -> str | None:
    _record(run).check_output(predictions.TRAIN_IMAGES_FILE)
    known = predictions.read_train_images(run)
    seen = sum(image.number in known for image in images)
    if not seen:
        return None
    were = f"{seen:,} of {plural(len(images), 'image')} {'was' if seen == 1 else 'were'}"
    return f"{were} trained on by {run.name}: on them the figures are better than on new ones."


def _of_the_run(given: UnsplitDataset, runs: Collection[Path]) -> list[str]:
    """Whether these are all the images of one of the runs."""
    for run in runs:
        record = _record(run)
        known = record.facts().get("data")
        if known is None:
            continue
        try:
            same = given.split(read_config(run).get("val_fraction")).fingerprint == known["fingerprint"]
        except UsageError:
            same = False
        if same:
            return [
                f"These are the images of {run.name} itself, which has learned from {known['train']} of "
                "them: "
                "the figures are better than on new ones. Without --data its test images alone are asked."
            ]
    return []


def own(runs: Sequence[Path], part: Part | None, progress: Progress) -> Chosen:
    """The images of the runs themselves, by default those of their test role.

    Raises:
        UsageError: they are no longer there, have changed since, or differ between the runs.
    """
    if not runs:
        raise UsageError(
            "--data is missing: what was named is no run folder, whose test images could be asked; name a "
            "folder "
            "of labelled images, as in --data photos/."
        )
    facts = [_record(run).facts().get("data") for run in runs]
    known = facts[0]
    for run, other in zip(runs, facts, strict=True):
        if other is None:
            raise UsageError(f"{run} has not come to its data yet; name labelled images with --data.")
        assert known is not None
        if other["fingerprint"] != known["fingerprint"]:
            raise UsageError(
                f"{runs[0].name} and {run.name} were made from different data; name the images to ask both "
                "about "
                "with --data."
            )
    assert known is not None
    config = read_config(runs[0])
    try:
        found = open_data(
            config["data"],
            data_dir=None if config.get("data_dir") is None else Path(config["data_dir"]),
            val_fraction=config.get("val_fraction"),
            progress=progress,
        )
    except UsageError as error:
        raise UsageError(
            f"{runs[0]} was made from {printable(str(config['data']))}, which cannot be read from here "
            f"({error}) "
            "Name labelled images with --data."
        ) from error
    if found.fingerprint != known["fingerprint"]:
        raise UsageError(
            f"{printable(str(config['data']))} is no longer what {runs[0]} was made from: images have "
            "come, gone, "
            "or changed. Name the images to ask about with --data."
        )
    part = part or "test"
    images = found.split(part) if part != "all" else tuple(i for role in SPLITS for i in found.split(role))
    if not images:
        raise UsageError(f"{runs[0]} has no {part} images; say --role test.")
    warnings = []
    if part in ("train", "all"):
        warnings = ["The networks have learned from these images: the figures are better than on new ones."]
    elif part == "val":
        warnings = ["The val images have decided what ships: the figures are better than on new ones."]
    return Chosen(
        found.name,
        found.source,
        part,
        found.classes,
        images,
        found.task,
        found.skipped,
        tuple(warnings),
    )


def _record(run: Path) -> RunFolder:
    record = RunFolder(run, writes=False)
    record.open(fresh=False)
    return record


def known_to_all(chosen: Chosen, networks: Sequence[Asked], *, ignore_unknown: bool) -> Chosen:
    """The images whose classes every network knows.

    Raises:
        UsageError: a class is not known, and it was not asked to pass over such; or the kinds differ.
    """
    task = networks[0].task
    for one in networks:
        if one.task is not task:
            raise UsageError(
                f"{networks[0].name} and {one.name} cannot be compared: their tasks are {task.name} and "
                f"{one.task.name}."
            )
    if chosen.task not in task.accepts:
        raise UsageError(
            f"{chosen.source}: the labels are {chosen.task}, and the task of {networks[0].name} is "
            f"{task.name}. Use data of that task."
        )
    unknown = {name: one for one in reversed(networks) for name in chosen.shown if name not in one.labels}
    if not unknown:
        return chosen
    if not ignore_unknown:
        raise UsageError(_unknown(chosen, unknown))
    refused = {label for label, name in enumerate(chosen.classes) if name in unknown}
    kept = task.drop_unknown(chosen.images, refused)
    dropped = len(chosen.images) - len(kept)
    if not kept or not any(name not in unknown for name in chosen.shown):
        raise UsageError(f"None of the classes of {chosen.source} is known: {quote_names(list(unknown))}.")
    told = f"{quote_names(list(unknown))} {'is' if len(unknown) == 1 else 'are'} not known to the networks: "
    told += f"{dropped} images were left out" if dropped else "these labels are ignored"
    return replace(chosen, images=kept, warnings=(*chosen.warnings, f"{told}."))


def _unknown(chosen: Chosen, unknown: dict[str, Asked]) -> str:
    names = [name for name in chosen.shown if name in unknown]
    network = unknown[names[0]]
    lower = {label.lower(): label for label in network.labels}
    near = [lower[one] for one in get_close_matches(names[0].lower(), lower, n=1, cutoff=0.7)]
    hint = f" ('{names[0]}' may be its '{near[0]}')" if near else ""
    return (
        f"{chosen.source} has images of {quote_names(names)}, which {network.name} does not know{hint}; it knows "
        f"{quote_names(list(network.labels), 12)}. Rename or remove {'it' if len(names) == 1 else 'them'}, or "
        "pass "
        "over such images with --ignore-unknown."
    )
