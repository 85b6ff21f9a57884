"""Search for the right student: distill several from one teacher (`compress sweep`).

As in CQKD (Čuk et al., 2023), a student with a smaller input sees the teacher's crops scaled down. The
teacher is trained or fine-tuned once, in a run folder named ``teacher``. Each student has an ordinary run
folder next to it. All runs share the cache, so the teacher's outputs are computed once.

With a latency budget, students over it are dropped before any training. With ``keep``, successive halving
(Jamieson and Talwalkar, 2016) drops the worse half after each of a few short trainings, which are run folders
in ``trials``. ``search.json`` records both.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, inf, log2, nan
from pathlib import Path
from typing import Any

from ...export.latency.machine import environment
from ...export.runtime import Size, height_width
from ...models.build import resolve as resolve_name
from ...models.build import show_size
from ...models.catalog import GOOD_STUDENTS
from ..config.network import NetworkSpec
from ..config.options import Options, get_flag, get_stage, parse_pairs, parse_size
from ..data.dataset import ImageSet
from ..errors import JobError, UsageError
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
from ..training.context import STUDENT
from ..training.weights import check_weights
from .compare import TEACHER, compare
from .options import default_size, merge_config, read_options
from .resolve import resolve
from .run import compress

SEARCH, TRIALS = "search.json", "trials"

SINGLE_RUN_OPTIONS = ("student_size", "until", "dry_run")


def sweep(
    *,
    students: str | Sequence[str] = (),
    student_sizes: Sequence[Any] = (),
    methods: str | Sequence[str] = (),
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
    given_options = {name: value for name, value in options.items() if value is not None}
    students, methods = ([x] if isinstance(x, str) else [*dict.fromkeys(x)] for x in (students, methods))
    budget = None if max_latency is None else _parse_latency(max_latency)
    if keep is not None and keep < 1:
        raise UsageError(f"--keep must be at least 1, got {keep}.")
    if min_accuracy is not None and not 1 <= min_accuracy <= 100:
        raise UsageError(f"--min-accuracy must be 1 to 100 percent, such as 95, got {min_accuracy:g}.")
    for option, names in (("student", students), ("method", methods)):
        if names and given_options.get(option):
            raise UsageError(f"--{option} and --{option}s cannot be used together. Remove --{option}.")
    if len(methods) > 1 and given_options.get("baseline"):
        raise UsageError("--baseline would repeat for each of --methods. Add none to --methods instead.")
    options = merge_config(given_options)
    options.pop("config", None)
    for name in SINGLE_RUN_OPTIONS:
        if options.get(name):
            raise UsageError(f"{get_flag(name)} applies to a single run. Remove it.")
    if not process.is_single_process():
        raise UsageError("compress sweep runs in a single process. Start it without torchrun.")
    if students == ["auto"]:
        if budget is None and keep is None:
            raise UsageError("--students auto requires --max-latency or --keep, such as --max-latency 5ms.")
        students = [*GOOD_STUDENTS]
    if students:
        options["student"] = students[0]
    given = read_options(options)
    if methods:
        _check_settings(given_options, methods)
    students = students or [given.student]
    try:
        sizes = sorted({parse_size(size) for size in student_sizes}, key=height_width, reverse=True)
    except ValueError as error:
        raise UsageError(f"--student-sizes {error}, got {','.join(map(str, student_sizes))}.") from error
    if given.image_size is None:
        defaults = (default_size(given.data, student, given.teacher) for student in students)
        given.image_size = max([*sizes, *defaults], key=height_width)
    options["image_size"] = given.image_size
    candidates, images = _list_candidates(options, students, sizes, methods)
    chosen = next(iter(candidates.values())).chosen
    if keep is not None and not images.val:
        raise UsageError("--keep requires val images. Hold some out with --val-fraction 0.1.")
    teachers = "-".join(dict.fromkeys(chosen.teacher))
    out = Path(options.get("out") or f"runs/{teachers}-{images.name}-sweep".replace("/", "-"))
    deadline = None if given.time_limit is None else time.monotonic() + given.time_limit
    display = Display(quiet=given.quiet, verbose=given.verbose)

    search = Search(max_latency=budget, min_accuracy=min_accuracy)
    if budget is not None:
        check_outside_data(chosen.data, {"--out": out})
        specs = {c.student: _to_spec(c.chosen, len(images.classes)) for c in candidates.values()}
        _drop_slow(search, specs, chosen, out / SEARCH, display)
        candidates = {name: c for name, c in candidates.items() if c.student not in search.over}
    for name, candidate in candidates.items():
        if not (out / name / STUDENT).is_file():
            check_weights(candidate.chosen, images, {"student"}, download=True)

    def run(folder: str, options: Mapping[str, Any], **more: Any) -> Report:
        display.print(f"Run {out / folder}")
        left = None if deadline is None else max(1.0, deadline - time.monotonic())
        return compress(**{**options, "time_limit": left, **more, "out": out / folder})

    run(TEACHER, _teacher_options(options, students[0], out), until="teacher", rounds=1)
    finished_teacher = _finished_teacher(chosen, out)

    def run_student(name: str, folder: str, **more: Any) -> Report | None:
        """Return the report of a run, or None if it fails: the other candidates are run all the same."""
        try:
            return run(folder, {**candidates[name].given, **finished_teacher}, **more)
        except Exception as error:
            if getattr(error, "exit_code", None) != JobError.exit_code:
                raise
            display.warn(f"{name} failed: {error}")
            search.failed[name] = str(error)
            return None

    def try_out(name: str, divisor: int) -> Trial | None:
        shorter = shorten(candidates[name].chosen, read_options(candidates[name].given), divisor)
        folder = f"{TRIALS}/{shorter['epochs']}-epochs/{name}"
        report = run_student(name, folder, **shorter, until="student")
        if report is None:
            return None
        assert report.student is not None and report.student.val_score is not None
        score = report.student.val_score.model_copy(update={"classes": []})
        return Trial(run=name, epochs=shorter["epochs"], val_score=score, kept=False)

    kept = [*candidates]
    if keep is not None:
        kept, search.trials = halve(kept, keep, try_out)
    finished = [out / name for name in kept if run_student(name, name) is not None]
    record(out / SEARCH, search)
    if not finished:
        raise JobError(f"No student was trained. {'; '.join(map(': '.join, search.failed.items()))}")
    return compare(finished, out=out / "comparison", search=search)


@dataclass(frozen=True)
class Candidate:
    """A student, a size and a method."""

    student: str
    """Name of the run without the method, which does not change the latency."""
    given: dict[str, Any]
    chosen: Options
    """The same options with all defaults."""


def _list_candidates(
    options: Mapping[str, Any], students: Sequence[str], sizes: Sequence[Size], methods: Sequence[str]
) -> tuple[dict[str, Candidate], ImageSet]:
    """Return the candidates by the names of their runs, and the data. Raises UsageError if one is wrong."""
    candidates: dict[str, Candidate] = {}
    for student, size, method in product(students, sizes or (None,), methods or (None,)):
        parts = [re.sub("[/:]", "-", student), *([] if size is None else [show_size(size)])]
        given = {**_select_options(options, method), "student": student}
        if size is not None:
            given["student_size"] = size
        chosen, images = resolve(read_options(given))
        name = "-".join([*parts, *([method] if method else [])])
        candidates[name] = Candidate("-".join(parts), given, chosen)
    return candidates, images


def _to_spec(chosen: Options, classes: int) -> NetworkSpec:
    """Return the untrained student."""
    size = chosen.student_size or chosen.image_size
    assert size is not None
    name, activation = resolve_name(chosen.student), chosen.activation
    return NetworkSpec(name, size, classes, "", activation=activation, resize=chosen.resize)


def _teacher_options(options: Mapping[str, Any], student: str, out: Path) -> dict[str, Any]:
    """Return the options of the teacher's run, so that students and methods can be added to it later."""
    recorded = read_config(out / TEACHER) if (out / TEACHER / RECORD).is_file() else {}
    names = {"student": recorded.get("student", student), "method": recorded.get("method", "none")}
    stages = (None, "teacher")
    kept = {name: options[name] for name in options if get_stage(name) in stages and name != "unlabeled"}
    return {**kept, **names}


