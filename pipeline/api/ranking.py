"""Rank compared runs: tests of accuracy, latency on each machine, and the student of a sweep that ships."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal, NamedTuple

from ..evaluation.comparison import SIGNIFICANT, compare_unpaired, frontier, holm, mcnemar
from ..evaluation.results import (
    AccuracyDifference,
    ComparedRun,
    Kind,
    LatencyDifference,
    Machine,
    Search,
    Winner,
)
from ..report.comparison_page import measured_files
from ..runs.artifacts import Predictions
from ..runs.scores import Score

MIN_VAL_IMAGES = 200
"""Least number of val images by which a student is chosen."""

KEYS: dict[Kind, str] = {"int8": "student_int8", "fp32": "student", "teacher": "teacher"}
"""Names of the files in ``Report`` and ``Predictions``."""


class Scored(NamedTuple):
    """A score of a run, and the name of its network in the predictions."""

    run: str
    score: Score
    key: str


def compare_scores(
    scores: Sequence[Scored], predictions: Mapping[str, Predictions | None]
) -> list[AccuracyDifference]:
    """Compare each score with the first one, which is the best."""
    differences = [_compare(scored, scores[0], predictions) for scored in scores[1:]]
    tested = {i: difference.p for i, difference in enumerate(differences) if difference.p is not None}
    for i, p_holm in zip(tested, holm(list(tested.values())), strict=True):
        differences[i].p_holm, differences[i].within_noise = p_holm, p_holm >= SIGNIFICANT
    return differences


def _compare(
    scored: Scored, best_scored: Scored, predictions: Mapping[str, Predictions | None]
) -> AccuracyDifference:
    """Test image by image if both runs have predictions on the same images, otherwise by their scores."""
    score, best_score = scored.score, best_scored.score
    difference = AccuracyDifference(
        run=scored.run,
        best=best_scored.run,
        points=score.percent - best_score.percent,
        paired=False,
        within_noise=score.high >= best_score.low,
    )
    own, other = (_select_predictions(s, predictions) for s in (scored, best_scored))
    if own is not None and other is not None and own.has_same_images(other):
        correct, best_correct = own.is_correct(scored.key), other.is_correct(best_scored.key)
        p = mcnemar(int((best_correct & ~correct).sum()), int((correct & ~best_correct).sum()))
        return difference.model_copy(update={"p": p, "paired": True})
    if score.correct is None or best_score.correct is None:
        return difference
    test = compare_unpaired(score, best_score)
    return difference.model_copy(update={"p": test.p, "low": test.low, "high": test.high})


def _select_predictions(scored: Scored, predictions: Mapping[str, Predictions | None]) -> Predictions | None:
    """Return a run's predictions if they match its report."""
    stored = predictions.get(scored.run)
    if stored is None or scored.key not in stored.classes:
        return None
    correct = stored.is_correct(scored.key)
    return stored if (correct.sum(), len(correct)) == (scored.score.correct, scored.score.n) else None


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


def choose_winner(
    search: Search,
    runs: Sequence[ComparedRun],
    predictions: Mapping[str, Predictions | None],
    val_predictions: Mapping[str, Predictions | None],
) -> Search:
    """Add the run that ships: the most accurate one within the budget, or a faster one that is not worse.

    With ``min_accuracy`` it is the fastest one of that accuracy, if there is one. For mAP and AP, whose
    differences have no test here, it is the most accurate one otherwise.

    Accuracy is that of the trained networks on val images, or of the shipped files on test images if a run
    has fewer than ``MIN_VAL_IMAGES``. A run is not worse if it does not differ significantly from the most
    accurate one, without a correction for the number of runs: that would let worse ones ship.
    """
    finished = [run for run in runs if run.ships and run.ships.score]
    allowed = [run for run in finished if search.max_latency is None or _holds(run, search.max_latency)]
    by_val = all(run.val_score is not None and run.val_score.n >= MIN_VAL_IMAGES for run in allowed)
    scores = [
        Scored(run.name, score, KEYS["fp32" if by_val else run.ships.kind])
        for run in allowed
        if run.ships and (score := run.val_score if by_val else run.ships.score)
    ]
    if not scores:
        return search
    scores.sort(key=lambda scored: (-scored.score.percent, scored.run))
    stored = val_predictions if by_val else predictions
    differences = {s.run: _correct_alone(_compare(s, scores[0], stored)) for s in scores[1:]}
    timed = {run.name: _as_timed(run) for run in allowed}
    least = search.min_accuracy
    if least is None:
        tested = {name: d.within_noise for name, d in differences.items() if d.p is not None}
        good = [s for s in scores if s is scores[0] or tested.get(s.run)]
    else:
        good = [s for s in scores if s.score.percent >= least]
    if not good:
        return search
    tied = [timed[s.run] for s in good]
    best = tied[0]
    slowest = _median(best)
    compared = [run for run in tied if run.machine == best.machine and _median(run) <= slowest < inf]
    fastest = min(compared, key=_median, default=best)
    # Of those that are as fast, the most accurate one.
    as_fast = (run for run in compared if _compare_latency(run, fastest) == "no difference")
    chosen = next(as_fast, fastest)
    assert chosen.ships is not None
    reason: Literal["most accurate", "faster", "fastest"] = "most accurate" if chosen is best else "faster"
    if compared and least is not None:
        reason = "fastest"
    winner = Winner(
        run=chosen.name,
        reason=reason,
        difference=differences.get(chosen.name),
        split="val" if by_val else "test",
        n=scores[0].score.n,
        timed=chosen.ships.kind,
    )
    return search.model_copy(update={"winner": winner})


def _as_timed(run: ComparedRun) -> ComparedRun:
    """Return a run with the fp32 file only if that is faster than int8, or int8 was not timed here."""
    fp32 = run.model_copy(update={"int8": None})
    return fp32 if _median(fp32) < _median(run) else run


def _median(run: ComparedRun) -> float:
    return (run.ships and run.ships.p50) or inf


def _holds(run: ComparedRun, budget: float) -> bool:
    """Return True if a run is within the latency budget.

    One whose int8 file is made for another processor is within it, as its untrained files were.
    """
    is_elsewhere = run.int8 is not None and run.int8.p50 is None and run.fp32 is not None and run.fp32.p50
    return bool(is_elsewhere) or _median(_as_timed(run)) <= budget


def _correct_alone(difference: AccuracyDifference) -> AccuracyDifference:
    """Return a difference as the only one that is tested."""
    if difference.p is None:
        return difference
    update = {"p_holm": difference.p, "within_noise": difference.p >= SIGNIFICANT}
    return difference.model_copy(update=update)
