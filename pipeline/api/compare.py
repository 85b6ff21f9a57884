"""Compare runs by their reports (`compress compare`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ..config.limits import MAX_INTEGER
from ..config.stages import ROUND, get_kind
from ..errors import UsageError
from ..evaluation.comparison import SIGNIFICANT, compare_unpaired, frontier, holm, mcnemar
from ..evaluation.results import (
    AccuracyDifference,
    ComparedFile,
    ComparedRun,
    Comparison,
    Group,
    Kind,
    LatencyDifference,
    Machine,
    Search,
    Winner,
)
from ..report.assemble import assemble
from ..report.comparison_page import comparison_csv, measured_files, render_comparison
from ..report.format import join_names, plural
from ..report.networks import Column, find_network
from ..report.summary import describe_machine, list_missing
from ..runs.artifacts import PREDICTIONS_FILE, Predictions, read_predictions
from ..runs.files import check_writable, command_line, shorten_paths, write_text
from ..runs.folder import RunFolder
from ..runs.record import RECORD, read_checked
from ..runs.results import Report
from ..runs.scores import Score

REPORT = "report.json"

TEACHER = "teacher"
"""Folder of a sweep's teacher, a run without a student."""

STUDENT_STAGES = ("prepare", "student", "qat", ROUND)

KEYS: dict[Kind, str] = {"int8": "student_int8", "fp32": "student", "teacher": "teacher"}
"""Names of the files in ``Report`` and ``Predictions``."""


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


def read_run_predictions(run: Run) -> Predictions | None:
    """Return a run's predictions on its test images, or None if there are none."""
    if not run.path.is_dir():
        return None
    if (run.path / RECORD).is_file():
        RunFolder.read(run.path).check_output(PREDICTIONS_FILE)
    return read_predictions(run.path / PREDICTIONS_FILE)


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
        teacher=join_names([network.name for network in report.teachers] or teachers),
        student=student.name if student is not None else str(report.config.get("student", "")),
        image_size=report.image_size,
        parameters=student.parameters if student else None,
        int8=files["int8"],
        fp32=files["fp32"],
        teacher_file=files["teacher"],
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
        score=subject.score.model_copy(update={"classes": []}) if subject.score else None,
        ece=subject.calibration.ece if subject.calibration else None,
        p50=median.value if median else None,
        p50_low=median.low if median else None,
        p50_high=median.high if median else None,
        speedup=next((s for s in subject.speedups if s.over == "teacher" and s.threads == threads), None),
    )


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
        search=search and choose_winner(search, list(summaries.values()), predictions),
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
        scores = [(run, run.ships.score) for run in members if run.ships and run.ships.score]
        groups.append(
            Group(
                data=members[0].data,
                fingerprint=fingerprint,
                n=scores[0][1].n if scores else None,
                runs=[run.name for run in members],
                best=scores[0][0].name if scores else None,
                accuracies=compare_scores(scores, predictions),
                machines=group_by_machine(members),
            )
        )
    return groups


def _best_first(run: ComparedRun) -> tuple[float, str]:
    score = run.ships.score if run.ships else None
    return (1.0 if score is None else -score.percent, run.name)


def compare_scores(
    scores: Sequence[tuple[ComparedRun, Score]], predictions: Mapping[str, Predictions | None]
) -> list[AccuracyDifference]:
    """Compare the shipped file of each run with that of the first one, which has the best score."""
    differences = [_compare(run, score, *scores[0], predictions) for run, score in scores[1:]]
    tested = {i: difference.p for i, difference in enumerate(differences) if difference.p is not None}
    for i, p_holm in zip(tested, holm(list(tested.values())), strict=True):
        differences[i].p_holm, differences[i].within_noise = p_holm, p_holm >= SIGNIFICANT
    return differences


