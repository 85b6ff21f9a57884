"""Search for the right student: distill several from one teacher (`compress sweep`).

As in CQKD (Čuk et al., 2023), a student with a smaller input sees the teacher's crops scaled down. The
teacher is trained or fine-tuned once, in a run folder named ``teacher``. Each student has an ordinary run
folder next to it. All runs share the cache, so the teacher's outputs are computed once.

With a latency budget, students over it are dropped before any training. With ``keep``, successive halving
(Jamieson and Talwalkar, 2016) drops the worse half after each of a few short trainings, which are run folders
in ``trials``. ``search.json`` records both.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil, inf, log2, nan
from pathlib import Path
from typing import Any

from ...export.latency.machine import environment
from ...export.runtime import height_width
from ...models.build import check_size, show_size
from ...models.build import resolve as resolve_name
from ...models.catalog import GOOD_STUDENTS
from ..config.network import NetworkSpec
from ..config.options import Options, get_flag, get_stage, parse_pairs, parse_size
from ..errors import UsageError
from ..evaluation.results import Comparison, Search, Trial, UntrainedLatency
from ..evaluation.untrained import SECONDS, measure_untrained
from ..methods import parse_methods
from ..report import format
from ..runs import process
from ..runs.console import Display
from ..runs.files import check_outside_data, check_writable, write_text
from ..runs.folder import read_config
from ..runs.record import RECORD
from ..runs.results import Report
from .compare import TEACHER, compare
from .options import default_size, merge_config, read_options
from .resolve import check_student_size, resolve
from .run import compress

SEARCH, TRIALS = "search.json", "trials"

SINGLE_RUN_OPTIONS = ("student_size", "until", "dry_run")


def sweep(
    *,
    students: Sequence[str] = (),
    student_sizes: Sequence[Any] = (),
    methods: Sequence[str] = (),
    max_latency: str | float | None = None,
    min_accuracy: float | None = None,
    keep: int | None = None,
    **options: Any,
) -> Comparison:
    """Run ``compress`` for each student, size and method, and compare the runs.

    The same call again runs only what is missing.

    Args:
        students: timm names, or ``auto`` alone for ``GOOD_STUDENTS``; the option ``student`` by default.
        student_sizes: sizes of the students' input, as ``student_size``; the teacher's by default.
        methods: distillation methods, sums, or ``none``; the option ``method`` by default.
        max_latency: milliseconds, also as ``5ms``. Students over it are not trained: the median latency of
            one image here on one thread, with random weights, as fp32 or int8 file, whichever is faster.
        min_accuracy: percent, also of mAP or AP. The fastest student of that accuracy ships, instead of the
            most accurate one.
        keep: number of runs to train fully, chosen by successive halving on val images; all by default.
        options: options of ``compress``. ``out`` is the folder of the run folders.

    Returns:
        The content of ``comparison/comparison.json``.

    Raises:
        UsageError: an option is wrong, or all students are over the latency budget.
        JobError: as for ``compress``.
    """
    options = {name: value for name, value in options.items() if value is not None}
    budget = None if max_latency is None else _parse_latency(max_latency)
    if keep is not None and keep < 1:
        raise UsageError(f"--keep must be at least 1, got {keep}.")
    if min_accuracy is not None and not 1 <= min_accuracy <= 100:
        raise UsageError(f"--min-accuracy must be 1 to 100 percent, such as 95, got {min_accuracy:g}.")
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
    if [*students] == ["auto"]:
        if "student" in options:
            raise UsageError("--students auto and --student cannot be used together. Remove --student.")
        if budget is None and keep is None:
            raise UsageError("--students auto requires --max-latency or --keep, such as --max-latency 5ms.")
        students = GOOD_STUDENTS
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
        defaults = (default_size(given.data, student, given.teacher) for student in students)
        given.image_size = max([*sizes, *defaults], key=height_width)
    for size in sizes:
        check_student_size("--student-sizes", size, given.image_size)
        for student in students:
            check_size(student, size)
    for method in reversed(chosen_methods):
        checked = read_options(_select_options(options, method))
        checked.image_size = given.image_size
        chosen, images = resolve(checked)
    if keep is not None and not images.val:
        raise UsageError("--keep requires val images. Hold some out with --val-fraction 0.1.")
    teachers = "-".join(dict.fromkeys(chosen.teacher))
    out = Path(options.get("out") or f"runs/{teachers}-{images.name}-sweep".replace("/", "-"))
    deadline = None if given.time_limit is None else time.monotonic() + given.time_limit
    display = Display(quiet=given.quiet, verbose=given.verbose)

    sized = {
        f"{student.replace('/', '-')}{'' if size is None else f'-{show_size(size)}'}": (student, size)
        for student, size in product(students, sizes or (None,))
    }
    search = Search(max_latency=budget, min_accuracy=min_accuracy)
    if budget is not None:
        check_outside_data(chosen.data, {"--out": out})
        specs = {
            name: NetworkSpec(
                resolve_name(student),
                size or given.image_size,
                len(images.classes),
                "",
                activation=chosen.activation,
                resize=chosen.resize,
            )
            for name, (student, size) in sized.items()
        }
        _drop_slow(search, specs, chosen, out / SEARCH, display)

    def run(folder: str, options: Mapping[str, Any], **more: Any) -> Report:
        display.print(f"Run {out / folder}")
        left = None if deadline is None else max(1.0, deadline - time.monotonic())
        shared = {**options, "image_size": given.image_size, "time_limit": left}
        return compress(**{**shared, **more, "out": out / folder})

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
    runs = {
        f"{name}{f'-{method}' if method else ''}": {
            **_select_options(options, method),
            **finished_teacher,
            "student": student,
            "student_size": size,
        }
        for (name, (student, size)), method in product(sized.items(), chosen_methods)
        if name not in search.over
    }

    def try_out(name: str, divisor: int) -> Trial:
        checked = read_options({key: value for key, value in runs[name].items() if value is not None})
        checked.image_size = given.image_size
        shorter = shorten(resolve(checked)[0], checked, divisor)
        folder = f"{TRIALS}/{shorter['epochs']}-epochs/{name}"
        student = run(folder, runs[name], **shorter, until="student").student
        assert student is not None and student.val_score is not None
        score = student.val_score.model_copy(update={"classes": []})
        return Trial(run=name, epochs=shorter["epochs"], val_score=score, kept=False)

    kept = [*runs]
    if keep is not None:
        kept, search.trials = halve(kept, keep, try_out)
    record(out / SEARCH, search)
    for name in kept:
        run(name, runs[name])
    return compare([out / name for name in kept], out=out / "comparison", search=search)


def halve(
    names: Sequence[str], keep: int, try_out: Callable[[str, int], Trial]
) -> tuple[list[str], list[Trial]]:
    """Drop the worse half by val accuracy after each of a few short trainings, until ``keep`` remain.

    Args:
        try_out: trains a candidate for the epochs of a full training divided by a number: 2 in the last
            round, twice as much in each one before.

    Returns:
        The remaining names, and all trials, those of a round together, the best first.
    """
    left, trials = list(names), []
    while len(left) > keep:
        rounds = ceil(log2(len(left) / keep))
        # The sort is stable: of equal ones, the first one named.
        ranked = sorted((try_out(name, 2**rounds) for name in left), key=lambda t: -t.val_score.percent)
        count = max(keep, ceil(len(left) / 2))
        trials += [trial.model_copy(update={"kept": i < count}) for i, trial in enumerate(ranked)]
        better = {trial.run for trial in ranked[:count]}
        left = [name for name in left if name in better]
    return left, trials


def shorten(chosen: Options, given: Options, divisor: int) -> dict[str, Any]:
    """Return ``epochs`` divided by a number, and the options in ``given`` that are epochs in proportion.

    ``chosen`` are the same options with all defaults.
    """
    assert chosen.epochs is not None
    epochs = max(1, chosen.epochs // divisor)
    part = epochs / chosen.epochs
    shorter: dict[str, Any] = {"epochs": epochs}
    if given.warmup_epochs is not None:
        shorter["warmup_epochs"] = given.warmup_epochs * part
    if given.milestones is not None:
        shorter["milestones"] = [max(1, int(epoch * part)) for epoch in given.milestones]
    if given.average_last is not None:
        shorter["average_last"] = max(1, int(given.average_last * part))
    return shorter


def _parse_latency(text: str | float) -> float:
    try:
        value = float(str(text).strip().removesuffix("ms"))
    except ValueError:
        value = nan
    if not 0 < value < inf:
        raise UsageError(f"--max-latency must be milliseconds greater than 0, such as 5ms, got {text}.")
    return value


def _drop_slow(
    search: Search, specs: Mapping[str, NetworkSpec], chosen: Options, file: Path, display: Display
) -> None:
    """Set ``latencies`` and ``over`` of ``search``. Raises UsageError if all are over the budget."""
    budget = search.max_latency
    assert budget is not None
    latencies = _measure(specs, chosen, file, display)
    search.latencies = [latencies[name] for name in specs]
    search.over = [name for name in specs if latencies[name].best > budget]
    nearest = sorted(search.latencies, key=lambda measured: measured.best)
    if len(search.over) == len(specs):
        names = ", ".join(f"{m.candidate} {format.milliseconds(m.best)}" for m in nearest[:3])
        raise UsageError(
            f"--max-latency: no student is within {budget:g} ms on this machine; the nearest: {names}. "
            "Allow more, or try smaller --students or --student-sizes."
        )
    for measured in nearest:
        over = ", over the budget: not trained" if measured.candidate in search.over else ""
        display.print(f"{measured.candidate}: {format.milliseconds(measured.best)}{over}")


def _measure(
    specs: Mapping[str, NetworkSpec], chosen: Options, file: Path, display: Display
) -> dict[str, UntrainedLatency]:
    """Return the latency of each candidate; only those without one in ``file`` are measured, and added."""
    machine = environment()
    here = f"{machine.cpu}, {' '.join(machine.flags)}, ONNX Runtime {machine.onnxruntime}"
    setups = {
        name: f"{spec}, {chosen.input} input, opset {chosen.opset}, {here}" for name, spec in specs.items()
    }
    stored = {measured.candidate: measured for measured in _read_record(file).latencies}
    missing = {
        name: spec for name, spec in specs.items() if name not in stored or stored[name].setup != setups[name]
    }
    if missing:
        check_writable(file.parent)
        with display.stage("latency") as progress:
            measured = measure_untrained(
                missing,
                takes_pixels=chosen.input == "uint8",
                opset=chosen.opset,
                seconds=min(SECONDS, chosen.bench_seconds),
                seed=chosen.seed,
                progress=lambda fraction, step: progress.update("timing", fraction, 1.0, more=step),
            )
        stored |= {m.candidate: m.model_copy(update={"setup": setups[m.candidate]}) for m in measured}
        record(file, Search(latencies=[*stored.values()]))
    return stored


def _read_record(file: Path) -> Search:
    try:
        return Search.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or of another version: measured again
        return Search()


def record(file: Path, search: Search) -> None:
    """Write how a sweep chose, with the latencies and trials of earlier commands."""
    before = _read_record(file)
    latencies = {measured.candidate: measured for measured in (*before.latencies, *search.latencies)}
    again = {(trial.run, trial.epochs) for trial in search.trials}
    trials = [trial for trial in before.trials if (trial.run, trial.epochs) not in again] + search.trials
    merged = search.model_copy(update={"latencies": [*latencies.values()], "trials": trials})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, merged.model_dump_json(indent=2) + "\n")


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