def _finished_teacher(chosen: Options, out: Path) -> dict[str, Any]:
    """Return the options by which a student's run starts from the weights of the teacher's run."""
    count = len(chosen.teacher)
    files = [f"{TEACHER}{'' if count == 1 else f'.{i}'}.safetensors" for i in range(count)]
    return {
        "teacher": chosen.teacher,
        "teachers_from_seeds": 1,
        "teacher_epochs": None,
        "teacher_warmup_epochs": None,
        "teacher_weights": [str(out / TEACHER / file) for file in files],
        "teacher_head": [head if head == "none" else "keep" for head in chosen.teacher_head],
    }


def halve(
    names: Sequence[str], keep: int, try_out: Callable[[str, int], Trial | None]
) -> tuple[list[str], list[Trial]]:
    """Drop the worse half by val accuracy after each of a few short trainings, until ``keep`` remain.

    Args:
        try_out: trains a candidate for the epochs of a full training divided by a number: 2 in the last
            round, twice as much in each one before; returns None if that failed.

    Returns:
        The remaining names, and all trials, those of a round together, the best first.
    """
    left, trials = list(names), []
    while len(left) > keep:
        rounds = ceil(log2(len(left) / keep))
        # The sort is stable: of equal ones, the first one named.
        tried = [trial for name in left if (trial := try_out(name, 2**rounds)) is not None]
        ranked = sorted(tried, key=lambda trial: -trial.val_score.percent)
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
        shorter["milestones"] = sorted({max(1, int(epoch * part)) for epoch in given.milestones})
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
    before = Search() if chosen.fresh else _read_record(file)
    stored = {measured.candidate: measured for measured in before.latencies}
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
    """Write how a sweep chose, with the latencies that earlier commands measured."""
    before = _read_record(file)
    latencies = {measured.candidate: measured for measured in (*before.latencies, *search.latencies)}
    merged = search.model_copy(update={"latencies": [*latencies.values()]})
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
        for name in ("cache_views", "balance", "rounds", "unlabeled", "unlabeled_ratio", "baseline"):
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
