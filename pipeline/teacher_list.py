"""Several teachers: of one architecture from seeds, and whether those that were named go together."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from ..models.checkpoint import read_checkpoint
from ..models.initialize import plain
from .config.options import Options
from .errors import UsageError

FITTING = ("auto", "keep")
"""Ways to treat a head that may leave it as it is."""


def from_seeds(options: Options) -> None:
    """Name the one teacher as often as ``--teachers-from-seeds`` says; a resolved list stays as it is.

    Raises:
        UsageError: there are several already, or they would be one network.
    """
    count = options.teachers_from_seeds
    if count == 1:
        return
    if len(set(options.teacher)) > 1 or len(options.teacher) not in (1, count):
        raise UsageError(
            f"--teachers-from-seeds {count} is about one architecture, and --teacher is given "
            f"{len(options.teacher)} times; name one, or say --teachers-from-seeds 1."
        )
    for head in options.teacher_head:
        if head in ("keep", "none"):
            raise UsageError(
                f"--teachers-from-seeds {count}: with --teacher-head {head} no teacher is trained, and all "
                f"{count} would be the same network; say --teacher-head replace, or --teachers-from-seeds 1."
            )
    options.teacher = options.teacher[:1] * count


def check_labels(options: Options) -> None:
    """
    Raises:
        UsageError: two weights files say that their heads are for different classes.
    """
    if len(set(options.teacher_weights)) == 1:
        return
    known: dict[str, tuple[str, ...]] = {}
    for source, head in zip(options.teacher_weights, options.teacher_head, strict=True):
        if source not in ("auto", "none", *known) and head in FITTING:
            labels = read_checkpoint(Path(source)).label_names
            if labels is not None:
                known[source] = labels
    for (one, classes), (other, others) in combinations(known.items(), 2):
        if [plain(label) for label in classes] != [plain(label) for label in others]:
            raise UsageError(
                "The teachers are for different classes or have them in another order: "
                f"{one} has {_brief(classes)}, {other} has {_brief(others)}; say --teacher-head for each "
                "--teacher, and replace for one that is to be tuned to the data."
            )


def _brief(classes: Sequence[str]) -> str:
    first = ", ".join(classes[:3])
    return first if len(classes) <= 3 else f"{first} … ({len(classes)} classes)"
