"""`compress compare`: any number of runs in one table and one picture, and which differences are noise."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...export.latency.results import Speedup
from ..config import stages
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
)
from ..report.format import join_names, plural
from ..report.networks import Column, find_network
from ..report.pages.comparison import measured_files
from ..report.summary import describe_machine, list_missing
from ..runs import predictions
from ..runs.files import command_line, escape_cell, write_text
from ..runs.folder import RunFolder
from ..runs.predictions import PerImage
from ..runs.record import RECORD, read_checked
from ..runs.results import Report

KEYS = {"int8": "student_int8", "fp32": "student"}
"""By what the answers of a file are kept."""


def groups(runs: Sequence[ComparedRun], answers: Mapping[str, PerImage]) -> list[Group]:
    """Runs of the same data together, in the order of their first ones.

    Args:
        answers: to its test images, by run.
    """
    found = []
    for fingerprint in dict.fromkeys(one.fingerprint for one in runs):
        own = sorted((one for one in runs if one.fingerprint == fingerprint), key=_falling)
        scored = [one for one in own if _percent(one) is not None]
        scores = [one.ships.score for one in own if one.ships is not None and one.ships.score is not None]
        found.append(
            Group(
                data=own[0].data,
                fingerprint=fingerprint,
                n=scores[0].n if scores else None,
                runs=[one.name for one in own],
                best=scored[0].name if scored else None,
                accuracies=accuracies(scored, answers),
                machines=machines(own),
            )
        )
    return found


def _percent(run: ComparedRun) -> float | None:
    score = run.ships.score if run.ships is not None else None
    return None if score is None else score.percent


def _falling(run: ComparedRun) -> tuple[bool, float, str]:
    percent = _percent(run)
    return percent is None, -(percent or 0.0), run.name


@dataclass(frozen=True)
class _Test:
    p: float | None
    paired: bool
    low: float | None = None
    high: float | None = None
    apart: bool = False
    """Whether the intervals do not overlap, where there is no p."""


def accuracies(scored: Sequence[ComparedRun], answers: Mapping[str, PerImage]) -> list[AccuracyDifference]:
    """Every run's file that ships against that of the first one, which is the most accurate."""
    if not scored:
        return []
    best, *others = scored
    tests = [_test(one, best, answers) for one in others]
    known = [one.p for one in tests if one.p is not None]
    corrected = iter(holm(known))
    found = []
    for one, test in zip(others, tests, strict=True):
        p_holm = None if test.p is None else next(corrected)
        own, top = _percent(one), _percent(best)
        assert own is not None and top is not None
        found.append(
            AccuracyDifference(
                run=one.name,
                best=best.name,
                points=own - top,
                low=test.low,
                high=test.high,
                p=test.p,
                p_holm=p_holm,
                paired=test.paired,
                within_noise=not test.apart if p_holm is None else p_holm >= SIGNIFICANT,
            )
        )
    return found


def _test(run: ComparedRun, best: ComparedRun, answers: Mapping[str, PerImage]) -> _Test:
    """Image by image where both runs have kept their answers to the same images, else from the shares."""
    own, top = run.ships, best.ships
    assert own is not None and top is not None and own.score is not None and top.score is not None
    mine, theirs = _right(run, own, answers), _right(best, top, answers)
    if mine is not None and theirs is not None and mine[0].same_images(theirs[0]):
        right, other = mine[0].right(mine[1]), theirs[0].right(theirs[1])
        return _Test(mcnemar(int((other & ~right).sum()), int((right & ~other).sum())), paired=True)
    if own.score.correct is None or top.score.correct is None:
        apart = own.score.high < top.score.low
        return _Test(None, paired=False, apart=apart)
    test = compare_unpaired(own.score, top.score)
    return _Test(test.p, paired=False, low=test.low, high=test.high)


def _right(
    run: ComparedRun, file: ComparedFile, answers: Mapping[str, PerImage]
) -> tuple[PerImage, str] | None:
    """The run's answers, if they are those of which the report tells, and the file's key in them."""
    kept, key = answers.get(run.name), KEYS.get(file.kind, "")
    if kept is None or key not in kept.answers or file.score is None:
        return None
    right = kept.right(key)
    same = (int(right.sum()), len(right)) == (file.score.correct, file.score.n)
    return (kept, key) if same else None


