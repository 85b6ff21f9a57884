"""Errors of building a model and loading its weights."""


class ModelError(Exception):
    """A model cannot be built, or its weights are not available or do not fit (a failed job, exit code 1)."""

    exit_code = 1


class UnknownModel(ModelError):
    """timm has no model of this name, or it cannot be used in this role (wrong usage, exit code 2)."""

    exit_code = 2


def shorten(error: BaseException) -> str:
    """Return the message of another library's error on one line, without a final period."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"
