"""`compress validate`: what shipped files make of labelled images, through the runtime that ships."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ...export.files import remove
from ...export.latency.machine import environment
from ..data.dataset import Progress
from ..errors import UsageError
from ..evaluation.results import Network, Validation
from ..report.format import plural
from ..runs.console import Display
from ..runs.files import check_outside_data, command_line, write_text
from ..runs.process import STOP
from . import validate_answers
from . import validate_inputs as chosen_images
from .validate_answers import Answers, ask
from .validate_inputs import PARTS, Asked, Chosen, Part, open_students, open_teachers

FOLDER = "validation"
EXAMPLES = 48
"""Mistakes that the page shows as pictures."""


def validate(
    artifacts: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    role: Part | None = None,
    teacher: str | Path | None = None,
    file: str | None = None,
    ignore_unknown: bool = False,
    out: str | Path | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Validation:
    """Ask shipped files about labelled images; the same as the command.

    Args:
        artifacts: run folders, artifact folders or .onnx files that compress has made.
        data: whatever ``--data`` of a run may be; without it the test images of the run itself.
        data_dir: where a named data set lies; the folder of a labels file's images.
        download: fetch a named data set that is not there.
        role: ``train``, ``val``, ``test`` or ``all``; without it ``test`` where the images have roles.
        teacher: an .onnx file or a run folder; ``none`` for no teacher; without it the runs' own.
        file: the one of an artifact folder's files to ask; without it all that this machine computes.
        ignore_unknown: pass over images of classes that a network does not know.
        out: where validation.json, .md, .html, mistakes.csv and differences.csv go; without it
            ``validation`` in the one run folder, else here.
        threads: of ONNX Runtime; without it the cores allowed, at most 4.
        quiet: no progress on standard error.

    Returns:
        What ``validation.json`` holds, with pictures.

    Raises:
        UsageError: an artifact, the data or an option is wrong (``exit_code`` 2).
        JobError: too many images cannot be read, or the files cannot be written (``exit_code`` 1).
    """
    named = [artifacts] if isinstance(artifacts, str | Path) else list(artifacts)
    paths = [Path(one) for one in named]
    if not paths:
        raise UsageError("No artifact is named: name a run folder, an artifact folder or an .onnx file.")
    if role is not None and role not in PARTS:
        raise UsageError(f"There is no role '{role}'; say {', '.join(PARTS)}.")
    display = Display(quiet=quiet)
    with STOP.handle_signals(), display.stage("validate") as stage:

        def progress(work: str) -> Progress:
            return lambda done, total: stage.update(work, done, total, "images")

        students, notes = open_students(paths, file, threads)
        teachers, whose, more = open_teachers(students, None if teacher is None else str(teacher), threads)
        folder = _folder(paths, out)
        if data is not None:
            check_outside_data(data, {"--out": folder})
        runs = list(dict.fromkeys(one.run for one in students if one.run is not None))
        reading = progress("reading images")
        if data is None:
            chosen = chosen_images.own(runs, role, reading)
        else:
            there = None if data_dir is None else Path(data_dir)
            chosen = chosen_images.choose(str(data), role, runs, there, download, reading)
        chosen = chosen_images.known_to_all(chosen, students, ignore_unknown=ignore_unknown)
        teachers, whose, unlike = _alike(students, teachers, whose)
        answers = ask(chosen.images, [*students, *teachers], chosen.skipped, progress("asking"))
        found = _Found(students, teachers, whose, chosen, answers)
        result = found.validation([*notes, *more, *unlike], folder, progress("drawing mistakes"))
    every = [one for each in found.answered for one in each]
    write(
        result,
        folder,
        validate_answers.mistakes(every),
        validate_answers.differences(every) if whose else None,
    )
    return result


def _folder(paths: Sequence[Path], out: str | Path | None) -> Path:
    """
    Raises:
        UsageError: it is a file.
    """
    inside = len(paths) == 1 and (paths[0] / "run.json").is_file()
    folder = Path(out) if out is not None else paths[0] / FOLDER if inside else Path(FOLDER)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; name a folder.")
    return folder


def _alike(
    students: Sequence[Asked], teachers: Sequence[Asked], whose: dict[str, str]
) -> tuple[list[Asked], dict[str, str], list[str]]:
    """The teachers whose answers can be compared with those of their students, and what is to be said of the
    others.
    """
    kept, notes = [], []
    for teacher in teachers:
        of = [one for one in students if whose.get(one.name) == teacher.name]
        if teacher.thresholds is None:  # its file has none, whatever the task
            teacher = replace(teacher, of_teacher=of[0].task.default_thresholds(len(teacher.labels)))
        fits = teacher.task is of[0].task
        unlike = [one for one in of if not fits or validate_answers.in_order_of(one, teacher) is None]
        for one in unlike:
            del whose[one.name]
            notes.append(f"{teacher.name} knows other classes than {one.name}: they were not compared.")
        if len(unlike) < len(of):
            kept.append(teacher)
    return kept, whose, notes


@dataclass(frozen=True)
class _Found:
    """Networks, images and answers, from which all figures follow."""

    students: Sequence[Asked]
    teachers: Sequence[Asked]
    whose: dict[str, str]
    chosen: Chosen
    answers: Answers

    @property
    def networks(self) -> list[Asked]:
        return [*self.students, *self.teachers]

    @cached_property
    def targets(self) -> list[np.ndarray]:
        task = self.students[0].task
        return [self.chosen.targets(self.answers.images, one.labels, task) for one in self.networks]

    @cached_property
    def answered(self) -> list[list[validate_answers.Answered]]:
        """Of each student."""
        found = []
        for one, logits, targets in zip(self.students, self.answers.logits, self.targets, strict=False):
            teacher, others = self._teacher(one)
            found.append(
                validate_answers.answered(one, logits, targets, self.answers.images, teacher, others)
            )
        return found

    def _teacher(self, student: Asked) -> tuple[Asked | None, np.ndarray | None]:
        for place, one in enumerate(self.networks):
            if one.is_teacher and one.name == self.whose.get(student.name):
                return one, self.answers.logits[place]
        return None, None

    def validation(self, notes: Sequence[str], folder: Path, progress: Progress) -> Validation:
        chosen, images, first = self.chosen, self.answers.images, self.students[0]
        names = [one.name for one in self.networks]
        each = zip(self.networks, self.answers.logits, self.targets, strict=True)
        rights = [validate_answers.right(one, logits, targets) for one, logits, targets in each]
        wrong = validate_answers.mistakes(self.answered[0])
        counts = Counter(label for image in images for label in image.labels)
        skipped = [*chosen.skipped, *self.answers.skipped]
        unread = [one for one in skipped if one.unreadable]
        warnings = list(chosen.warnings)
        if unread:
            warnings.append(f"{plural(len(unread), 'image')} could not be read and are left out.")
        machine = environment()
        return Validation(
            title=f"{_sources(self.students)} on {chosen.name}",
            command=command_line(),
            data=chosen.name,
            source=chosen.source,
            role=chosen.part,
            n=len(images),
            images=chosen.digest(images),
            task=first.task.name,
            per_class={name: counts[label] for label, name in enumerate(chosen.classes) if counts[label]},
            networks=[self._network(place) for place in range(len(names))],
            pairs=validate_answers.pairs(names, rights),
            examples=validate_answers.pictured(wrong, first, EXAMPLES, progress),
            skipped=[(one.name, one.reason) for one in skipped],
            warnings=warnings,
            notes=list(notes),
            environment={
                "cpu": machine.cpu,
                "machine": machine.machine,
                "instruction sets": ", ".join(machine.flags),
                "threads": str(first.classifiers[0].threads),
                "onnxruntime": machine.onnxruntime,
                "python": platform.python_version(),
            },
            folder=str(folder),
        )

    def _network(self, place: int) -> Network:
        one, logits, targets = self.networks[place], self.answers.logits[place], self.targets[place]
        teacher, others = self._teacher(one)
        agrees = None
        if teacher is not None and others is not None:
            agrees = validate_answers.agreement(one, logits, teacher, others)
        return Network(
            name=one.name,
            role="teacher" if one.is_teacher else "student",
            source=str(one.source),
            file="+".join(file.name for file in one.files),
            bytes=one.bytes,
            sha256=one.sha256,
            precision=one.precision,
            target=one.target,
            fused=one.fused,
            image_size=one.classifiers[0].preprocessing.size,
            classes=list(one.labels),
            teacher=None if teacher is None else teacher.name,
            agreement=agrees,
            **validate_answers.measured(one, logits, targets),
        )


def _sources(students: Sequence[Asked]) -> str:
    names = dict.fromkeys(str(one.source) for one in students)
    return ", ".join(Path(name).name or name for name in names)


def write(
    found: Validation,
    folder: Path,
    mistakes: Sequence[validate_answers.Answered],
    differences: Sequence[validate_answers.Answered] | None,
) -> None:
    """Write the page, the same as Markdown and as JSON, and the lists of images, each whole or not at all.

    Raises:
        JobError: the folder cannot be written or the disk is full.
    """

    from ..report.pages.validation import render_validation

    texts = {
        **render_validation(found),
        "validation.json": as_json(found) + "\n",
        "mistakes.csv": validate_answers.as_csv(mistakes),
    }
    if differences is not None:
        texts["differences.csv"] = validate_answers.as_csv(differences)
    for name, text in texts.items():
        write_text(folder / name, text)
    if differences is None:  # an earlier one would be about another teacher
        remove(folder / "differences.csv")


def as_json(found: Validation) -> str:
    """Without the pictures, which are the page's."""
    plain = [one.model_copy(update={"png": ""}) for one in found.examples]
    return found.model_copy(update={"examples": plain}).model_dump_json(indent=2)