def machines(runs: Sequence[ComparedRun]) -> list[Machine]:
    """The runs that were timed, by machine."""
    timed = [one for one in runs if one.ships is not None and one.ships.p50]
    found = []
    for name in dict.fromkeys(one.machine for one in timed):
        own = sorted((one for one in timed if one.machine == name), key=lambda one: (_p50(one), one.name))
        found.append(
            Machine(
                machine=name or "an unknown machine",
                runs=[one.name for one in own],
                latencies=[_slower(one, own[0]) for one in own[1:]],
                frontier=_frontier(measured_files(own)),
            )
        )
    return found


def _p50(run: ComparedRun) -> float:
    assert run.ships is not None and run.ships.p50 is not None
    return run.ships.p50


def _slower(run: ComparedRun, fastest: ComparedRun) -> LatencyDifference:
    own, first = run.ships, fastest.ships
    assert own is not None and first is not None
    if own.p50_low is None or first.p50_high is None:
        verdict = "unknown"
    else:
        verdict = "slower" if own.p50_low > first.p50_high else "no difference"
    return LatencyDifference.model_validate(
        {
            "run": run.name,
            "fastest": fastest.name,
            "ratio": _p50(run) / _p50(fastest),
            "verdict": verdict,
        }
    )


def _frontier(files: Sequence[tuple[str, ComparedFile]]) -> list[str]:
    return [files[i][0] for i in frontier([_place(file) for _, file in files])]


def _place(file: ComparedFile) -> tuple[float, float]:
    assert file.p50 is not None and file.score is not None
    return file.p50, file.score.percent


REPORT = "report.json"
TEACHER = "teacher"
"""Folder of a sweep's teacher, a run without a student."""


@dataclass(frozen=True)
class Run:
    """``name`` tells it from the others; ``folder`` is None where only its report was named."""

    name: str
    source: Path
    folder: Path | None
    report: Report


def runs(paths: Sequence[Path]) -> list[Run]:
    """Every run once, in the order named; those of a folder of runs by name.

    Raises:
        UsageError: one is no run, nor a folder of runs, nor a report.
    """
    found = {place.resolve(): place for path in paths for place in _places(path)}
    places = list(found.values())
    return [
        Run(name, place, _folder(place), _report(place))
        for name, place in zip(_names(list(found)), places, strict=True)
    ]


def _places(path: Path) -> Iterator[Path]:
    """A run's folder or report, or those in a folder."""
    if path.is_file():
        yield path.parent if path.name == REPORT and (path.parent / RECORD).is_file() else path
    elif _is_run(path):
        yield path
    elif path.is_dir():
        children = [child for child in sorted(path.iterdir()) if child.name != TEACHER and _is_run(child)]
        if not children:
            raise UsageError(f"{path} is not a run folder and does not contain any.")
        for child in children:
            yield from _places(child)
    else:
        raise UsageError(f"{path} does not exist. Set it to a run folder, a folder of runs or a report.json.")


def _is_run(path: Path) -> bool:
    return (path / RECORD).is_file() or (path / REPORT).is_file()


def _folder(place: Path) -> Path | None:
    if place.is_dir():
        return place
    return None


