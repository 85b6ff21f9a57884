"""What a run's options say of int8, checked and completed."""

from ..export.errors import ExportError
from ..export.opset import check_opset
from ..export.runtime import target_of_this_machine
from .config.options import Options
from .errors import UsageError

QAT_SHARE = 10
"""--epochs over --qat-epochs, unless it is said."""

QAT_LR = 0.1
"""--qat-lr over --lr, unless it is said."""


def complete(chosen: Options) -> None:
    """Choose what was left open; ``epochs`` and ``lr`` are chosen already.

    Raises:
        UsageError: a target is named twice, there is no such opset, or an option belongs to --qat, which was
            not asked for.
    """
    try:
        check_opset(chosen.opset)
    except ExportError as error:
        raise UsageError(f"--opset {chosen.opset}: {error}.") from error
    # Checked again when it is assigned.
    chosen.target = chosen.target or [target_of_this_machine()]  # type: ignore[list-item]
    twice = next((name for name in chosen.target if chosen.target.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--target {twice} is given twice; name each target once.")
    if not chosen.qat:
        for name in ("qat_epochs", "qat_lr"):
            if getattr(chosen, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is a part of --qat, which was not asked for: say --qat, too.")
        if chosen.until == "qat":
            raise UsageError("--until qat: there is no such stage without --qat; say it, too.")
        return
    assert chosen.epochs and chosen.lr
    chosen.qat_epochs = chosen.qat_epochs or max(1, round(chosen.epochs / QAT_SHARE))
    chosen.qat_lr = chosen.qat_lr or QAT_LR * chosen.lr
