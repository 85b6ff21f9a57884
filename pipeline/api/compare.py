"""Compare runs by their reports (`compress compare`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..config.limits import MAX_INTEGER
from ..config.stages import ROUND, get_kind
from ..errors import UsageError
from ..evaluation.results import (
    ComparedFile,
    ComparedRun,
    Comparison,
    Group,
    Kind,
    Search,
)
from ..report.assemble import assemble
from ..report.comparison_page import comparison_csv, render_comparison
from ..report.format import join_names, plural
from ..report.networks import Column, find_network
from ..report.summary import describe_machine, list_missing
from ..runs.artifacts import PREDICTIONS_FILE, VAL_PREDICTIONS_FILE, Predictions, read_predictions
from ..runs.files import check_writable, command_line, shorten_paths, write_text
from ..runs.folder import RunFolder
from ..runs.record import RECORD, read_checked
from ..runs.results import Report
from ..runs.scores import Score
from .ranking import KEYS, Scored, choose_winner, compare_scores, group_by_machine

REPORT = "report.json"

TEACHER = "teacher"
"""Folder of a sweep's teacher, a run without a student."""

STUDENT_STAGES = ("prepare", "student", "qat", ROUND)


@dataclass(frozen=True)
class Run:
    """A run with a unique name; ``path`` is its folder, or a report.json on its own."""

    name: str
    path: Path
    report: Report


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return every run once in the order given, those in a folder of runs by name, or raise UsageError."""
    unique = {run.resolve(): run for path in paths for run in _expand(path)}
    names = shorten_paths([path.parent if path.name == REPORT else path for path in unique])
    return [Run(name, path, _read_report(path)) for name, path in zip(names, unique.values(), strict=True)]


def _expand(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path.parent if path.name == REPORT and (path.parent / RECORD).is_file() else path
    elif _is_run(path):
        yield path
    elif path.is_dir():
        children = [child for child in sorted(path.iterdir()) if child.name != TEACHER and _is_run(child)]
        if not children:
            raise UsageError(f"{path} is not a run folder and does not contain any.")
        yield from children
    else:
        raise UsageError(f"{path} does not exist. Set it to a run folder, a folder of runs or a report.json.")


def _is_run(path: Path) -> bool:
    return (path / RECORD).is_file() or (path / REPORT).is_file()


def _read_report(path: Path) -> Report:
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():  # no stage is finished
        return assemble(RunFolder.read(path))
    try:
        return Report.model_validate(read_checked(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        reason = f"is not a report or is damaged ({error})"
        if isinstance(error, ValidationError):
            reason = "was written by another version of questpress"
        raise UsageError(f"{file} {reason}. Run compress report to write it again.") from error


def read_run_predictions(run: Run, file: str = PREDICTIONS_FILE) -> Predictions | None:
    """Return a run's predictions on its test images, or those of another file; None if there are none."""
    if not run.path.is_dir():
        return None
    if (run.path / RECORD).is_file():
        RunFolder.read(run.path).check_output(file)
    return read_predictions(run.path / file)


def list_thread_counts(report: Report) -> list[int]:
    """Return the numbers of threads at which the run's exported files were timed."""
    files = (report.student, report.student_int8)
    return sorted({int(count) for file in files if file is not None for count in file.latency_ms})


def summarize_run(run: Run, threads: int | None) -> ComparedRun:
    """Return the results of a run that are compared, with latencies at a number of threads."""
    report = run.report
    files = {kind: _summarize_file(find_network(report, key), kind, threads) for kind, key in KEYS.items()}
    student = report.student or report.student_int8
    seconds = [stage.seconds for stage in report.stages if get_kind(stage.stage) in STUDENT_STAGES]
    seed, teacher = report.config.get("seed"), report.config.get("teacher", [])
    teachers = [str(name) for name in (teacher if isinstance(teacher, list) else [teacher])]
    return ComparedRun(
        name=run.name,
        source=str(run.path),
        method=report.method,
        unlabeled=report.data.unlabeled if report.data else 0,
        teacher=join_names([network.name for network in report.teachers] or teachers),
        student=student.name if student is not None else str(report.config.get("student", "")),
        image_size=report.image_size,
        parameters=student.parameters if student else None,
        int8=files["int8"],
        fp32=files["fp32"],
        teacher_file=files["teacher"],
        val_score=_without_classes(report.student.val_score if report.student else None),
        training_seconds=sum(seconds) if seconds else None,
        seed=seed if isinstance(seed, int) and 0 <= seed <= MAX_INTEGER else None,
        data=report.data.name if report.data else None,
        fingerprint=report.data.fingerprint if report.data else None,
        machine=describe_machine(report.environment) if list_thread_counts(report) else None,
        missing=list_missing(report),
    )


def _summarize_file(column: Column | None, kind: Kind, threads: int | None) -> ComparedFile | None:
    if column is None or (kind == "teacher" and column.subject.score is None):
        return None
    subject = column.subject
    latency = subject.latency_ms.get(str(threads))
    median = None if latency is None else latency.percentiles.get("p50")
    return ComparedFile(
        kind=kind,
        network=subject.name,
        bytes=subject.bytes,
        score=_without_classes(subject.score),
        ece=subject.calibration.ece if subject.calibration else None,
        p50=median.value if median else None,
        p50_low=median.low if median else None,
        p50_high=median.high if median else None,
        speedup=next((s for s in subject.speedups if s.over == "teacher" and s.threads == threads), None),
    )


def _without_classes(score: Score | None) -> Score | None:
    return score and score.model_copy(update={"classes": []})