def _compare(
    run: ComparedRun,
    score: Score,
    best: ComparedRun,
    best_score: Score,
    predictions: Mapping[str, Predictions | None],
) -> AccuracyDifference:
    """Test image by image if both runs have predictions on the same images, otherwise by their scores."""
    difference = AccuracyDifference(
        run=run.name,
        best=best.name,
        points=score.percent - best_score.percent,
        paired=False,
        within_noise=score.high >= best_score.low,
    )
    own, other = (_select_predictions(r, predictions) for r in (run, best))
    if own is not None and other is not None and own[0].has_same_images(other[0]):
        correct, best_correct = own[0].is_correct(own[1]), other[0].is_correct(other[1])
        p = mcnemar(int((best_correct & ~correct).sum()), int((correct & ~best_correct).sum()))
        return difference.model_copy(update={"p": p, "paired": True})
    if score.correct is None or best_score.correct is None:
        return difference
    test = compare_unpaired(score, best_score)
    return difference.model_copy(update={"p": test.p, "low": test.low, "high": test.high})


def choose_winner(
    search: Search, runs: Sequence[ComparedRun], predictions: Mapping[str, Predictions | None]
) -> Search:
    """Add the run that ships: the most accurate one within the budget, or a faster one that is not worse.

    Latency is that of the shipped file. A run is not worse if its accuracy does not differ significantly.
    """
    files = [(run, run.ships) for run in sorted(runs, key=_best_first) if run.ships]
    budget = search.max_latency
    allowed = [(run, f) for run, f in files if budget is None or (f.p50 is not None and f.p50 <= budget)]
    scores = [(run, file.score) for run, file in allowed if file.score]
    if not scores:
        return search
    differences = {d.run: d for d in compare_scores(scores, predictions)}
    best = scores[0][0]
    tied = [run for run, _ in scores if run is best or differences[run.name].within_noise]
    here = [machine for machine in group_by_machine(tied) if best.name in machine.runs]
    timed = [run for run in tied if here and run.name in here[0].runs] or [best]
    fastest = next((run for run in tied if here and run.name == here[0].runs[0]), best)
    # Of those that are as fast, the most accurate one.
    chosen = next(run for run in timed if run is fastest or _compare_latency(run, fastest) == "no difference")
    reason: Literal["most accurate", "faster"] = "most accurate" if chosen is best else "faster"
    winner = Winner(run=chosen.name, reason=reason, difference=differences.get(chosen.name))
    return search.model_copy(update={"winner": winner})


def _select_predictions(
    run: ComparedRun, predictions: Mapping[str, Predictions | None]
) -> tuple[Predictions, str] | None:
    """Return a run's predictions and the name of its shipped file in them, if they match its report."""
    stored, file = predictions.get(run.name), run.ships
    assert file is not None and file.score is not None
    key = KEYS[file.kind]
    if stored is None or key not in stored.classes:
        return None
    correct = stored.is_correct(key)
    return (stored, key) if (correct.sum(), len(correct)) == (file.score.correct, file.score.n) else None


def group_by_machine(runs: Sequence[ComparedRun]) -> list[Machine]:
    """Group timed runs by machine and compare the latencies on each."""
    timed = [(run.ships.p50, run) for run in runs if run.ships and run.ships.p50]
    machines = []
    for name in dict.fromkeys(run.machine for _, run in timed):
        members = [pair for pair in timed if pair[1].machine == name]
        members.sort(key=lambda pair: (pair[0], pair[1].name))
        least, fastest = members[0]
        files = measured_files([run for _, run in members])
        points = [(file.p50 or 0.0, file.score.percent if file.score else 0.0) for _, file in files]
        machines.append(
            Machine(
                machine=name or "an unknown machine",
                runs=[run.name for _, run in members],
                latencies=[
                    LatencyDifference(
                        run=run.name,
                        fastest=fastest.name,
                        ratio=p50 / least,
                        verdict=_compare_latency(run, fastest),
                    )
                    for p50, run in members[1:]
                ],
                frontier=[files[i][0] for i in frontier(points)],
            )
        )
    return machines


def _compare_latency(run: ComparedRun, fastest: ComparedRun) -> Literal["no difference", "slower", "unknown"]:
    file, reference = run.ships, fastest.ships
    if not file or not reference or file.p50_low is None or reference.p50_high is None:
        return "unknown"
    return "slower" if file.p50_low > reference.p50_high else "no difference"
