"""The page of a comparison: the best run, significant differences, a chart and a table for each data set."""

from collections.abc import Sequence
from math import isfinite

from ...models.build import show_size
from ..evaluation.results import (
    AccuracyDifference,
    ComparedFile,
    ComparedRun,
    Comparison,
    Group,
    Machine,
    Search,
)
from ..runs.files import to_csv
from . import format
from .charts import Chart
from .page import Page, Section
from .render import render_page
from .scatter import Point, scatter
from .tables import Table

KINDS = {
    "int8": ("student_int8", "student, int8"),
    "fp32": ("student", "student, fp32"),
    "teacher": ("teacher", "teacher"),
}
"""Key of the style sheet and meaning of each kind of file."""
NO_FILE = ComparedFile(kind="int8", network="")
"""A file that a run lacks: its results are shown as missing."""


def render_comparison(comparison: Comparison) -> dict[str, str]:
    """Return the page as HTML and as Markdown, by file name."""
    return render_page(comparison_page(comparison), "comparison")


def comparison_page(comparison: Comparison) -> Page:
    groups = [_section(comparison, group, i) for i, group in enumerate(comparison.groups, 1)]
    if comparison.search is not None:
        groups.insert(0, _search_section(comparison, comparison.search))
    run_folders = [
        [run.name, run.source, run.machine or format.MISSING, run.fingerprint or format.MISSING]
        for run in comparison.runs
    ]
    columns = ["run", "path", "benchmarked on", "fingerprint of the data"]
    details = Section(
        "Details",
        "details",
        text=comparison.notes,
        command=comparison.command,
        tables=[Table("Runs", columns, run_folders, code=frozenset({1, 3}), text=True)],
    )
    return Page(
        kind="comparison",
        title=comparison.title,
        lead="Test results of each run, measured on the exported files in ONNX Runtime. Each student has an "
        "fp32 and an int8 file; the int8 file ships if there is one.",
        sections=[*groups, details.fold()],
        footer="questpress. comparison.html, comparison.md, comparison.csv and comparison.json have the same "
        "content.",
        data_file="comparison.json",
        warnings=comparison.warnings,
    )


def _section(comparison: Comparison, group: Group, number: int) -> Section:
    return Section(
        _title(group),
        f"group-{number}",
        text=conclusions(comparison, group),
        figures=[_chart(comparison, group, machine) for machine in group.machines],
        tables=[_table(comparison, group)],
        folded=[_other_files(comparison, group), _trainings(comparison, group)],
    )


def _search_section(comparison: Comparison, search: Search) -> Section:
    latencies = [
        [
            measured.candidate,
            format.milliseconds(measured.fp32),
            format.milliseconds(measured.int8),
            "over the budget, not trained" if measured.candidate in search.over else "within the budget",
        ]
        for measured in sorted(search.latencies, key=lambda measured: measured.best)
    ]
    trials = [
        [trial.run, str(trial.epochs), format.score(trial.val_score), "kept" if trial.kept else "dropped"]
        for trial in search.trials
    ]
    return Section(
        "The student that ships",
        "search",
        text=describe_search(comparison, search),
        tables=[
            Table("Latency before training", ["student", "fp32", "int8", ""], latencies),
            Table("Short trainings", ["run", "epochs", "on val images", ""], trials),
        ],
    )