def _report(place: Path) -> Report:
    file = place / REPORT if place.is_dir() else place
    if not file.is_file():  # stopped before its first stage was done
        from ..report.assemble import assemble

        record = RunFolder(place, writes=False)
        record.open(fresh=False)
        if not (place / "config.yaml").is_file():
            raise UsageError(f"{place} holds a run without its config.yaml; it cannot be read.")
        return assemble(record)
    try:
        return _read(read_checked(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValidationError as error:
        raise UsageError(
            f"{file} is no report of this version of questpress; the command that made the run writes it "
            "anew."
        ) from error
    except ValueError as error:  # not UTF-8, not JSON, or not as it was written
        if file.suffix != Path(REPORT).suffix:
            raise UsageError(
                f"{file} is neither a run folder nor a report.json: name run folders that compress has made, "
                "a folder of them, or their report.json."
            ) from error
        raise UsageError(
            f"{file} is no report, or damaged ({error}): compress report writes it anew."
        ) from error


def _read(content: Any) -> Report:
    """A report, without what only other versions of questpress know.

    Raises:
        ValueError: it is none.
    """
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        unknown = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
        if len(unknown) < error.error_count():
            raise
    for loc in unknown:
        place = content
        for part in loc[:-1]:
            place = place[part]
        del place[loc[-1]]
    return Report.model_validate(content)


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other has."""
    parts = [(one.parent if one.name == REPORT else one).parts for one in places]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


OF_THE_STUDENT = ("prepare", "student", "qat", stages.ROUND)
"""Stages in which it is made."""

KINDS: dict[str, Kind] = {"student_int8": "int8", "student": "fp32", "teacher": "teacher"}


def measured(run: Run, threads: int | None) -> ComparedRun:
    """A run as it is compared."""
    report = run.report
    files = {kind: _file(find_network(report, key), kind, threads) for key, kind in KINDS.items()}
    student = report.student or report.student_int8
    seconds = [one.seconds for one in report.stages if stages.get_kind(one.stage) in OF_THE_STUDENT]
    seed = report.config.get("seed")
    return ComparedRun(
        name=run.name,
        source=str(run.source),
        method=report.method,
        teacher=join_names([one.name for one in report.teachers] or _teachers(report)),
        student=student.name if student is not None else str(report.config.get("student", "")),
        image_size=report.image_size,
        parameters=student.parameters if student is not None else None,
        int8=files["int8"],
        fp32=files["fp32"],
        teacher_file=files["teacher"],
        training_seconds=sum(seconds) if seconds else None,
        seed=seed if isinstance(seed, int) else None,
        data=report.data.name if report.data is not None else None,
        fingerprint=report.data.fingerprint if report.data is not None else None,
        machine=describe_machine(report.environment) if _timed(report) else None,
        missing=list_missing(report),
    )


def _teachers(report: Report) -> list[str]:
    named = report.config.get("teacher", [])
    return [str(one) for one in named] if isinstance(named, list) else [str(named)]


def _timed(report: Report) -> bool:
    return any(one is not None and one.latency_ms for one in (report.student, report.student_int8))


def thread_counts(report: Report) -> set[int]:
    """At which its files that ship were timed."""
    files = (report.student, report.student_int8)
    return {int(count) for one in files if one is not None for count in one.latency_ms}


def _file(column: Column | None, kind: Kind, threads: int | None) -> ComparedFile | None:
    if column is None or (kind == "teacher" and column.subject.score is None):
        return None
    subject = column.subject
    latency = subject.latency_ms.get(str(threads))
    median = None if latency is None else latency.percentiles.get("p50")
    return ComparedFile(
        kind=kind,
        network=subject.name,
        bytes=subject.bytes,
        score=None if subject.score is None else subject.score.model_copy(update={"classes": []}),
        ece=subject.calibration.ece if subject.calibration is not None else None,
        p50=median and median.value,
        p50_low=median and median.low,
        p50_high=median and median.high,
        speedup=_speedup(subject.speedups, threads),
    )


def _speedup(speedups: list[Speedup], threads: int | None) -> Speedup | None:
    return next((one for one in speedups if one.over == "teacher" and one.threads == threads), None)


FOLDER = "comparison"


def compare(
    paths: str | Path | Sequence[str | Path], *, out: str | Path | None = None, threads: int | None = None
) -> Comparison:
    """Compare runs by their reports; the same as the command. Nothing is measured anew.

    Args:
        paths: run folders, folders of runs (also of `compress resolutions`), or report.json files.
        out: where comparison.html, .md, .csv and .json go; without it ``comparison`` here.
        threads: at which latencies are compared; without it the fewest at which most runs were timed.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        UsageError: one is no run, or none was timed at so many threads (``exit_code`` 2).
        JobError: the files cannot be written (``exit_code`` 1).
    """
    named = [Path(one) for one in ([paths] if isinstance(paths, str | Path) else paths)]
    if not named:
        raise UsageError("No run is named: name run folders, or a folder of them.")
    folder = Path(FOLDER) if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; name a folder.")
    found = runs(named)
    count = _threads(found, threads)
    every = [measured(one, count) for one in found]
    grouped = groups(every, _answers(found))
    compared = Comparison(
        title=_title(every, grouped),
        command=command_line(),
        threads=count,
        runs=[one for group in grouped for name in group.runs for one in every if one.name == name],
        groups=grouped,
        warnings=_warnings(every, grouped),
        notes=_notes(grouped, count),
        folder=str(folder),
    )
    write(compared, folder)
    return compared


def _threads(found: Sequence[Run], asked: int | None) -> int | None:
    """
    Raises:
        UsageError: no run was timed at so many threads.
    """
    timed = [count for one in found for count in sorted(thread_counts(one.report))]
    if asked is not None and asked not in timed:
        there = ", ".join(map(str, sorted(set(timed)))) or "none"
        raise UsageError(f"--threads {asked}: no run was timed at so many; there are figures for {there}.")
    return asked or min(timed, key=lambda count: (-timed.count(count), count), default=None)


def _answers(found: Sequence[Run]) -> dict[str, predictions.PerImage]:
    each = {one.name: _kept(one.folder) for one in found if one.folder is not None}
    return {name: kept for name, kept in each.items() if kept is not None}


def _kept(run: Path) -> predictions.PerImage | None:
    """
    Raises:
        JobError: they are not as the run has left them.
    """
    if (run / RECORD).is_file():
        folder = RunFolder(run, writes=False)
        folder.open(fresh=False)
        folder.check_output(predictions.PREDICTIONS_FILE)
    return predictions.read_predictions(run / predictions.PREDICTIONS_FILE)


def _title(every: Sequence[ComparedRun], grouped: Sequence[Group]) -> str:
    data = dict.fromkeys(group.data for group in grouped if group.data)
    return f"{plural(len(every), 'run')}{' on ' if data else ''}{', '.join(data)}"


def _warnings(every: Sequence[ComparedRun], grouped: Sequence[Group]) -> list[str]:
    found = []
    sets = [group for group in grouped if group.fingerprint is not None]
    if len(sets) > 1:
        names = [f"{group.data} ({plural(len(group.runs), 'run')})" for group in sets]
        found.append(
            f"The runs are of {len(sets)} different sets of images: {', '.join(names)}. Each set is compared "
            "for itself, since accuracies on different images do not compare."
        )
    if any(len(group.machines) > 1 for group in grouped):
        found.append(
            "Some runs were timed on different machines, whose latencies do not compare; `compress bench RUN "
            "RUN` times them together on one."
        )
    found += [
        f"{one.name} is not finished: {' and '.join(one.missing)} {'is' if len(one.missing) == 1 else 'are'} "
        "missing."
        for one in every
        if one.missing
    ]
    return found


def _notes(grouped: Sequence[Group], threads: int | None) -> list[str]:
    tests = [one for group in grouped for one in group.accuracies]
    found = []
    if any(one.paired for one in tests):
        found.append("Accuracy is compared with the best run’s on the same images, by McNemar’s exact test.")
    if any(not one.paired and one.p is not None for one in tests):
        found.append(
            "Unpaired: a run has kept no answers (it is older, or only its report was named), and accuracies "
            "are compared as of different images, by the chi-squared test, which sees less; `compress "
            "validate RUN RUN` compares the files image by image."
        )
    if any(one.p is None for one in tests):
        found.append("mAP is compared by whether the 95 % intervals overlap, which sees little.")
    if any(one.p is not None for one in tests):
        found.append(
            "p is corrected for the number of runs that are compared with the best (Holm); below 5 % it is a "
            "difference, else within noise."
        )
    if any(machine.latencies for group in grouped for machine in group.machines):
        found.append(
            f"Latency: one image, {threads} thread{'' if threads == 1 else 's'}; slower is what has no "
            "part of its median’s 95 % interval in common with the fastest one’s. The runs were timed at "
            "different hours: for a difference of a few percent time them together, with `compress bench "
            "RUN RUN`."
        )
    return found


def write(found: Comparison, folder: Path) -> None:
    """Write the page, the same as Markdown, as JSON and as a table for programs, each whole or not at all.

    Raises:
        JobError: the folder cannot be written or the disk is full.
    """

    from ..report.pages.comparison import render_comparison

    texts = {
        **render_comparison(found),
        "comparison.csv": as_csv(found),
        "comparison.json": found.model_dump_json(indent=2) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)


def as_csv(found: Comparison) -> str:
    """A row for each run, numbers in full; no cell is a formula to a spreadsheet."""
    rows = [_row(one, group) for group in found.groups for one in map(found.run, group.runs)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: object) -> object:
    return "" if value is None else escape_cell(value) if isinstance(value, str) else value


def _row(run: ComparedRun, group: Group) -> Mapping[str, object]:
    against = next((one for one in group.accuracies if one.run == run.name), None)
    row: dict[str, object] = {
        "run": run.name,
        "method": run.method,
        "teacher": run.teacher,
        "student": run.student,
        "image_size": run.image_size,
        "parameters": run.parameters,
    }
    for kind, file in (("int8", run.int8), ("fp32", run.fp32), ("teacher", run.teacher_file)):
        score = file.score if file is not None else None
        speedup = file.speedup if file is not None else None
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
            }
    return row | {
        "points_to_best": 0.0 if run.name == group.best else against and against.points,
        "p_holm": against and against.p_holm,
        "paired": against and against.paired,
        "within_noise": True if run.name == group.best else against and against.within_noise,
        "training_seconds": run.training_seconds,
        "seed": run.seed,
        "data": run.data,
        "fingerprint": run.fingerprint,
        "test_images": group.n,
        "machine": run.machine,
        "missing": "; ".join(run.missing),
    }
