"""Students one after another, as FEED's sequential form has them: each one is the next one's teacher.

Park, Kwak, ECAI 2020, arXiv 1909.10754: the student of round k learns from that of round k − 1, frozen and of
the same architecture, from a fresh start; the first one from the teacher that was named. Ours: any method may
teach, and round k draws weights, order and views with ``--seed`` + k − 1, so that the first round is a run
without rounds.

A round is a stage of its own, before the stages of the last one, whose student ships:

    teacher → round 1 → … → round N−1 → prepare → student → export → …
"""

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from .options import STAGES, Options

ROUND = "round"
QAT = "qat"


def stages_of(rounds: int, qat: bool = False) -> tuple[str, ...]:
    """The stages of a run with so many rounds, with or without quantization-aware training, in order."""
    first, second = STAGES.index("prepare"), STAGES.index("quantize")
    between = [f"{ROUND} {k}" for k in range(1, rounds)]
    return (*STAGES[:first], *between, *STAGES[first:second], *([QAT] if qat else []), *STAGES[second:])


def stages_of_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The same, from the options that a run folder has recorded."""
    return stages_of(config.get("rounds", 1), config.get("qat", False))


def kind(stage: str) -> str:
    """What a stage does: ``round`` for each of the rounds, else its name."""
    return stage.partition(" ")[0]


def number(stage: str) -> int | None:
    """k of ``round k``; None for the other stages, which belong to the student that ships."""
    return int(stage.partition(" ")[2]) if kind(stage) == ROUND else None


def check(options: Options) -> None:
    """
    Raises:
        UsageError: rounds were asked for where there is not one teacher to begin with.
    """
    if options.rounds == 1:
        return
    if options.method == "none":
        raise UsageError(
            f"--rounds {options.rounds}: with --method none no student learns from the one before; name a "
            "method, or leave --rounds out."
        )
    if len(options.teacher) > 1 or options.teachers_from_seeds > 1:
        several = max(len(options.teacher), options.teachers_from_seeds)
        one = "say --teachers-from-seeds 1" if options.teachers_from_seeds > 1 else "name one --teacher"
        raise UsageError(
            f"--rounds {options.rounds} with {several} teachers: each round has one teacher, the student of "
            f"the round before; {one}, or leave --rounds out."
        )