def describe_search(comparison: Comparison, search: Search) -> list[str]:
    """Return which student ships and why, and which candidates were dropped."""
    budget = "" if search.max_latency is None else f" within {format.milliseconds(search.max_latency)}"
    least = "" if search.min_accuracy is None else f" with at least {search.min_accuracy:g} %"
    sentences = []
    if search.winner is None:
        sentences.append(f"No student ships: none{least} was measured{budget}.")
    else:
        winner = search.winner
        run = comparison.run(winner.run)
        is_timed = run.ships is not None and run.ships.p50 is not None
        file = run.fp32 if is_timed and winner.timed == "fp32" else run.ships
        assert file is not None and file.score is not None
        budget = budget if is_timed else ""
        latency = "" if file.p50 is None else f", {format.milliseconds(file.p50)}"
        images = format.plural(winner.n, f"{winner.split} image")
        why = f"the most accurate{budget} on {images}"
        if winner.reason == "fastest":
            why = f"the fastest{budget}{least} on {images}"
        elif winner.difference is not None:
            difference = describe_difference(winner.difference, winner.n)
            why = f"faster and on {images} not worse than {winner.difference.best} ({difference})"
        score = f"{format.score(file.score)} on test images"
        sentences.append(f"Ships: {winner.run}, {score}, {file.kind}{latency}; {why}.")
        if winner.timed != file.kind:
            sentences.append(
                f"The {file.kind} file is for another processor and was not timed here: latencies are those "
                f"of the {winner.timed} files on this machine."
            )
    if search.over:
        latencies = {measured.candidate: measured.best for measured in search.latencies}
        names = ", ".join(f"{name} ({format.milliseconds(latencies[name])})" for name in search.over)
        sentences.append(f"Over the budget before training: {names}.")
    if dropped := [trial for trial in search.trials if not trial.kept]:
        names = ", ".join(
            f"{trial.run} (after {format.plural(trial.epochs, 'epoch')}, "
            f"{format.score_percent(trial.val_score)} on val images)"
            for trial in dropped
        )
        sentences.append(f"Dropped after a short training: {names}.")
    sentences += [f"Failed: {name}: {error}" for name, error in search.failed.items()]
    return sentences


def _title(group: Group) -> str:
    title = f"On {group.data}" if group.data else "Without data yet"
    return title + (f", {format.plural(group.n, 'test image')}" if group.n else "")


def score_name(comparison: Comparison, group: Group) -> str:
    """Return the name of the score of the group's runs: accuracy, mAP or AP."""
    runs = [comparison.run(name) for name in group.runs]
    files = (file for run in runs for file in (run.int8, run.fp32, run.teacher_file))
    return next((file.score.metric for file in files if file and file.score), "accuracy")


def conclusions(comparison: Comparison, group: Group) -> list[str]:
    """Return the best run, the runs that differ from it significantly, and the fastest run."""
    sentences = []
    if group.best is not None:
        shipped = comparison.run(group.best).ships
        assert shipped is not None and shipped.score is not None
        rank = "Most accurate" if group.accuracies else "Only measured run"
        score = f"{score_name(comparison, group)} {format.score(shipped.score)}"
        sentences.append(f"{rank}: {group.best}, {score}, {shipped.kind}.")
        for within_noise, verdict in ((True, "Not significantly different"), (False, "Significantly worse")):
            if runs := [d for d in group.accuracies if d.within_noise == within_noise]:
                names = "; ".join(f"{d.run} ({describe_difference(d, group.n)})" for d in runs)
                sentences.append(f"{verdict}: {names}.")
    for machine in group.machines:
        place = f" on {machine.machine}" if len(group.machines) > 1 else ""
        sentences += _describe_speed(comparison, machine, place)
    return sentences


def describe_difference(difference: AccuracyDifference, n: int | None) -> str:
    """−0.8 points, p = 0.512."""
    text = format.points(difference.points, n)
    if difference.p_holm is None:
        return f"{text}, intervals {'overlap' if difference.within_noise else 'do not overlap'}"
    text += f", {format.p_equals(difference.p_holm)}"
    return text if difference.paired else f"{text}, unpaired"


def _describe_speed(comparison: Comparison, machine: Machine, place: str) -> list[str]:
    first = comparison.run(machine.runs[0]).ships
    assert first is not None
    sentences = [f"Fastest{place}: {machine.runs[0]}, {format.milliseconds(first.p50)}."]
    for verdict, meaning in (
        ("no difference", "Not significantly slower"),
        ("slower", "Slower"),
        ("unknown", "Latency without intervals"),
    ):
        if runs := [d for d in machine.latencies if d.verdict == verdict]:
            names = ", ".join(f"{d.run} ({format.times(d.ratio)})" for d in runs)
            sentences.append(f"{meaning}: {names}.")
    return sentences


