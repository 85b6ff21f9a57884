"""Differences between runs, and whether they are significant."""

from collections.abc import Mapping, Sequence
from typing import Literal

from ...evaluation.comparison import SIGNIFICANT, compare_unpaired, frontier, holm, mcnemar
from ...evaluation.results import AccuracyDifference, ComparedRun, Group, LatencyDifference, Machine
from ...report.pages.comparison import measured_files
from ...runs.predictions import Predictions
from ...runs.scores import Score

PREDICTION_KEYS = {"int8": "student_int8", "fp32": "student"}
"""Names of the files in ``Predictions``."""


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
    corrected = iter(holm([difference.p for difference in differences if difference.p is not None]))
    return [
        difference
        if difference.p is None
        else difference.model_copy(
            update={"p_holm": (p_holm := next(corrected)), "within_noise": p_holm >= SIGNIFICANT}
        )
        for difference in differences
    ]


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


def _select_predictions(
    run: ComparedRun, predictions: Mapping[str, Predictions | None]
) -> tuple[Predictions, str] | None:
    """Return a run's predictions and the name of its shipped file in them, if they match its report."""
    stored, file = predictions.get(run.name), run.ships
    assert file is not None and file.score is not None
    key = PREDICTION_KEYS.get(file.kind, "")
    if stored is None or key not in stored.classes:
        return None
    correct = stored.is_correct(key)
    matches = (int(correct.sum()), len(correct)) == (file.score.correct, file.score.n)
    return (stored, key) if matches else None


def group_by_machine(runs: Sequence[ComparedRun]) -> list[Machine]:
    """Group timed runs by machine and compare the latencies on each."""
    timed = [(run.ships.p50, run) for run in runs if run.ships and run.ships.p50]
    machines = []
    for name in dict.fromkeys(run.machine for _, run in timed):
        members = [pair for pair in timed if pair[1].machine == name]
        members.sort(key=lambda pair: (pair[0], pair[1].name))
        fastest = members[0][1]
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
                        ratio=p50 / members[0][0],
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
