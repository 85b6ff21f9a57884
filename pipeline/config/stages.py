"""The stages of a run with rounds and quantization-aware training.

Rounds are the sequential form of FEED (Park, Kwak, ECAI 2020, arXiv 1909.10754): the student of round k,
trained from scratch, learns from the frozen student of round k − 1, of the same architecture, and the first
one from the teacher. Different from the paper, any method can be used, and round k draws weights, order and
views with ``--seed`` + k − 1, so the first round is the same as a run without rounds.

Each round but the last is a stage before those of the student that is exported:

    teacher → round 1 → … → round N−1 → prepare → student → export → …
"""

from .options import STAGES

ROUND = "round"
QAT = "qat"
BASELINE = "baseline"


def list_stages(rounds: int, qat: bool = False, baseline: bool = False) -> tuple[str, ...]:
    """Return the stages of a run in order."""
    last = STAGES.index("report")
    first, second = STAGES.index("prepare"), STAGES.index("quantize")
    earlier_rounds = [f"{ROUND} {k}" for k in range(1, rounds)]
    fine_tuning = [QAT] if qat else []
    without_teacher = [BASELINE] if baseline else []
    return (
        *STAGES[:first], *earlier_rounds, *STAGES[first:second], *fine_tuning, *STAGES[second:last],
        *without_teacher, *STAGES[last:],
    )  # fmt: skip


def get_kind(stage: str) -> str:
    """Return ``round`` for a round, otherwise the stage's name."""
    return stage.partition(" ")[0]


def get_round(stage: str) -> int | None:
    """Return k for ``round k``, and None for other stages, which belong to the exported student."""
    return int(stage.partition(" ")[2]) if get_kind(stage) == ROUND else None