def compare(
    paths: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    threads: int | None = None,
    search: Search | None = None,
) -> Comparison:
    """Compare runs by their reports, as ``compress compare`` does. Nothing is measured.

    Args:
        paths: run folders, folders of runs, or report.json files.
        out: folder of comparison.html, .md, .csv and .json; ``comparison`` by default.
        threads: number of threads of the compared latencies; by default the smallest at which most runs were
            timed.
        search: how a sweep chose these runs; the run that ships is added.

    Returns:
        The content of ``comparison.json``.

    Raises:
        UsageError: a path is not a run, or no run was timed with this number of threads.
        JobError: the files cannot be written.
    """
    sources = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not sources:
        raise UsageError("At least one run folder is required.")
    folder = Path(out or "comparison")
    check_writable(folder)
    runs = find_runs(sources)
    threads = _choose_threads(runs, threads)
    summaries = {run.name: summarize_run(run, threads) for run in runs}
    predictions = {run.name: read_run_predictions(run) for run in runs}
    groups = group_runs(list(summaries.values()), predictions)
    data = ", ".join(dict.fromkeys(group.data for group in groups if group.data))
    comparison = Comparison(
        title=plural(len(runs), "run") + (f" on {data}" if data else ""),
        command=command_line(),
        threads=threads,
        runs=[summaries[name] for group in groups for name in group.runs],
        groups=groups,
        warnings=[*_list_warnings(list(summaries.values()), groups), *_list_disturbed(runs, threads)],
        notes=_list_notes(groups, threads),
        search=search
        and choose_winner(
            search,
            list(summaries.values()),
            predictions,
            {run.name: read_run_predictions(run, VAL_PREDICTIONS_FILE) for run in runs},
        ),
        folder=str(folder),
    )
    texts = {
        **render_comparison(comparison),
        "comparison.csv": comparison_csv(comparison),
        "comparison.json": comparison.model_dump_json(indent=2) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return comparison


def _choose_threads(runs: Sequence[Run], threads: int | None) -> int | None:
    counts = [count for run in runs for count in list_thread_counts(run.report)]
    if threads is not None and threads not in counts:
        available = ", ".join(map(str, sorted(set(counts)))) or "none"
        raise UsageError(f"--threads {threads}: no run was timed with it. Available: {available}.")
    return threads or min(counts, key=lambda count: (-counts.count(count), count), default=None)


def _list_warnings(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> list[str]:
    warnings = []
    with_data = [group for group in groups if group.fingerprint is not None]
    if len(with_data) > 1:
        names = [f"{group.data} ({plural(len(group.runs), 'run')})" for group in with_data]
        warnings.append(
            f"The runs use {len(with_data)} different data sets: {', '.join(names)}. Accuracies on different "
            "images are not comparable, so each data set has its own table."
        )
    if any(len(group.machines) > 1 for group in groups):
        warnings.append(
            "Some runs were timed on different machines, so their latencies are not comparable. "
            "`compress bench RUN RUN` times them together."
        )
    return warnings + [
        f"{run.name} is not finished; missing: {', '.join(run.missing)}." for run in runs if run.missing
    ]


def _list_disturbed(runs: Sequence[Run], threads: int | None) -> list[str]:
    names = [run.name for run in runs if run.report.bench and threads in run.report.bench.disturbed_threads]
    if not names:
        return []
    return [
        f"No latency is reported of {', '.join(names)}: other processes used the cores. Measure again with "
        "`compress bench RUN`."
    ]


def _list_notes(groups: Sequence[Group], threads: int | None) -> list[str]:
    differences = [difference for group in groups for difference in group.accuracies]
    notes = []
    if any(difference.paired for difference in differences):
        notes.append("Accuracy is compared with the best run on the same images by McNemar’s exact test.")
    if any(not difference.paired and difference.p is not None for difference in differences):
        notes.append(
            "Unpaired: a run has no stored predictions, so accuracies are compared by the chi-squared test, "
            "which has less power. `compress validate RUN RUN` compares the files image by image."
        )
    if any(difference.p is None for difference in differences):
        notes.append("mAP and AP differ if the 95 % intervals do not overlap, a test with little power.")
    if any(difference.p is not None for difference in differences):
        notes.append(
            "p is corrected for the number of comparisons with the best run (Holm). A difference with p of "
            "5 % or more is within noise."
        )
    if any(machine.latencies for group in groups for machine in group.machines):
        notes.append(
            f"Latency is that of one image with {plural(threads or 0, 'thread')}. A file is slower if the "
            "95 % interval of its median does not overlap with that of the fastest one. The runs were timed "
            "at different times: to resolve a few percent, time them together with `compress bench RUN RUN`."
        )
    return notes


def group_runs(runs: Sequence[ComparedRun], predictions: Mapping[str, Predictions | None]) -> list[Group]:
    """Group runs by data and compare those of each group; ``predictions`` are by run, on test images."""
    groups = []
    for fingerprint in dict.fromkeys(run.fingerprint for run in runs):
        members = sorted((run for run in runs if run.fingerprint == fingerprint), key=_best_first)
        scores = [
            Scored(run.name, run.ships.score, KEYS[run.ships.kind])
            for run in members
            if run.ships and run.ships.score
        ]
        groups.append(
            Group(
                data=members[0].data,
                fingerprint=fingerprint,
                n=scores[0].score.n if scores else None,
                runs=[run.name for run in members],
                best=scores[0].run if scores else None,
                accuracies=compare_scores(scores, predictions),
                machines=group_by_machine(members),
            )
        )
    return groups


def _best_first(run: ComparedRun) -> tuple[float, str]:
    score = run.ships.score if run.ships else None
    return (1.0 if score is None else -score.percent, run.name)