def measured_files(runs: Sequence[ComparedRun]) -> list[tuple[str, ComparedFile]]:
    """Return the files with both accuracy and latency, named "run kind" or "teacher kind".

    A teacher that several runs share is included once, with its lowest latency: disturbances only make it
    slower.
    """
    files: list[tuple[str, ComparedFile]] = []
    teachers: dict[tuple[str, float], tuple[str, ComparedFile]] = {}
    for run in runs:
        files += [(f"{run.name} {f.kind}", f) for f in (run.int8, run.fp32) if f and _is_measured(f)]
        teacher = run.teacher_file
        if teacher is not None and _is_measured(teacher) and teacher.score is not None:
            key = (run.teacher, teacher.score.percent)
            faster = teachers.get(key)
            if faster is None or (teacher.p50 or 0.0) < (faster[1].p50 or 0.0):
                teachers[key] = (run.name, teacher)
    names = [name for name, _ in teachers]
    for (name, _), (run_name, teacher) in teachers.items():
        unique = name if names.count(name) == 1 else f"{name} of {run_name}"
        files.append((f"{unique} teacher", teacher))
    return files


def _is_measured(file: ComparedFile) -> bool:
    score, p50 = file.score, file.p50
    return score is not None and p50 is not None and isfinite(p50) and p50 > 0 and isfinite(score.percent)


def _chart(comparison: Comparison, group: Group, machine: Machine) -> Chart | None:
    files = measured_files([comparison.run(name) for name in machine.runs])
    kinds = {file.kind for _, file in files}
    return scatter(
        f"{format.title(score_name(comparison, group))} over latency",
        [_point(name, file, machine) for name, file in files],
        x_name=f"median latency in ms, {format.threads(comparison.threads or 1)}",
        note=f"Benchmarked on {machine.machine}.",
        legend=[entry for kind, entry in KINDS.items() if kind in kinds],
    )


def _point(name: str, file: ComparedFile, machine: Machine) -> Point:
    assert file.score is not None and file.p50 is not None
    run, _, kind = name.rpartition(" ")
    # The two files of a run are near each other: the fp32 file needs a label only on the Pareto front.
    fp32 = f"{run} fp32" if name in machine.frontier else ""
    label, run_name = fp32 if kind == "fp32" else run, "" if kind == "teacher" else run
    return Point.from_score(name, KINDS[kind][0], file.score, file.p50, file.bytes, label, run_name)


def _table(comparison: Comparison, group: Group) -> Table:
    """Return the file of each run that ships, the most accurate first."""
    differences = {difference.run: difference for difference in group.accuracies}
    rows = []
    for run in map(comparison.run, group.runs):
        against_best = "best" if run.name == group.best else format.MISSING
        if (difference := differences.get(run.name)) is not None:
            verdict = "not significant" if difference.within_noise else "worse"
            against_best = f"{describe_difference(difference, group.n)}: {verdict}"
        shipped = run.ships or NO_FILE
        kind = shipped.kind if run.ships else format.MISSING
        rows.append([run.name, _describe_method(run), kind, *_measures(shipped, group), against_best])
    columns = ["run", "method", "ships", score_name(comparison, group), "latency", "over teacher", "size"]
    return Table(_title(group), [*columns, "ECE", "vs. best"], rows, left=3, wide=True)


def _measures(file: ComparedFile, group: Group) -> list[str]:
    latency, faster = format.milliseconds(file.p50), format.speedup(file.speedup)
    ece = format.percent(file.ece, group.n)
    return [format.score(file.score), latency, faster, format.megabytes(file.bytes), ece]


def _other_files(comparison: Comparison, group: Group) -> Table:
    """Return the fp32 file of each run that ships an int8 file."""
    runs = map(comparison.run, group.runs)
    rows = [[run.name, *_measures(run.fp32, group)] for run in runs if run.int8 and run.fp32]
    columns = ["run", score_name(comparison, group), "latency", "over teacher", "size", "ECE"]
    return Table("fp32 files", columns, rows, wide=True)


