"""`compress compare`: any number of runs in one table and one picture, and which differences are noise."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..comparison.differences import groups
from ..comparison.measured import measured, thread_counts
from ..comparison.runs import Run, runs
from ..csv_cells import harmless
from ..errors import UsageError
from ..evaluation.results import ComparedRun, Comparison, Group
from ..report.format import counted
from ..runs import predictions
from ..runs.files import write_text
from ..runs.folder import RunFolder
from ..runs.record import RECORD
from ..typed import command

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
        command=command(),
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
        folder.check_left(predictions.PREDICTIONS_FILE)
    return predictions.read_predictions(run / predictions.PREDICTIONS_FILE)


def _title(every: Sequence[ComparedRun], grouped: Sequence[Group]) -> str:
    data = dict.fromkeys(group.data for group in grouped if group.data)
    return f"{counted(len(every), 'run')}{' on ' if data else ''}{', '.join(data)}"


def _warnings(every: Sequence[ComparedRun], grouped: Sequence[Group]) -> list[str]:
    found = []
    sets = [group for group in grouped if group.fingerprint is not None]
    if len(sets) > 1:
        names = [f"{group.data} ({counted(len(group.runs), 'run')})" for group in sets]
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
    from ..report.comparison import pages

    texts = {
        **pages(found),
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
    return "" if value is None else harmless(value) if isinstance(value, str) else value


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
    for kind, file in (("int8", run.int8), ("fp32", run.fp32), ("teacher", run.of_teacher)):
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
