"""Which differences between runs are more than noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from ..evaluation.results import (
    AccuracyDifference,
    ComparedFile,
    ComparedRun,
    Group,
    LatencyDifference,
    Machine,
)
from ..frontier import frontier
from ..runs.predictions import PerImage
from ..significance import SIGNIFICANT, holm, mcnemar, unpaired

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
    if own.accuracy is None or top.accuracy is None:
        apart = own.score.high < top.score.low
        return _Test(None, paired=False, apart=apart)
    test = unpaired(own.accuracy, top.accuracy)
    return _Test(test.p, paired=False, low=test.low, high=test.high)


def _right(
    run: ComparedRun, file: ComparedFile, answers: Mapping[str, PerImage]
) -> tuple[PerImage, str] | None:
    """The run's answers, if they are those of which the report tells, and the file's key in them."""
    kept, key = answers.get(run.name), KEYS.get(file.kind, "")
    if kept is None or key not in kept.answers or file.accuracy is None:
        return None
    right = kept.right(key)
    same = (int(right.sum()), len(right)) == (file.accuracy.correct, file.accuracy.n)
    return (kept, key) if same else None


def machines(runs: Sequence[ComparedRun]) -> list[Machine]:
    """The runs that were timed, by machine."""
    timed = [one for one in runs if one.ships is not None and one.ships.p50]
    found = []
    for machine in dict.fromkeys(one.machine for one in timed):
        own = sorted((one for one in timed if one.machine == machine), key=lambda one: (_p50(one), one.name))
        found.append(
            Machine(
                machine=machine or "an unknown machine",
                runs=[one.name for one in own],
                latencies=[_slower(one, own[0]) for one in own[1:]],
                frontier=_frontier(points(own)),
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
        verdict = "not known"
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


Point = tuple[str, ComparedFile]
"""A file that was both measured and timed, by the name of the run (a teacher's by its own) and its kind."""


def points(runs: Sequence[ComparedRun]) -> list[Point]:
    """The files of these runs that have an accuracy and a latency; a teacher that several runs have is there
    once, as fast as any of them has found it.
    """
    found: list[Point] = []
    teachers: dict[tuple[str, float], tuple[str, ComparedFile]] = {}
    for run in runs:
        found += [(f"{run.name} {one.kind}", one) for one in (run.int8, run.fp32) if _drawn(one) and one]
        teacher = run.of_teacher
        if teacher is not None and _drawn(teacher) and teacher.score is not None:
            key = (run.teacher, teacher.score.percent)
            known = teachers.get(key)
            # What disturbs a machine makes a network slower: its fastest run tells most of it.
            if known is None or (teacher.p50 or 0.0) < (known[1].p50 or 0.0):
                teachers[key] = (run.name, teacher)
    names = [name for name, _ in teachers]
    for (name, _), (run_name, one) in teachers.items():
        apart = name if names.count(name) == 1 else f"{name} of {run_name}"
        found.append((f"{apart} teacher", one))
    return found


def _drawn(file: ComparedFile | None) -> bool:
    if file is None or file.score is None or file.p50 is None:
        return False
    return isfinite(file.p50) and file.p50 > 0 and isfinite(file.score.percent)


def _frontier(every: Sequence[Point]) -> list[str]:
    return [every[i][0] for i in frontier([_place(one) for _, one in every])]


def _place(file: ComparedFile) -> tuple[float, float]:
    assert file.p50 is not None and file.score is not None
    return file.p50, file.score.percent