def _trainings(comparison: Comparison, group: Group) -> Table:
    rows = [
        [
            run.name,
            _describe_method(run),
            run.teacher,
            run.student,
            f"{show_size(run.image_size)} px",
            format.millions(run.parameters),
            format.MISSING if run.training_seconds is None else format.duration(run.training_seconds),
            format.MISSING if run.seed is None else str(run.seed),
            format.MISSING if run.fingerprint is None else run.fingerprint[:8],
        ]
        for run in map(comparison.run, group.runs)
    ]
    columns = ["run", "method", "teacher", "student", "image", "parameters", "training", "seed", "data"]
    return Table("Training", columns, rows, left=4, wide=True)


def _describe_method(run: ComparedRun) -> str:
    return f"{run.method}, {run.unlabeled:,} unlabeled" if run.unlabeled else run.method


def terminal_table(comparison: Comparison, group: Group) -> Table:
    """Return a row for each run, for 80 columns."""
    differences = {d.run: "not significant" if d.within_noise else "worse" for d in group.accuracies}
    rows = []
    for run in map(comparison.run, group.runs):
        shipped = run.ships or NO_FILE
        verdict = differences.get(run.name, "unfinished" if run.missing else "")
        score = [format.score_percent(shipped.score), format.score_interval(shipped.score)]
        cost = [format.milliseconds(shipped.p50), format.megabytes(shipped.bytes)]
        rows.append([run.name, run.method, *score, *cost, "best" if run.name == group.best else verdict])
    latency = "latency" if comparison.threads is None else format.threads(comparison.threads)
    columns = ["", "method", score_name(comparison, group), "95 % interval", latency, "size", ""]
    return Table(_title(group), columns, rows, left=2)


def comparison_csv(comparison: Comparison) -> str:
    """Return a row for each run, with unrounded numbers."""
    rows = [_row(comparison.run(name), group) for group in comparison.groups for name in group.runs]
    return to_csv([list(rows[0]), *(row.values() for row in rows)])


def _row(run: ComparedRun, group: Group) -> dict[str, object]:
    difference = next((d for d in group.accuracies if d.run == run.name), None)
    columns = ("method", "teacher", "student", "image_size", "parameters")
    row: dict[str, object] = {"run": run.name, **{name: getattr(run, name) for name in columns}}
    row["image_size"] = show_size(run.image_size)
    for kind, file in (("int8", run.int8), ("fp32", run.fp32), ("teacher", run.teacher_file)):
        score, speedup = (file.score, file.speedup) if file is not None else (None, None)
        row |= {
            f"{kind}_bytes": file and file.bytes,
            f"{kind}_score": score and score.percent,
            f"{kind}_low": score and score.low,
            f"{kind}_high": score and score.high,
            f"{kind}_ece": file and file.ece,
            f"{kind}_p50_ms": file and file.p50,
            f"{kind}_p50_low": file and file.p50_low,
            f"{kind}_p50_high": file and file.p50_high,
        }
        if kind != "teacher":
            row |= {
                f"{kind}_speedup": speedup and speedup.ratio,
                f"{kind}_speedup_low": speedup and speedup.low,
                f"{kind}_speedup_high": speedup and speedup.high,
                f"{kind}_speedup_clock": speedup and speedup.clock,
            }
    return row | {
        "points_to_best": 0.0 if run.name == group.best else difference and difference.points,
        "p_holm": difference and difference.p_holm,
        "paired": difference and difference.paired,
        "within_noise": True if run.name == group.best else difference and difference.within_noise,
        "training_seconds": run.training_seconds,
        "seed": run.seed,
        "data": run.data,
        "fingerprint": run.fingerprint,
        "test_images": group.n,
        "machine": run.machine,
        "missing": "; ".join(run.missing),
    }
