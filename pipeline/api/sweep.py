"""Distill several students, at several sizes, with several methods, from one teacher (`compress sweep`).

As in CQKD (Čuk et al., 2023), a student with a smaller input sees the teacher's crops scaled down. The
teacher is trained or fine-tuned once, in a run folder named ``teacher``. Each student has an ordinary run
folder next to it. All runs share the cache, so the teacher's outputs are computed once.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ...export.runtime import height_width
from ...models.build import check_size, show_size
from ...models.build import resolve as resolve_name
from ..config.options import get_flag, get_stage, parse_pairs, parse_size
from ..errors import UsageError
from ..evaluation.results import Comparison
from ..methods import parse_methods
from ..runs import process
from ..runs.console import Display
from ..runs.folder import read_config
from ..runs.record import RECORD
from .compare import TEACHER, compare
from .options import merge_config, read_options
from .resolve import check_student_size, default_size, resolve
from .run import compress

SINGLE_RUN_OPTIONS = ("student_size", "until", "dry_run")


def sweep(
    *,
    students: Sequence[str] = (),
    student_sizes: Sequence[Any] = (),
    methods: Sequence[str] = (),
    **options: Any,
) -> Comparison:
    """Run ``compress`` for each student, size and method, and compare the runs.

    The same call again runs only what is missing.

    Args:
        students: timm names; the option ``student`` by default.
        student_sizes: sizes of the students' input, as ``student_size``; the teacher's by default.
        methods: distillation methods, sums, or ``none``; the option ``method`` by default.
        options: options of ``compress``. ``out`` is the folder of the run folders.

    Returns:
        The content of ``comparison/comparison.json``.

    Raises:
        UsageError: an option is wrong.
        JobError: as for ``compress``.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if methods:
        if options.get("method"):
            raise UsageError("--method and --methods cannot be used together. Remove --method.")
        _check_settings(options, methods)
    options = merge_config(options)
    options.pop("config", None)
    for name in SINGLE_RUN_OPTIONS:
        if options.get(name):
            raise UsageError(f"{get_flag(name)} applies to a single run. Remove it.")
    if not process.is_single_process():
        raise UsageError("compress sweep runs in a single process. Start it without torchrun.")
    if students:
        options["student"] = students[0]
    given = read_options(options)
    chosen_methods: list[str | None] = [*dict.fromkeys(methods)] or [None]
    students = list(dict.fromkeys(students)) or [given.student]
    try:
        sizes = sorted({parse_size(size) for size in student_sizes}, key=height_width, reverse=True)
    except ValueError as error:
        raise UsageError(f"--student-sizes {error}, got {','.join(map(str, student_sizes))}.") from error
    for student in students:
        resolve_name(student)
    if given.image_size is None:
        defaults = (default_size(given.data, student) for student in students)
        given.image_size = max([*sizes, *defaults], key=height_width)
    for size in sizes:
        check_student_size("--student-sizes", size, given.image_size)
        for student in students:
            check_size(student, size)
    for method in reversed(chosen_methods):
        checked = read_options(_select_options(options, method))
        checked.image_size = given.image_size
        chosen, images = resolve(checked)
    teachers = "-".join(dict.fromkeys(chosen.teacher))
    out = Path(options.get("out") or f"runs/{teachers}-{images.name}-sweep".replace("/", "-"))
    deadline = None if given.time_limit is None else time.monotonic() + given.time_limit
    display = Display(quiet=given.quiet, verbose=given.verbose)

    def run(folder: str, options: Mapping[str, Any], **more: Any) -> None:
        display.print(f"Run {out / folder}")
        left = None if deadline is None else max(1.0, deadline - time.monotonic())
        shared = {**options, "image_size": given.image_size, "time_limit": left}
        compress(**{**shared, **more, "out": out / folder})

    # Without options of the student, so that students and methods can be added later.
    recorded = read_config(out / TEACHER) if (out / TEACHER / RECORD).is_file() else {}
    student = recorded["student"] if recorded.get("student") in students else students[0]
    teacher = {name: value for name, value in options.items() if get_stage(name) in (None, "teacher")}
    method = recorded.get("method", "none")
    run(TEACHER, teacher, until="teacher", student=student, method=method, rounds=1)
    count = len(chosen.teacher)
    files = [f"{TEACHER}{'' if count == 1 else f'.{i}'}.safetensors" for i in range(count)]
    finished_teacher = {
        "teacher": chosen.teacher,
        "teachers_from_seeds": 1,
        "teacher_epochs": None,
        "teacher_warmup_epochs": None,
        "teacher_weights": [str(out / TEACHER / file) for file in files],
        "teacher_head": [head if head == "none" else "keep" for head in chosen.teacher_head],
    }
    folders = []
    for student, student_size, method in product(students, sizes or (None,), chosen_methods):
        size = "" if student_size is None else f"-{show_size(student_size)}"
        folders.append(f"{student.replace('/', '-')}{size}{f'-{method}' if method else ''}")
        sized = {"student": student, "student_size": student_size}
        run(folders[-1], _select_options(options, method), **sized, **finished_teacher)
    return compare([out / folder for folder in folders], out=out / "comparison")


def _select_options(options: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Return the options of a run with one method, without those of the other methods."""
    if method is None:
        return dict(options)
    names = [*parse_methods(method), "ce"]
    selected = {**options, "method": method}
    for name in ("settings", "weight"):
        if pairs := parse_pairs(options.get(name)):
            selected[name] = {key: value for key, value in pairs.items() if key.split(".")[0] in names}
    if method == "none":
        for name in ("cache_views", "balance", "rounds"):
            selected.pop(name, None)
    if "quest" not in names:
        selected.pop("cache_top", None)
    return selected


def _check_settings(options: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Raise UsageError for a setting that applies to none of the methods."""
    names = {"ce", *(name for method in methods for name in parse_methods(method))}
    for option in ("settings", "weight"):
        for key, value in (parse_pairs(options.get(option)) or {}).items():
            if key.split(".")[0] not in names:
                raise UsageError(
                    f"{get_flag(option)} {key}={value}: not a setting of the methods {', '.join(methods)}. "
                    "Remove it, or add its method."
                )
