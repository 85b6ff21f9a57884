"""Whether the published weights that a job starts from can be had: asked before hours of work, not after."""

from collections.abc import Collection

from ..models.pretrained import check_published, has_pretrained
from .options import Options


def check_weights(options: Options, stages: Collection[str], *, download: bool) -> None:
    """Ask for the published weights that these stages load, and put them into the cache if ``download``.

    Raises:
        ModelError: some cannot be had; all of them are named, with the options that do without.
    """
    wanted = []
    if "teacher" in stages:
        pairs = zip(options.teacher, options.teacher_weights, strict=True)
        wanted += [(name, "--teacher-weights") for name, source in pairs if source == "auto"]
    # A student without published weights starts from scratch.
    if "student" in stages and options.student_weights == "auto" and has_pretrained(options.student):
        wanted.append((options.student, "--student-weights"))
    check_published(wanted, download=download)
